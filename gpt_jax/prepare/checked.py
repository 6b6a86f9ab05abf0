"""A token file is looked at before it is trained on: once, for the answer is remembered.

Beside the files lies checked.json with the largest id of each. It holds for a file of the same
size, time of last change and digest of some blocks; whatever else it says, the file is read again.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from gpt_jax.data import Split
from gpt_jax.errors import UserError
from gpt_jax.integrity.token_file import TokenFile, open_file
from gpt_jax.prepare import command_for
from gpt_jax.prepare.dataset import for_dataset
from gpt_jax.prepare.mixture import sets_of, turns
from gpt_jax.prepare.shards import files_of, layout
from gpt_jax.tokenizer import Tokenizer

WHOLE = 2**34  # tokens; of a larger split only samples are checked here, the rest as it is read
SAMPLES = 256  # of a chunk each, over a split's files together
CHUNK = 2**20  # tokens in memory at a time
BLOCKS, BLOCK_BYTES = 64, 4096  # what the digests are of, over a split's files together
REMEMBERED = "checked.json"
REMEMBERED_BYTES = 2**22  # a larger file is not ours: this is enough for 20,000 shards
ENTRY = {"size": int, "mtime_ns": int, "dtype": str, "digest": str, "largest": int}


def open_dataset(
    data_dir: str, dataset: str, block_size: int, log: Callable[[str], None] = lambda _: None
) -> tuple[Tokenizer, int, dict[str, Split]]:
    """Return tokenizer, vocab_size and the splits "train" and "val" of what --dataset names.

    Raises UserError as open_checked, and where the sets of a mixture differ in their ids.
    """
    shares = sets_of(dataset)
    found = {name: for_dataset(Path(data_dir, name)) for name in shares}
    (first, (tokenizer, vocab_size, _)), *others = found.items()
    for name, (its, size, _) in others:
        if (its.spec, size) != (tokenizer.spec, vocab_size):
            raise UserError(
                f"dataset={dataset!r:.100}: {first} has a {tokenizer.spec['kind']} tokenizer of "
                f"{tokenizer.n_tokens:,} ids and vocab_size={vocab_size}, {name} a "
                f"{its.spec['kind']} tokenizer of {its.n_tokens:,} and vocab_size={size}, or their "
                "symbols differ: prepare both with one tokenizer"
            )
    given = [share for share in shares.values() if share]
    cycle = turns(given, dataset) if given else (0,)
    splits = {}
    for split in ("train", "val"):
        files = []
        for part, (name, (*_, dtype)) in enumerate(found.items()):
            its = open_checked(Path(data_dir, name), split, vocab_size, dtype, block_size)
            files += [replace(file, part=part if given else 0) for file in its.files]
            if len(found) > 1 or len(its.files) > 1:
                share = f", {cycle.count(part) / len(cycle):.2%} of the samples" if given else ""
                tokens, n = int(its.lengths.sum()), len(its.files)
                log(f"{split}: {name}, {tokens:,} tokens in {n} file{'s' * (n > 1)}{share}")
        splits[split] = Split(tuple(files), vocab_size, block_size, cycle)
    return tokenizer, vocab_size, splits


def sizes(splits: dict[str, Split]) -> dict[str, int]:
    """Return what the files of these splits are known by: how many they are, and their tokens."""
    counts = {f"files of {name}": len(split.files) for name, split in splits.items()}
    files = [file for split in splits.values() for file in split.files]
    return counts | {f"tokens in {file.path}": len(file.tokens) for file in files}


def open_checked(
    folder: Path, name: str, vocab_size: int, dtype: DTypeLike, block_size: int
) -> Split:
    """Return the split ``name`` ("train" or "val") of a data set's folder, its ids checked.

    dtype is the files', "uint16" or "uint32". Raises UserError for a file that is missing, empty,
    cut off, no token file, not of the others' kind, shorter than a window, or that holds an id >=
    vocab_size; in a split of more than WHOLE tokens some such ids are found only when read.
    """
    again = f"prepare the data set with `{command_for(folder.absolute().name)}`"
    files, kinds = [], {}
    path = folder
    try:
        for path in files_of(folder, name):
            its = layout(path, np.dtype(dtype), again)
            kinds.setdefault(its.kind, path)
            files.append(open_file(path, dtype, its.header_bytes))
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} is not there: {again}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason}): {again}") from None
    if len(kinds) > 1:
        (kind, path), (other, another), *_ = kinds.items()
        raise UserError(
            f"{path} ({kind}) and {another} ({other}) are of two kinds: keep those of one kind in "
            "the folder"
        )
    for file in files:
        if len(file.tokens) < block_size + 1:
            raise UserError(
                f"{file.path} has {len(file.tokens)} tokens, fewer than block_size + 1 = "
                f"{block_size + 1}: give it more text or lower --block_size"
            )
    split = Split(tuple(files), vocab_size, block_size)
    remembered = _remembered(folder)
    news = {}
    for file in files:
        facts = _facts(file, len(files))
        entry = remembered.get(file.path.name, {})
        largest = entry.get("largest", -1)
        if entry != {**facts, "largest": largest} or not 0 <= largest < vocab_size:
            news[file.path.name] = {**facts, "largest": _scan(file, split)}
    if news:
        _remember(folder, news)
    return split


def _facts(file: TokenFile, of: int) -> dict[str, Any]:
    """Return what tells this file from another, its size and time as they were when mapped.

    It is one ``of`` so many: the more, the fewer blocks of each are read, but its ends always.
    """
    data = file.tokens.view(np.uint8)
    last = max(0, len(data) - BLOCK_BYTES)
    blocks = max(2, BLOCKS // of)
    digest = hashlib.blake2b(digest_size=16)
    for start in dict.fromkeys(i * last // (blocks - 1) for i in range(blocks)):
        file.refuse_if_changed()
        digest.update(data[start : start + BLOCK_BYTES].tobytes())
    size, mtime_ns, _ = file.opened
    dtype = file.tokens.dtype.name
    return {"size": size, "mtime_ns": mtime_ns, "dtype": dtype, "digest": digest.hexdigest()}


def _starts(n_tokens: int, share: float = 1.0) -> Iterator[int]:
    """Yield where the chunks of a file to be checked start: all, or both ends and some between.

    share is the file's of all tokens of its split.
    """
    samples = max(2, int(SAMPLES * share))
    if n_tokens <= WHOLE * share or n_tokens <= samples * CHUNK:
        yield from range(0, n_tokens, CHUNK)
    else:
        yield from (i * (n_tokens - CHUNK) // (samples - 1) for i in range(samples))


def _scan(file: TokenFile, split: Split) -> int:
    """Return the largest id that the chunks hold; UserError for the first one out of range."""
    largest = 0
    for start in _starts(len(file.tokens), len(file.tokens) / int(split.lengths.sum())):
        file.refuse_if_changed()
        chunk = file.tokens[start : start + CHUNK]
        largest = max(largest, int(chunk.max()))
        if largest >= split.vocab_size:
            file.refuse(start, chunk, split.vocab_size)
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


def _remember(folder: Path, news: dict[str, dict[str, Any]]) -> None:
    """Write checked.json anew, or not at all: where it cannot be, the next start reads again."""
    text = json.dumps({**_remembered(folder), **news}, indent=1) + "\n"
    temporary = folder / f".{REMEMBERED}-{secrets.token_hex(8)}"  # other hosts may write theirs
    try:
        with suppress(OSError):
            temporary.write_text(text, "utf-8")
            os.replace(temporary, folder / REMEMBERED)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
