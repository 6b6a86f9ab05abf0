"""A folder as save_pretrained of transformers' GPT2LMHeadModel would leave it."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt_jax.config import GPTConfig
from gpt_jax.errors import UserError
from gpt_jax.interop import safetensors_file, tokenizer_files
from gpt_jax.interop.gpt2 import FIXED, PREFIX, WEIGHTS, layout
from gpt_jax.tokenizer import Tokenizer

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new"}  # erf and tanh, by their names
ABSENT = ("pruned_heads", "quantization_config")  # from a config.json, where they are not meant


def write(
    folder: Path,
    config: GPTConfig,
    params: Any,
    tokenizer: Tokenizer,
    dtype: str,
    keep_padding: bool,
) -> list[str]:
    """Write the folder, and return lines on what is not there as it was.

    Rows of the embedding that no token has are left out unless ``keep_padding``: transformers,
    which knows of no padding, would draw their ids, and its tokenizer has as many as are kept.
    """
    notes = []
    rows = config.vocab_size if keep_padding else tokenizer.n_tokens
    if rows < config.vocab_size:
        notes.append(
            f"  {config.vocab_size - rows} rows of the embedding are padding and left out: "
            "--keep_padding=True keeps them"
        )
    if not config.bias:
        notes.append("  it has no biases and GPT2LMHeadModel has: they are written as zeros")
    folder.mkdir()
    arrays = tensors(jax.tree.map(np.asarray, params), config, rows)
    safetensors_file.write(folder / WEIGHTS, arrays, dtype, {"format": "pt"})
    write_json(folder / "config.json", config_json(config, tokenizer, dtype, rows))
    return notes + write_tokenizer(tokenizer, folder, config.block_size)


def tensors(params: Any, config: GPTConfig, rows: int) -> dict[str, np.ndarray]:
    """Return GPT2LMHeadModel's tensors by name, but for the tied lm_head; views, in its order.

    params are numpy arrays; ``rows`` of the embedding are taken. Biases that are not there are 0.
    """
    whole, layers = {}, [{} for _ in range(config.n_layer)]
    for name, theirs, _ in layout(config):
        *modules, kind = name.split(".")
        node = params
        for module in modules:
            node = node[module]
        stacked = modules[0] == "h"
        x = node[kind] if kind in node else np.zeros((config.n_layer, *theirs)[not stacked :], "f4")
        for i, layer in enumerate(layers if stacked else []):
            layer[f"{PREFIX}h.{i}.{name.removeprefix('h.')}"] = x[i].reshape(theirs)
        if not stacked:
            whole[PREFIX + name] = x[:rows] if name == "wte.weight" else x
    ends = {name: whole.pop(name) for name in [*whole] if "ln_f" in name}
    return {**whole, **{name: x for layer in layers for name, x in layer.items()}, **ends}


def config_json(config: GPTConfig, tokenizer: Tokenizer, dtype: str, rows: int) -> dict[str, Any]:
    """Return what config.json says: GPT2Config's names."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": ACTIVATIONS[config.activation],
        "vocab_size": rows,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        **{name: value for name, value in FIXED.items() if name not in ABSENT},
        "reorder_and_upcast_attn": False,  # vLLM insists
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        "initializer_range": 0.02,
        "bos_token_id": tokenizer.end_of_text,  # None, and not GPT2Config's 50256, if it has none
        "eos_token_id": tokenizer.end_of_text,
        "use_cache": True,
        "torch_dtype": dtype,
    }


def write_tokenizer(tokenizer: Tokenizer, folder: Path, n_ctx: int) -> list[str]:
    """Write the tokenizer's files into a folder; return why not, in a line, where it cannot be."""
    try:
        tokenizer_files.write(tokenizer, folder, n_ctx)
    except UserError as error:
        return [f"  no tokenizer files are written: {error}"]
    return []


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file, to the disk."""
    with open(path, "x", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
