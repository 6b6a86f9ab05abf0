"""Token files -> batches, as a pure function of (data, seed, step).

The tokens of a split are numbered through, from its first file to its last. A window is
``block_size`` of them, all of one file, and is named by the number of its first.

An epoch cuts the files into windows and visits each once, in an order that a small cipher gives:
any step's windows follow from its number alone, so a run resumes where it was, on any number of
devices. Each epoch shifts the cuts and shuffles anew.

In a mixture each data set walks epochs of its own, and which set a sample is drawn from follows
from the sample's number too.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import jax
import numpy as np
from jax import Array
from jax.sharding import Sharding

from gpt_jax.integrity.token_file import TokenFile

READ_AHEAD = 2  # batches made and sent to the device before they are asked for


@dataclass(frozen=True)
class Split:
    """What is read as "train" or "val": the files of a data set, or of each set in a mixture."""

    files: tuple[TokenFile, ...]
    vocab_size: int
    block_size: int
    turns: tuple[int, ...] = (0,)  # sample s is drawn from the set turns[s % len(turns)]

    @cached_property
    def lengths(self) -> np.ndarray:
        """The tokens of each file, int64 (files,)."""
        return np.array([len(file.tokens) for file in self.files])

    @cached_property
    def sets(self) -> list[tuple[np.ndarray, np.ndarray, int]]:
        """Of each set: its turns, bool (turns,); its files' lengths; the number of its token 0."""
        of, turns = np.array([file.part for file in self.files]), np.array(self.turns)
        return [
            (turns == i, self.lengths[of == i], int(self.lengths[of < i].sum()))
            for i in range(of.max() + 1)
        ]

    def windows(self, starts: np.ndarray, shift: int = 0) -> np.ndarray:
        """Return the tokens from each start on, int32 ``starts.shape + (block_size,)``."""
        indices, places = locate(starts.ravel() + shift, self.lengths)
        windows = np.empty((starts.size, self.block_size), np.uint32)
        for index in set(indices.tolist()):
            self.files[index].refuse_if_changed()
        for window, index, place in zip(windows, indices, places, strict=True):
            window[:] = self.files[index].tokens[place : place + self.block_size]
        if windows.max(initial=0) >= self.vocab_size:
            row = int(np.argmax(windows.max(1) >= self.vocab_size))
            self.files[indices[row]].refuse(places[row], windows[row], self.vocab_size)
        return windows.view(np.int32).reshape(*starts.shape, self.block_size)


def locate(numbers: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the file of each item and its place there, int64 of the shape of ``numbers``.

    The items, ``lengths`` of each file, int64 (files,), are numbered through.
    """
    ends = np.cumsum(lengths)
    files = np.searchsorted(ends, numbers, side="right")
    return files, numbers - (ends - lengths)[files]


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


def window_starts(lengths: np.ndarray, T: int, seed: int, samples: np.ndarray) -> np.ndarray:
    """Return where the windows of T tokens start that samples are, int64 of the samples' shape.

    ``lengths`` are the tokens of each file, int64 (files,); ``samples`` are int64 indices into the
    endless stream of epochs. Within an epoch no two windows overlap but by the one token that is
    input to one and target to the other.
    """
    windows = np.maximum(1, (lengths - T) // T)  # of each file
    n = int(windows.sum())
    epoch, index = np.divmod(samples.astype(np.uint64), np.uint64(n))
    key = mix(mix(np.full_like(epoch, seed)) + epoch)
    file, window = locate(permute(index, n, key).view(np.int64), windows)
    room = (lengths - windows * T).view(np.uint64)[file]
    offset = mix(key + file.view(np.uint64)) % room  # so that each file's tail is read too
    return (np.cumsum(lengths) - lengths)[file] + window * T + offset.view(np.int64)


def batch_starts(split: Split, shape: tuple[int, int], seed: int, step: int) -> np.ndarray:
    """Return the starts, int64 (A, B), of update ``step``'s windows; the same on any mesh."""
    samples = np.arange(shape[0] * shape[1], dtype=np.int64) + step * shape[0] * shape[1]
    cycle, turn = np.divmod(samples, len(split.turns))
    starts = np.empty_like(samples)
    for turns, lengths, first in split.sets:
        before = np.cumsum(turns) - turns  # how many of a cycle's turns it has had
        own = (cycle * turns.sum() + before[turn])[turns[turn]]  # counted in the set's samples
        starts[turns[turn]] = first + window_starts(lengths, split.block_size, seed, own)
    return starts.reshape(shape)


def evaluation_starts(split: Split, at_most: int | None = None) -> np.ndarray:
    """Return the starts, int64 (n,), of the split's windows in order, or of ``at_most`` of them.

    They tile each file from its first token; fewer than all are spread evenly over the files. A
    tail that does not fill a window is left out. Each set of a mixture has as many of them as of
    the first n samples in training, some more than once where it is too small.
    """
    n = int(((split.lengths - 1) // split.block_size).sum())
    n = n if at_most is None else min(n, at_most)
    starts = []
    for turns, lengths, first in split.sets:
        windows = (lengths - 1) // split.block_size
        share = n // len(turns) * turns.sum() + turns[: n % len(turns)].sum()
        file, window = locate(np.arange(share) * windows.sum() // max(1, share), windows)
        starts.append(first + (np.cumsum(lengths) - lengths)[file] + window * split.block_size)
    return np.concatenate(starts)


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
