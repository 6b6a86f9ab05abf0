"""AdamW with nanoGPT's decay groups and learning-rate schedule."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gpt_jax.config import TrainConfig


def learning_rate(config: TrainConfig, step: Any) -> Any:
    """Return the learning rate of update ``step`` (the first is 0), exactly nanoGPT's.

    A Python int gives a float; a traced int32 scalar gives float32. Warm-up is (step+1)/(warmup+1),
    so the first update already moves; then a cosine down to min_lr, which holds after
    lr_decay_iters. Loshchilov & Hutter 2017, "SGDR", by way of nanoGPT's get_lr.
    """
    if not config.decay_lr:
        return config.learning_rate
    traced = isinstance(step, jax.Array)
    cos, where = (jnp.cos, jnp.where) if traced else (math.cos, lambda c, a, b: a if c else b)
    warmup, decay, low = config.warmup_iters, config.lr_decay_iters, config.min_lr
    progress = (step - warmup) / max(decay - warmup, 1)
    cosine = low + 0.5 * (1 + cos(math.pi * progress)) * (config.learning_rate - low)
    rising = config.learning_rate * (step + 1) / (warmup + 1)
    return where(step < warmup, rising, where(step > decay, low, cosine))


def decayed(params: Any) -> Any:
    """Return a tree of booleans: which leaves weight decay pulls on.

    The matrices, wte and wpe included; not the LayerNorms, not the biases. By name and not by
    ``ndim >= 2``: over stacked layers a LayerNorm's weight is (L, C).
    """

    def decays(path, _) -> bool:
        *_, module, leaf = (key.key for key in path)
        return leaf == "weight" and not module.startswith("ln_")

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Return AdamW (Loshchilov & Hutter 2019) behind clipping by the global norm.

    Everything is float32, the state a float32 pair of moments a parameter; eps is 1e-8.
    ``grad_clip=0`` leaves the clipping out.
    """
    adamw = optax.adamw(
        lambda step: learning_rate(config, step),
        b1=config.beta1, b2=config.beta2, eps=1e-8, weight_decay=config.weight_decay, mask=decayed,
    )  # fmt: skip
    if not config.grad_clip:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.grad_clip), adamw)
