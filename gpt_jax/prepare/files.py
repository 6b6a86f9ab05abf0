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
from gpt_jax.prepare.dataset import size_and_dtype
from gpt_jax.tokenizer import Tokenizer

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TEMPORARY = ".preparing-"
STALE_SECONDS = 3600  # where no lock tells: a run that wrote nothing for so long was interrupted


@dataclass(frozen=True)
class Corpus:
    """What a set is made of; pieces are taken once, in order."""

    source: str  # for messages: where the text comes from
    tokenizer: Tokenizer
    pieces: Iterable[tuple[str, Sequence[int]]]  # ("train" or "val", token ids)


def write(
    folder: Path, corpus: Corpus, log: Callable[[str], None], *, first_use: bool = False
) -> None:
    """Write a corpus into folder; UserError, and no file, where it is too small or disk fails.

    On first use this waits for another process that prepares the folder, and takes what it made.
    """
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder, first_use, log) as locked:
            if first_use and (folder / "val.bin").exists():
                return
            _sweep(folder, locked)
            with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=folder) as temporary:
                meta = _write(Path(temporary), corpus)
                # A folder is a data set once it has val.bin, so the older one goes first and the
                # new one comes last; train.bin is away while meta.json changes. Wherever this
                # stops, no tokens meet another vocabulary.
                for name in ("val.bin", "train.bin"):
                    (folder / name).unlink(missing_ok=True)
                _sync_names(folder)
                for name in ("meta.json", "train.bin", "val.bin"):
                    os.replace(Path(temporary, name), folder / name)
                _sync_names(folder)
    log(f"{folder}: from {corpus.source}")
    for split, count in meta["tokens"].items():
        n_bytes = count * np.dtype(meta["dtype"]).itemsize
        log(f"  {split + '.bin':10} {count:,} tokens, {n_bytes:,} bytes")
    log(f"  vocabulary {meta['vocab_size']:,}, {meta['tokenizer']['kind']} tokenizer")


def _write(temporary: Path, corpus: Corpus) -> dict[str, Any]:
    counts = {"train": 0, "val": 0}
    vocab_size, name = size_and_dtype(corpus.tokenizer)
    dtype = np.dtype(name).newbyteorder("<")
    with open(temporary / "train.bin", "wb") as train, open(temporary / "val.bin", "wb") as val:
        for split, ids in corpus.pieces:
            (train if split == "train" else val).write(np.array(ids, dtype).tobytes())
            counts[split] += len(ids)
    for split, count in counts.items():
        if count < 2:  # one to read, one to predict
            raise UserError(
                f"{corpus.source} gives the {split} split {count} tokens, and at least 2 are "
                "needed: give more text"
            )
    meta = {
        "vocab_size": vocab_size,
        "dtype": name,
        "tokenizer": corpus.tokenizer.to_json(),
        "tokens": counts,
        "source": corpus.source,
    }
    (temporary / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", "utf-8")
    for name in ("meta.json", "train.bin", "val.bin"):
        sync(temporary / name)
    return meta


def sync(path: Path) -> None:
    """Wait until a file is on the disk, so that a power cut cannot leave its new name empty."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _sync_names(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the file system can tell."""
    with suppress(OSError), _open_folder(folder) as descriptor:
        os.fsync(descriptor)


@contextmanager
def _open_folder(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _alone(folder: Path, wait: bool, log: Callable[[str], None]) -> Iterator[bool]:
    """Hold the folder's lock, which ends with its process however that ends.

    Yields False where the file system has no locks (as NFS has none for folders).
    """
    if fcntl is None:
        yield False
        return
    with _open_folder(folder) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError:
            if not wait:
                raise UserError(
                    f"{folder} is being prepared by another process: wait until it ends, or "
                    "stop it, and run again"
                ) from None
            log(f"waiting for another process that prepares {folder}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False
        yield locked


def _sweep(folder: Path, locked: bool) -> None:
    """Remove what an interrupted run left, however it ended; a run at work is left alone.

    Whoever holds the lock is the only one at work; with no locks, the time of the last write tells.
    """
    for left in folder.glob(f"{TEMPORARY}*"):
        with suppress(OSError):  # another run may be sweeping too
            newest = max(path.stat().st_mtime for path in (left, *left.iterdir()))
            if locked or time.time() - newest > STALE_SECONDS:
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
