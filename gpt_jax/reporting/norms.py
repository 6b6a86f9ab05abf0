"""How large parameters and gradients are: their norms, in all and by layer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt_jax.config import TrainConfig


def layer_norms(name: str, tree: Any) -> dict[str, Array]:
    """Return the L2 norms of the parts of parameters or of their gradient, float32.

    Under NAME/wte, NAME/wpe and NAME/ln_f one (), under NAME/h (L,) one of each block.
    """

    def norm(part: Any, axes: int) -> Array:
        leaves = jax.tree.leaves(part)
        return jnp.sqrt(sum(jnp.square(x).sum(tuple(range(axes, x.ndim))) for x in leaves))

    return {f"{name}/{key}": norm(part, int(key == "h")) for key, part in tree.items()}


def gradient_norms(config: TrainConfig) -> Callable[[Any], dict[str, Array]]:
    """Return what make_train_step is to measure: with log_norms, each layer's gradient norm."""
    return lambda grads: layer_norms("grad_norm", grads) if config.log_norms else {}


def parameter_norms(config: TrainConfig, mesh: Mesh) -> Callable[[Any], dict[str, Array]]:
    """Return a jitted function of parameters: their norm, and with log_norms each layer's.

    Apart from the train step, so that only iterations that are logged pay for reading them: the
    6 GB of GPT-2 XL take an H100 2 ms at the 3.35 TB/s of its memory.
    """

    @jax.jit(out_shardings=NamedSharding(mesh, PartitionSpec()))  # for every process to read
    def norms(params: Any) -> dict[str, Array]:
        layers = layer_norms("param_norm", params)
        return {"param_norm": optax.tree.norm(layers), **(layers if config.log_norms else {})}

    return norms


def as_floats(metrics: dict[str, Any]) -> dict[str, float]:
    """Return metrics as floats, those of blocks by number: NAME/h is NAME/h.0, NAME/h.1, ..."""
    flat = {}
    for name, value in metrics.items():
        if np.ndim(value):
            flat |= {f"{name}.{index}": float(x) for index, x in enumerate(value)}
        else:
            flat[name] = float(value)
    return flat
