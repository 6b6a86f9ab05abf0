"""What a data set's folder says of itself: tokenizer, vocabulary, dtype of its files."""

import json
from pathlib import Path

import numpy as np

from gpt_jax.errors import UserError
from gpt_jax.prepare.meta_pickle import symbols_of
from gpt_jax.tokenizer import Tokenizer, char_tokenizer, from_json, tiktoken_tokenizer

GPT2_VOCAB_SIZE = 50304  # 50257 ids, rounded up to a multiple of 64 for speed


def for_dataset(folder: Path) -> tuple[Tokenizer, int, np.dtype]:
    """Return tokenizer, vocab_size and token dtype by meta.json, else nanoGPT's meta.pkl or BPE."""
    if (path := folder / "meta.json").exists():
        try:
            meta = json.loads(path.read_bytes())
            tokenizer, vocab_size = from_json(meta["tokenizer"]), meta["vocab_size"]
            dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]])
            if not isinstance(vocab_size, int) or vocab_size < tokenizer.n_tokens:
                raise ValueError(f"vocab_size={vocab_size!r} of {tokenizer.n_tokens}")
            return tokenizer, vocab_size, dtype
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path} cannot be used ({error!r:.500}): prepare it again") from error
    if (path := folder / "meta.pkl").exists():
        symbols = symbols_of(path)
        return char_tokenizer(symbols), len(symbols), np.dtype("<u2")
    return tiktoken_tokenizer("gpt2"), GPT2_VOCAB_SIZE, np.dtype("<u2")
