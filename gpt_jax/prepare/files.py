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
from gpt_jax.integrity import FULL, made, replace_file
from gpt_jax.prepare.dataset import size_and_dtype
from gpt_jax.tokenizer import Tokenizer

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TEMPORARY = ".preparing-"
STATE = "state.json"  # beside the unfinished files: how far they go
STALE_SECONDS = 3600  # where no lock tells: a run that wrote nothing for so long was interrupted
SAVE_SECONDS = 10  # between two places that a killed run can be gone on with from


class Unfinished(UserError):  # noqa: N818
    """What stops a preparation that can go on when it is run again."""


@dataclass(frozen=True)
class Corpus:
    """What a set is made of; pieces are taken once, in order."""

    source: str  # for messages: where the text comes from
    tokenizer: Tokenizer
    pieces: Iterable[tuple[str, Sequence[int]]]  # ("train" or "val", token ids)


@dataclass(frozen=True)
class Stream:
    """What a large set is made of: a corpus that can be begun at places on the way."""

    source: str
    tokenizer: Tokenizer
    identity: str  # of all that the files follow from: a place is good for no other
    begin: Callable[[Any], Iterable[tuple[str, np.ndarray, Any]]]
    # from a place (None: the first) on: ("train" or "val", token ids, the place after them, as
    # JSON, or None where the work could not go on)
    summary: Callable[[int], list[str]]  # of so many tokens: lines to log at the end


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """Return the dtype of the token files: uint16, or uint32 for more ids than it has."""
    return np.dtype(size_and_dtype(tokenizer)[1]).newbyteorder("<")


def write(
    folder: Path, corpus: Corpus | Stream, log: Callable[[str], None], *, first_use: bool = False
) -> None:
    """Write a corpus into folder; UserError, and no file, where it is too small or disk fails.

    On first use this waits for another process that prepares the folder, and takes what it made.
    A Stream goes on from where an earlier run of the same identity was interrupted.
    """
    # on first use others may wait in the folder
    with disk(folder), made(folder, keep=first_use), _alone(folder, first_use, log) as locked:
        if first_use and (folder / "val.bin").exists():
            return
        identity = corpus.identity if isinstance(corpus, Stream) and locked else None
        unfinished = _sweep(folder, locked, identity)
        with _workplace(folder, unfinished, log) as temporary:
            meta = _write(temporary, corpus, identity)
            # A folder is a data set once it has val.bin, so the older one goes first and the
            # new one comes last; train.bin is away while meta.json changes. Wherever this
            # stops, no tokens meet another vocabulary.
            for name in ("val.bin", "train.bin"):
                (folder / name).unlink(missing_ok=True)
            _sync_names(folder)
            for name in ("meta.json", "train.bin", "val.bin"):
                os.replace(temporary / name, folder / name)
            _sync_names(folder)
    size, tokens = np.dtype(meta["dtype"]).itemsize, meta["tokens"]
    log(f"{folder}: from {corpus.source}")
    for split, count in tokens.items():
        log(f"  {split + '.bin':10} {count:,} tokens, {size * count:,} bytes")
    if isinstance(corpus, Stream):
        for line in corpus.summary(sum(tokens.values())):
            log(f"  {line}")
    log(f"  vocabulary {meta['vocab_size']:,}, {meta['tokenizer']['kind']} tokenizer")


@contextmanager
def _workplace(folder: Path, unfinished: Path | None, log: Callable[[str], None]) -> Iterator[Path]:
    """Give a folder for files on their way; it stays where a rerun can go on with what is in it."""
    place = unfinished or Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder))
    try:
        yield place
    except BaseException as error:
        again = isinstance(error, Unfinished) or not isinstance(error, UserError)
        if again and (place / STATE).exists():
            log(f"{folder}: the same command goes on with what is done")
        else:
            shutil.rmtree(place, ignore_errors=True)
        raise
    shutil.rmtree(place)


def _write(temporary: Path, corpus: Corpus | Stream, identity: str | None) -> dict[str, Any]:
    dtype, state = dtype_of(corpus.tokenizer), _state(temporary)
    if isinstance(corpus, Stream):
        pieces = corpus.begin(state.get("place"))
    else:
        pieces = ((split, np.array(ids, dtype), None) for split, ids in corpus.pieces)
    sizes, saved = state.get("sizes", {"train.bin": 0, "val.bin": 0}), time.monotonic()
    with open(temporary / "train.bin", "ab") as train, open(temporary / "val.bin", "ab") as val:
        both = {"train.bin": train, "val.bin": val}
        for name, file in both.items():
            file.truncate(sizes[name])
        for split, ids, place in pieces:
            both[f"{split}.bin"].write(ids.tobytes())
            sizes[f"{split}.bin"] += ids.nbytes
            due = time.monotonic() - saved >= SAVE_SECONDS
            if due and identity is not None and place is not None:
                for file in both.values():
                    file.flush()
                    os.fsync(file.fileno())
                state = {"identity": identity, "place": place, "sizes": sizes}
                replace_file(temporary / STATE, json.dumps(state))
                saved = time.monotonic()
    counts = {name.removesuffix(".bin"): size // dtype.itemsize for name, size in sizes.items()}
    for split, count in counts.items():
        if count < 2:  # one to read, one to predict
            share = ", or set another --val_share" if isinstance(corpus, Stream) else ""
            raise UserError(
                f"{corpus.source} gives the {split} split {count} tokens, and at least 2 are "
                f"needed: give more text{share}"
            )
    meta = {
        "vocab_size": size_and_dtype(corpus.tokenizer)[0],
        "dtype": dtype.name,
        "tokenizer": corpus.tokenizer.to_json(),
        "tokens": counts,
        "source": corpus.source,
    }
    (temporary / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", "utf-8")
    for name in ("meta.json", "train.bin", "val.bin"):
        sync(temporary / name)
    return meta


def _state(temporary: Path) -> dict[str, Any]:
    """Return what is saved of an interrupted run; {} where there is nothing to go on with."""
    try:
        state = json.loads((temporary / STATE).read_bytes())
        for name, size in state["sizes"].items():
            if (temporary / name).stat().st_size < size:
                return {}
        return state
    except (OSError, ValueError, KeyError):
        return {}


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


def _sweep(folder: Path, locked: bool, identity: str | None) -> Path | None:
    """Remove what an interrupted run left, however it ended; a run at work is left alone.

    Whoever holds the lock is the only one at work; with no locks, the time of the last write tells.
    Returns what a run of this identity left to go on with.
    """
    unfinished = None
    for left in folder.glob(f"{TEMPORARY}*"):
        same = identity is not None and _state(left).get("identity") == identity
        if same and unfinished is None:
            unfinished = left
            continue
        with suppress(OSError):  # another run may be sweeping too
            newest = max(path.stat().st_mtime for path in (left, *left.iterdir()))
            if locked or time.time() - newest > STALE_SECONDS:
                shutil.rmtree(left)
    return unfinished


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses into one line."""
    try:
        yield
    except OSError as error:
        room = "make room there, or " * (error.errno in FULL)
        raise UserError(
            f"cannot write in {folder}: {error.strerror or error}; {room}"
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
