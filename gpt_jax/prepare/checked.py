"""A token file is looked at before it is trained on: once, for the answer is remembered.

Beside the files lies checked.json with the largest id of each. It holds for a file of the same
size, time of last change and digest of some blocks; whatever else it says, the file is read again.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from gpt_jax.data import Split, open_split
from gpt_jax.errors import UserError
from gpt_jax.prepare import command_for
from gpt_jax.prepare.dataset import for_dataset
from gpt_jax.tokenizer import Tokenizer

WHOLE = 2**34  # tokens; of a larger file only samples are checked here, the rest as it is read
SAMPLES = 256  # of a chunk each
CHUNK = 2**20  # tokens in memory at a time
BLOCKS, BLOCK_BYTES = 64, 4096  # what the digest is of
REMEMBERED = "checked.json"
REMEMBERED_BYTES = 2**16  # a larger file is not ours
ENTRY = {"size": int, "mtime_ns": int, "dtype": str, "digest": str, "largest": int}
# the headers that github.com/karpathy/llm.c's dev/data/data_common.py writes
HEADER_BYTES = 1024
SHARDS = {
    20240520: f"take that off with `tail -c +{HEADER_BYTES + 1} SHARD`",
    20240801: "its ids are Llama 3's, prepare the text it was made of",
}


def open_dataset(folder: Path, block_size: int) -> tuple[Tokenizer, int, dict[str, Split]]:
    """Return tokenizer, vocab_size and the splits "train" and "val" of a data set's folder.

    Raises UserError as open_checked.
    """
    tokenizer, vocab_size, dtype = for_dataset(folder)
    splits = {
        name: open_checked(folder, name, vocab_size, dtype, block_size) for name in ("train", "val")
    }
    return tokenizer, vocab_size, splits


def open_checked(
    folder: Path, name: str, vocab_size: int, dtype: DTypeLike, block_size: int
) -> Split:
    """Return the split ``name`` ("train" or "val") of a data set's folder, its ids checked.

    dtype is the file's, "uint16" or "uint32". Raises UserError for a file that is missing, empty,
    cut off within a token, no token file, shorter than a window, or that holds an id >=
    vocab_size; in a file of more than WHOLE tokens some such ids are found only when read.
    """
    path = folder / f"{name}.bin"
    again = f"prepare the data set with `{command_for(folder.absolute().name)}`"
    try:
        _refuse_no_tokens(path, np.dtype(dtype), again)
        split = open_split(folder, name, vocab_size, dtype, block_size)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} is not there: {again}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason}): {again}") from None
    if len(split.tokens) < block_size + 1:
        raise UserError(
            f"{path} has {len(split.tokens)} tokens, fewer than block_size + 1 = "
            f"{block_size + 1}: give it more text or lower --block_size"
        )
    facts = _facts(split)
    remembered = _remembered(folder).get(path.name, {})
    largest = remembered.get("largest", -1)
    if remembered != {**facts, "largest": largest} or not 0 <= largest < vocab_size:
        _remember(folder, path.name, {**facts, "largest": _scan(split)})
    return split


def _refuse_no_tokens(path: Path, dtype: np.dtype, again: str) -> None:
    size = path.stat().st_size
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise UserError(f"{path} is {kind}, not a file of token ids: remove it and {again}")
    if size == 0:
        raise UserError(f"{path} is empty: {again}")
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), "<i4")
    magic = int(header[0])
    if magic in SHARDS and not header[3:].any():  # of 256 words llm.c uses three
        raise UserError(
            f"{path} is an llm.c shard with a header (magic {magic}), which this loader does not "
            f"read: {SHARDS[magic]}"
        )
    if size % dtype.itemsize:
        raise UserError(
            f"{path}: {size:,} bytes is not a whole number of {dtype.name} tokens, it is cut off "
            f"or of another dtype than its meta.json says: {again}"
        )


def _facts(split: Split) -> dict[str, Any]:
    """Return what tells this file from another, its size and time as they were when mapped."""
    data = split.tokens.view(np.uint8)
    last = max(0, len(data) - BLOCK_BYTES)
    digest = hashlib.blake2b(digest_size=16)
    for start in dict.fromkeys(i * last // (BLOCKS - 1) for i in range(BLOCKS)):
        split.refuse_if_changed()
        digest.update(data[start : start + BLOCK_BYTES].tobytes())
    size, mtime_ns, _ = split.opened
    dtype = split.tokens.dtype.name
    return {"size": size, "mtime_ns": mtime_ns, "dtype": dtype, "digest": digest.hexdigest()}


def _starts(n_tokens: int) -> Iterator[int]:
    """Yield where the chunks to be checked start: all, or the first, the last and some between."""
    if n_tokens <= WHOLE:
        yield from range(0, n_tokens, CHUNK)
    else:
        yield from (i * (n_tokens - CHUNK) // (SAMPLES - 1) for i in range(SAMPLES))


def _scan(split: Split) -> int:
    """Return the largest id that the chunks hold; UserError for the first one out of range."""
    largest = 0
    for start in _starts(len(split.tokens)):
        split.refuse_if_changed()
        chunk = split.tokens[start : start + CHUNK]
        largest = max(largest, int(chunk.max()))
        if largest >= split.vocab_size:
            split.refuse(np.array([start]), np.asarray(chunk)[None], 0)
    return largest


def _remembered(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what checked.json says in the form that it was written in; others may have written."""
    path = folder / REMEMBERED
    try:
        if not path.is_file() or path.stat().st_size > REMEMBERED_BYTES:
            return {}
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return {
        name: entry
        for name, entry in (found.items() if isinstance(found, dict) else ())
        if isinstance(entry, dict) and {key: type(entry[key]) for key in entry} == ENTRY
    }


def _remember(folder: Path, name: str, entry: dict[str, Any]) -> None:
    """Write checked.json anew, or not at all: where it cannot be, the next start reads again."""
    text = json.dumps({**_remembered(folder), name: entry}, indent=1) + "\n"
    temporary = folder / f".{REMEMBERED}-{secrets.token_hex(8)}"  # other hosts may write theirs
    try:
        with suppress(OSError):
            temporary.write_text(text, "utf-8")
            os.replace(temporary, folder / REMEMBERED)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
