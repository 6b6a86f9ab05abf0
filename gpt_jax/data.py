"""Token files -> batches, as a pure function of (data, seed, step).

An epoch cuts the file into windows of ``block_size`` tokens and visits each once, in an order that
a small cipher gives: any step's windows follow from its number alone, so a run resumes where it
was, on any number of devices. Each epoch shifts the cuts and shuffles anew.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax import Array
from jax.sharding import Sharding
from numpy.typing import DTypeLike

from gpt_jax.errors import UserError

READ_AHEAD = 2  # batches made and sent to the device before they are asked for


@dataclass(frozen=True)
class Split:
    """A headerless little-endian file of token ids, mapped into memory."""

    path: Path
    tokens: np.ndarray  # uint16 or uint32, (n,)
    vocab_size: int
    block_size: int
    opened: tuple[int, ...] = ()  # stamp of the file that was mapped; (): tokens of no file

    def windows(self, starts: np.ndarray, shift: int = 0) -> np.ndarray:
        """Return the tokens from each start on, int32 ``starts.shape + (block_size,)``."""
        self.refuse_if_changed()
        windows = self.tokens[starts[..., None] + np.arange(shift, self.block_size + shift)]
        if windows.max(initial=0) >= self.vocab_size:
            self.refuse(starts.ravel(), windows.reshape(-1, self.block_size), shift)
        return windows.astype(np.int32)

    def refuse_if_changed(self) -> None:
        """Raise UserError where the file is not the one that was opened, or is gone.

        To read past the end of a mapped file that was cut short would kill the process by SIGBUS.
        """
        if self.opened and stamp(self.path) != self.opened:
            raise UserError(
                f"{self.path} was replaced, written to or removed while in use (it had "
                f"{self.opened[0]:,} bytes): put it back or prepare the data set again, and rerun"
            )

    def refuse(self, starts: np.ndarray, windows: np.ndarray, shift: int) -> None:
        """Raise UserError for the first id in ``windows`` that the vocabulary does not have."""
        row, column = np.argwhere(windows >= self.vocab_size)[0]
        raise UserError(
            f"{self.path}: token {starts[row] + shift + column} is {windows[row, column]}, but "
            f"vocab_size={self.vocab_size}: the file and its meta.json do not belong together, "
            "prepare the data set again"
        )


def stamp(path: Path) -> tuple[int, ...]:
    """Return a file's size in bytes, time of its last change in ns, and inode; () if it is gone."""
    with suppress(OSError):
        found = path.stat()
        return found.st_size, found.st_mtime_ns, found.st_ino
    return ()


def open_split(
    folder: Path, name: str, vocab_size: int, dtype: DTypeLike, block_size: int
) -> Split:
    """Return the split ``name`` ("train" or "val") of a data set's folder.

    dtype is the file's, "uint16" or "uint32". The file is taken as it is, OSError or ValueError if
    it cannot be mapped: ``prepare.checked.open_checked`` says what is wrong with one.
    """
    path = folder / f"{name}.bin"
    opened = stamp(path)  # before it is mapped: a file that comes in between is noticed
    tokens = np.memmap(path, np.dtype(dtype).newbyteorder("<"), "r")
    return Split(path, tokens, vocab_size, block_size, opened)


def mix(x: np.ndarray) -> np.ndarray:
    """Return a well-mixed uint64 for each uint64 (the finaliser of splitmix64, Steele 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """Return where a shuffle of [0, n) puts each index; each key is a shuffle of its own.

    index and key are uint64 of one shape. A Feistel network of four rounds (Luby & Rackoff 1988)
    over the next power of four; what falls outside [0, n) goes round again until it is inside.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    result = index.copy()
    outside = np.ones(index.shape, bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & low
        for turn in range(1, 5):
            left, right = right, left ^ (mix(key[outside] + np.uint64(turn) ^ mix(right)) & low)
        result[outside] = (left << half) | right
        outside[outside] = result[outside] >= n
    return result


def window_starts(n_tokens: int, block_size: int, seed: int, samples: np.ndarray) -> np.ndarray:
    """Return where the windows of the given samples start, int64 of their shape.

    ``samples`` are int64 indices into the endless stream of epochs. Within an epoch no two windows
    overlap but by the one token that is input to one and target to the other.
    """
    n = max(1, (n_tokens - block_size) // block_size)
    epoch, index = np.divmod(samples.astype(np.uint64), np.uint64(n))
    key = mix(mix(np.full_like(epoch, seed)) + epoch)
    offset = mix(key) % np.uint64(n_tokens - n * block_size)  # so that the tail is read too
    return (permute(index, n, key) * np.uint64(block_size) + offset).astype(np.int64)


def batch_starts(split: Split, shape: tuple[int, int], seed: int, step: int) -> np.ndarray:
    """Return the starts, int64 (A, B), of update ``step``'s windows; the same on any mesh."""
    samples = np.arange(shape[0] * shape[1], dtype=np.int64) + step * shape[0] * shape[1]
    return window_starts(len(split.tokens), split.block_size, seed, samples).reshape(shape)


def evaluation_starts(split: Split, at_most: int | None = None) -> np.ndarray:
    """Return the starts, int64 (n,), of the split's windows in order, or of ``at_most`` of them.

    They tile the split from its first token; fewer than all are spread evenly over it. The tail
    that does not fill a window is left out.
    """
    n = (len(split.tokens) - 1) // split.block_size
    picked = np.arange(n) if at_most is None or n <= at_most else np.arange(at_most) * n // at_most
    return picked * split.block_size


def place(split: Split, starts: np.ndarray, sharding: Sharding) -> tuple[Array, Array]:
    """Return tokens and targets, int32 ``starts.shape + (block_size,)``, laid out by ``sharding``.

    Each host reads the rows that its own devices hold.
    """
    shape = (*starts.shape, split.block_size)

    def array(shift: int) -> Array:
        def read(index):
            return split.windows(starts[index[:-1]], shift)

        return jax.make_array_from_callback(shape, sharding, read)

    return array(0), array(1)


def batches(
    split: Split, shape: tuple[int, int], seed: int, first_step: int, sharding: Sharding
) -> Iterator[tuple[Array, Array]]:
    """Yield (tokens, targets), each int32 (A, B, T), from ``first_step`` on, made ahead of use."""

    def make(step: int) -> tuple[Array, Array]:
        return place(split, batch_starts(split, shape, seed, step), sharding)

    with ThreadPoolExecutor(1, "batches") as reader:
        ahead = deque(reader.submit(make, first_step + i) for i in range(READ_AHEAD))
        step = first_step + READ_AHEAD
        while True:
            yield ahead.popleft().result()
            ahead.append(reader.submit(make, step))
            step += 1
