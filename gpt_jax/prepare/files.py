"""A corpus becomes train.bin, val.bin and meta.json, all of them or none."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax.errors import UserError
from gpt_jax.prepare.dataset import GPT2_VOCAB_SIZE
from gpt_jax.tokenizer import Tokenizer

TEMPORARY = ".preparing-"
MAX_TOKENS = 2**16 - 1  # ids of uint16
STALE_SECONDS = 3600  # a run that has written nothing for so long was interrupted


@dataclass(frozen=True)
class Corpus:
    """What a set is made of; pieces are taken once, in order."""

    source: str  # for messages: where the text comes from
    tokenizer: Tokenizer
    pieces: Iterable[tuple[str, Sequence[int]]]  # ("train" or "val", token ids)


def write(folder: Path, corpus: Corpus, log: Callable[[str], None]) -> None:
    """Write a corpus into folder; UserError, and no file, where it is too small or disk fails."""
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=folder) as temporary:
            meta = _write(Path(temporary), corpus)
            # A folder is a data set once it has val.bin, so the older one goes first and the new
            # one comes last: wherever this stops, new tokens never meet an old vocabulary.
            (folder / "val.bin").unlink(missing_ok=True)
            for file in ("meta.json", "train.bin", "val.bin"):
                os.replace(Path(temporary, file), folder / file)
    log(f"{folder}: from {corpus.source}")
    for split, count in meta["tokens"].items():
        log(f"  {split + '.bin':10} {count:,} tokens, {2 * count:,} bytes")
    log(f"  vocabulary {meta['vocab_size']:,}, {meta['tokenizer']['kind']} tokenizer")


def _write(temporary: Path, corpus: Corpus) -> dict[str, Any]:
    counts = {"train": 0, "val": 0}
    with open(temporary / "train.bin", "wb") as train, open(temporary / "val.bin", "wb") as val:
        for split, ids in corpus.pieces:
            (train if split == "train" else val).write(np.array(ids, "<u2").tobytes())
            counts[split] += len(ids)
    for split, count in counts.items():
        if count < 2:  # one to read, one to predict
            raise UserError(
                f"{corpus.source} gives the {split} split {count} tokens, and at least 2 are "
                "needed: give more text"
            )
    spec, n_tokens = corpus.tokenizer.to_json(), corpus.tokenizer.n_tokens
    meta = {
        "vocab_size": GPT2_VOCAB_SIZE if spec.get("name") == "gpt2" else n_tokens,
        "dtype": "uint16",
        "tokenizer": spec,
        "tokens": counts,
        "source": corpus.source,
    }
    (temporary / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", "utf-8")
    return meta


def _sweep(folder: Path) -> None:
    """Remove what an interrupted run left, however it ended; a run at work is left alone."""
    for left in folder.glob(f"{TEMPORARY}*"):
        with suppress(OSError):  # another run may be sweeping too
            newest = max(path.stat().st_mtime for path in (left, *left.iterdir()))
            if time.time() - newest > STALE_SECONDS:
                shutil.rmtree(left)


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write in {folder}: {error.strerror or error}; make room there, or "
            "choose another place with --data_dir="
        ) from error


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, its line ends as newlines; UserError with the bad byte."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 at byte {error.start} (0x{error.object[error.start]:02X}): "
            "convert it to UTF-8"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def cut(n_characters: int) -> int:
    """Return how many characters go to train, as nanoGPT splits: 90 %, rounded down."""
    return int(n_characters * 0.9)
