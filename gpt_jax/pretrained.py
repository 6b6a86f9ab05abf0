"""A trained model by name: a run's out_dir, nanoGPT's ckpt.pt, or a GPT-2 of Hugging Face's."""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gpt_jax import checkpoint, kernels
from gpt_jax.config import GPTConfig
from gpt_jax.errors import DamageError, UserError
from gpt_jax.integrity import check_sizes
from gpt_jax.interop import gpt2, nanogpt_checkpoint
from gpt_jax.model import GPT
from gpt_jax.sharding import make_mesh, placed
from gpt_jax.tokenizer import Tokenizer, from_json


def load(
    source: str | Path, *, step: str = "", dtype: str = "auto", mesh: Mesh | None = None,
    data_dir: str = "data",
) -> tuple[GPT, dict[str, Any], Tokenizer]:  # fmt: skip
    """Return (model, params, tokenizer) of a run's folder, a ckpt.pt, or Hugging Face's GPT-2s.

    Those are "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2", any other's "owner/name"
    on the hub, or a folder; a Path is never looked for on the hub.

    ``step`` picks a run's checkpoint: "best", "latest", a number, or "" for what nanoGPT would
    have kept. params are float32; ``dtype`` is that of the matrix products, "auto" the fastest
    good one here. They lie on one device, or on a ``mesh`` (sharding.make_mesh), no device holding
    more than its part. nanoGPT's ckpt.pt has its tokenizer in ``data_dir``, with its data set.
    Raises UserError where there is nothing to load.
    """
    mesh = mesh or make_mesh(devices=jax.local_devices()[:1])
    if nanogpt_checkpoint.is_one(source):
        its = nanogpt_checkpoint.load(str(source), product_dtype(dtype), mesh, data_dir)
        model, params, tokenizer = its
    elif gpt2.is_theirs(source):
        model, params, tokenizer = gpt2.load(source, product_dtype(dtype), mesh)
    else:
        model, params, tokenizer, _ = load_run(str(source), step, dtype, mesh)
    return model if mesh.size == 1 else kernels.without(model), params, tokenizer


def load_run(
    out_dir: str, step: str, dtype: str, mesh: Mesh
) -> tuple[GPT, dict[str, Any], Tokenizer, dict[str, Any]]:
    """Return load's model, params and tokenizer of a run, and its checkpoint's JSON.

    A damaged one is named and the next best taken, but for one that was asked for by its number.
    """
    for number in (candidates := checkpoint.choose(out_dir, step)):
        try:
            meta = checkpoint.read_meta(out_dir, number)
            tokenizer = from_json(meta["tokenizer"])
            model = GPT(model_config(meta, dtype, tokenizer))
            path = checkpoint.folder(out_dir) / str(number)
            check_sizes(path / "params", model.config)
            shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
            like = placed(mesh, shapes["params"])
            return model, checkpoint.restore_tree(path, "params", like, meta), tokenizer, meta
        except DamageError as error:
            if number == candidates[-1]:
                raise
            print(f"passed over: {error}", file=sys.stderr)
    raise AssertionError


def model_config(meta: dict[str, Any], dtype: str, tokenizer: Tokenizer) -> GPTConfig:
    """Return the config of a checkpoint's model, to compute in ``dtype``."""
    try:
        ours = {"dtype": product_dtype(dtype), "n_tokens": tokenizer.n_tokens}
        here = dict.fromkeys(("matmul_dtype", "attention", "kernels"), "auto")
        return GPTConfig(**{**meta["model"], **ours, **here})
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
