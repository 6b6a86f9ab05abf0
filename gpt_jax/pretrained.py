"""A trained model by name: a run's out_dir, or OpenAI's GPT-2."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gpt_jax import checkpoint
from gpt_jax.config import GPTConfig
from gpt_jax.errors import UserError
from gpt_jax.interop import gpt2
from gpt_jax.model import GPT
from gpt_jax.sharding import make_mesh, placed, state_sharding
from gpt_jax.tokenizer import Tokenizer, from_json


def load(
    source: str, *, step: str = "", dtype: str = "auto", mesh: Mesh | None = None
) -> tuple[GPT, dict[str, Any], Tokenizer]:
    """Return (model, params, tokenizer) of a run's folder, or of "gpt2", "gpt2-medium", ...

    ``step`` picks a run's checkpoint: "best", "latest", a number, or "" for what nanoGPT would
    have kept. params are float32; ``dtype`` is that of the matrix products, "auto" the fastest
    good one here. They lie on one device, or on a ``mesh`` (sharding.make_mesh), no device holding
    more than its part. Raises UserError where there is nothing to load.
    """
    mesh = mesh or make_mesh(devices=jax.local_devices()[:1])
    dtype = product_dtype(dtype)
    if source in gpt2.SIZES:
        model, arrays, tokenizer = gpt2.load(source, dtype)
        params = jax.tree.map(
            lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, x.__getitem__),
            arrays,
            state_sharding(mesh, arrays),
        )
        return model, params, tokenizer
    number = checkpoint.choose(source, step)
    meta = checkpoint.read_meta(source, number)
    tokenizer = from_json(meta["tokenizer"])
    config = model_config(meta, dtype, tokenizer)
    model = GPT(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    path = checkpoint.folder(source) / str(number) / "params"
    return model, checkpoint.restore_tree(path, placed(mesh, shapes)), tokenizer


def model_config(meta: dict[str, Any], dtype: str, tokenizer: Tokenizer) -> GPTConfig:
    """Return the config of a checkpoint's model, to compute in ``dtype``."""
    try:
        return GPTConfig(**{**meta["model"], "dtype": dtype, "n_tokens": tokenizer.n_tokens})
    except TypeError as error:
        raise UserError(f"the checkpoint's model is of another version: {error}") from None


def product_dtype(dtype: str) -> str:
    """Return ``dtype``; for "auto" bfloat16 where the hardware has it, float32 on CPU.

    GPUs before Ampere (compute capability 8) get float16, as in nanoGPT.
    """
    if dtype != "auto":
        return dtype
    device = jax.devices()[0]
    if device.platform == "cpu":
        return "float32"
    capability = str(getattr(device, "compute_capability", "")).split(".")[0]  # AMD's: "gfx90a"
    old = device.platform == "gpu" and capability.isdecimal() and int(capability) < 8
    return "float16" if old else "bfloat16"
