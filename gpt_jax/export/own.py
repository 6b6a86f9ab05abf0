"""A safetensors file of our parameters by our names, joined by dots, layers stacked."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gpt_jax import checkpoint
from gpt_jax.config import GPTConfig, TrainConfig
from gpt_jax.interop import safetensors_file
from gpt_jax.model import GPT
from gpt_jax.optimizer import make_optimizer
from gpt_jax.sharding import placed
from gpt_jax.tokenizer import Tokenizer
from gpt_jax.train_step import init_state


def write(
    path: Path, config: GPTConfig, trees: dict[str, Any], tokenizer: Tokenizer, dtype: str
) -> None:
    """Write the leaves of trees, each tree's behind its prefix; the metadata hold JSON.

    "config" is the network's, "tokenizer" what gpt_jax.tokenizer.from_json takes.
    """
    arrays = {}
    for prefix, tree in trees.items():
        for place, x in jax.tree_util.tree_leaves_with_path(tree):
            name = prefix + jax.tree_util.keystr(place, simple=True, separator=".")
            arrays[name] = np.asarray(x)
    metadata = {"format": "gpt_jax", "config": vars(config), "tokenizer": tokenizer.to_json()}
    text = {name: x if isinstance(x, str) else json.dumps(x) for name, x in metadata.items()}
    safetensors_file.write(path, arrays, dtype, text)


def moments(out_dir: str, model: GPT, meta: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Return AdamW's two moments of a checkpoint, by "mu." and "nu.": trees like the parameters.

    ``meta`` is the checkpoint's JSON. Raises DamageError where they are not what was saved.
    """
    known = {f.name for f in fields(TrainConfig)}
    config = TrainConfig(**{name: x for name, x in meta["config"].items() if name in known})

    def first() -> Any:
        params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        return init_state(params, make_optimizer(config))

    like = checkpoint.without_params(placed(mesh, jax.eval_shape(first)))
    path = checkpoint.folder(out_dir) / str(meta["iter"])
    state = checkpoint.restore_tree(path, "optimizer", like, meta)["opt_state"]
    return {f"{name}.": optax.tree.get(state, name) for name in ("mu", "nu")}
