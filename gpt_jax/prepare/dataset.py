"""What a data set's folder says of itself: tokenizer, vocabulary, dtype of its files."""

import json
from pathlib import Path

import numpy as np

from gpt_jax.errors import UserError
from gpt_jax.prepare.meta_pickle import symbols_of
from gpt_jax.tokenizer import Tokenizer, char_tokenizer, from_json, tiktoken_tokenizer

ROUND = 64  # a vocabulary of byte-pair encoding is rounded up to a multiple of it, for speed
GPT2_VOCAB_SIZE = 50304  # 50257 ids, so rounded
MOST_PADDING = 2**16  # rows of the embedding that no id has: more would only fill the memory
LONGEST_META = 2**26  # bytes of a meta.json
MOST_UINT16 = 2**16 - 1  # ids of a file of uint16; more take uint32


def size_and_dtype(tokenizer: Tokenizer) -> tuple[int, str]:
    """Return the vocab_size and the token dtype ("uint16" or "uint32") of a tokenizer's data."""
    n_tokens = tokenizer.n_tokens
    subword = tokenizer.spec["kind"] in ("tiktoken", "huggingface")
    dtype = "uint16" if n_tokens <= MOST_UINT16 else "uint32"
    return n_tokens + (-n_tokens % ROUND if subword else 0), dtype


def for_dataset(folder: Path) -> tuple[Tokenizer, int, np.dtype]:
    """Return tokenizer, vocab_size and token dtype by meta.json, else nanoGPT's meta.pkl or BPE."""
    for name in ("meta.json", "meta.pkl"):
        if (path := folder / name).exists() and not path.is_file():  # a pipe would be waited for
            raise UserError(f"{path} is no regular file: remove it and prepare the data set again")
    if (path := folder / "meta.json").exists():
        try:
            if (size := path.stat().st_size) > LONGEST_META:
                raise ValueError(f"{size} bytes are more than {LONGEST_META}")
            meta = json.loads(path.read_bytes())
            tokenizer, vocab_size = from_json(meta["tokenizer"]), meta["vocab_size"]
            dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]])
            n_tokens = tokenizer.n_tokens
            if type(vocab_size) is not int or not 0 <= vocab_size - n_tokens <= MOST_PADDING:
                raise ValueError(f"vocab_size={vocab_size!r} of {n_tokens}")
            return tokenizer, vocab_size, dtype
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path} cannot be used ({error!r:.500}): prepare it again") from error
    if (path := folder / "meta.pkl").exists():
        symbols = symbols_of(path)
        return char_tokenizer(symbols), len(symbols), np.dtype("<u2")
    return tiktoken_tokenizer("gpt2"), GPT2_VOCAB_SIZE, np.dtype("<u2")
