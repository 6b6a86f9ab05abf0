"""OpenAI's GPT-2 weights, as Hugging Face keeps them: safetensors, without torch or transformers.

Their Conv1D holds (in, out), as our linear layers do, so nothing is transposed.
"""

from typing import Any

import numpy as np

from gpt_jax.config import GPTConfig
from gpt_jax.errors import UserError
from gpt_jax.interop.nanogpt import PREFIX, from_state_dict
from gpt_jax.model import GPT
from gpt_jax.tokenizer import Tokenizer, tiktoken_tokenizer

# layers, heads, embedding: 124M, 350M, 774M and 1558M parameters
SIZES = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
LONGEST_NAME = 100  # characters of an array's name
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def config_of(name: str, dtype: str) -> GPTConfig:
    """Return the config of "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl"."""
    n_layer, n_head, n_embd = SIZES[name]
    return GPTConfig(
        n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=1024, vocab_size=50257,
        bias=True, activation="gelu_tanh", dtype=dtype,
    )  # fmt: skip


def from_hugging_face(arrays: dict[str, np.ndarray], config: GPTConfig) -> dict[str, Any]:
    """Return parameters from GPT2LMHeadModel's (or GPT2Model's) names and float32 arrays."""
    named = {}
    for name, x in arrays.items():
        if not name.isprintable() or len(name) > LONGEST_NAME:  # it would be quoted
            raise UserError(f"there is no parameter {name!r:.60}: this is not GPT-2")
        name = name if name.startswith((PREFIX, "lm_head")) else PREFIX + name
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the causal mask, not a parameter
        if x.dtype != np.float32:
            raise UserError(f"{name!r} holds {x.dtype}, not float32: this is not OpenAI's file")
        named[name] = x.T if name.endswith(TRANSPOSED) else x
    return from_state_dict(named, config)


def load(name: str, dtype: str) -> tuple[GPT, dict[str, Any], Tokenizer]:
    """Return (model, params, tokenizer) of one of OpenAI's models, from the hub or its cache.

    The params are still numpy arrays.
    """
    try:
        from huggingface_hub import hf_hub_download  # pyright: ignore[reportMissingImports]
        from safetensors.numpy import load_file  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"init_from={name} fetches weights: pip install 'gpt_jax[hub]' brings what it needs"
        ) from None
    config = config_of(name, dtype)
    try:
        arrays = load_file(hf_hub_download(f"openai-community/{name}", "model.safetensors"))
    except Exception as error:  # whatever the network, the hub or the file has to say
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"init_from={name}: the weights cannot be had: {reason:.300}") from None
    return GPT(config), from_hugging_face(arrays, config), tiktoken_tokenizer("gpt2")
