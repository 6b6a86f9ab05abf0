"""Documents -> token ids, on all cores, in order, in bounded memory, from any place on.

One thread reads, cuts and writes; the others encode, for tiktoken lets them run. On two cores that
was as fast as processes, which would each hold the vocabulary and be sent every text.
"""

import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from gpt_jax.errors import UserError
from gpt_jax.prepare.files import dtype_of
from gpt_jax.prepare.progress import Progress
from gpt_jax.prepare.sources import LONGEST, Source
from gpt_jax.tokenizer import Tokenizer

SEED = 2357  # nanoGPT's, of openwebtext's split
BLOCK = 1 << 19  # characters encoded by one thread at a time
WHOLE = 1 << 22  # characters of a document for a tokenizer that may not be given parts
AHEAD = 1 << 25  # characters read and not yet written, but for the block that must come


def is_val(number: int, share: float) -> bool:
    """Tell whether the document of this number is for validation, as a share of all are."""
    digest = hashlib.sha256(f"{SEED} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def arrays_of(tokenizer: Tokenizer) -> Callable[[str], np.ndarray]:
    """Return text -> ids as an array: what encode_ordinary gives, with no list made of it."""
    spec = tokenizer.to_json()
    if spec["kind"] == "byte":
        return lambda text: np.frombuffer(text.encode(), np.uint8)
    if spec.keys() == {"kind", "name"}:  # tiktoken's, not of merges of its own
        import tiktoken

        encoding = tiktoken.get_encoding(spec["name"])
        return lambda text: encoding.encode_to_numpy(text, disallowed_special=())
    if spec["kind"] == "char":
        points = [ord(symbol) for symbol in spec["symbols"]]
        table = np.full(max(points) + 2, -1, np.int32)  # the last for all that is beyond
        table[points] = np.arange(len(points))

        def encode(text: str) -> np.ndarray:
            found = np.frombuffer(text.encode("utf-32-le"), "<u4")
            ids = table[np.minimum(found, len(table) - 1)]
            return ids if ids.min(initial=0) >= 0 else np.array(tokenizer.encode_ordinary(text))

        return encode
    return lambda text: np.array(tokenizer.encode_ordinary(text), np.uint32)


class Piece(NamedTuple):
    """A part of a document, for one split."""

    split: str
    text: str
    ends: bool


@dataclass
class Place:
    """How far the reader has got: all that is needed to go on from there."""

    source: int = 0
    at: Any = None  # where the source's next document begins
    given: int = 0  # characters of that document already given
    documents: int = 0
    left: int | None = None  # characters still to go to train, where the split is by characters


@dataclass
class Block:
    """Pieces that are encoded together, and the place after them."""

    pieces: list[Piece] = field(default_factory=list)
    size: int = 0
    place: dict[str, Any] = field(default_factory=dict)
    done: float = 0.0


def parts(
    source: Source, at: Any, given: int, cuts: re.Pattern[str] | None
) -> Iterator[tuple[str, bool, Any, int, float]]:
    """Yield (text, document ends, at, characters given, share done) from a place of a source on.

    The texts of a document are its parts between cuts, the last of them perhaps empty.
    """
    rest, looked, drop = "", 0, given
    for text, ends, after, done in source.fragments(at):
        fresh, drop = text[drop:], max(0, drop - len(text))
        rest = rest + fresh if rest else fresh
        start = 0
        while cuts and len(rest) - start > BLOCK:
            found = cuts.search(rest, max(start + BLOCK, looked))
            if not found:
                looked = len(rest) - 1  # what comes next decides on the last
                break
            end = found.start()
            given += end - start
            yield rest[start:end], False, at, given, done
            start = end
        rest, looked = rest[start:], max(0, looked - start)
        if len(rest) > (LONGEST if cuts else WHOLE):
            raise UserError(
                f"{source.name} has {len(rest):,} characters with no place to cut: give lines or "
                "words, shorter documents, or use --tokenizer=byte"
            )
        if ends:
            at, given = after, 0
            yield rest, True, at, given, done
            rest, looked = "", 0


def blocks(
    sources: Sequence[Source], cuts: re.Pattern[str] | None, share: float, place: Place
) -> Iterator[Block]:
    """Yield the documents from a place on, in blocks; place moves on with them."""
    weight = max(1, sum(source.size for source in sources))
    before = sum(source.size for source in sources[: place.source])
    block = Block()
    for index in range(place.source, len(sources)):
        source = sources[index]
        given = place.given
        for text, ends, at, after, done in parts(source, place.at, given, cuts):
            empty = ends and not text and not given  # a row of nothing is no document
            given = after
            if not empty:
                block.pieces += _split(text, ends, share, place)
                block.size += len(text)
                place.documents += ends
            place.source, place.at, place.given = index, at, after
            if block.size >= BLOCK:
                block.place = vars(place).copy()
                block.done = (before + done * source.size) / weight
                yield block
                block = Block()
        before += source.size
        place.source, place.at, place.given = index + 1, None, 0
    if block.pieces:
        block.place, block.done = vars(place).copy(), 1.0
        yield block


def _split(text: str, ends: bool, share: float, place: Place) -> list[Piece]:
    if place.left is None:
        return [Piece("val" if is_val(place.documents, share) else "train", text, ends)]
    train, val = text[: place.left], text[place.left :]
    place.left -= len(train)
    if not val:
        return [Piece("train", train, ends)]
    return [*([Piece("train", train, False)] if train else []), Piece("val", val, ends)]


def encoded(
    blocks: Iterable[Block],
    tokenizer: Tokenizer,
    end_of_text: bool,
    workers: int,
    progress: Progress,
) -> Iterator[tuple[str, np.ndarray, Any]]:
    """Yield ("train" or "val", ids, the place after them or None), in the order of the blocks."""
    arrays, dtype = arrays_of(tokenizer), dtype_of(tokenizer)
    end_ids = [tokenizer.end_of_text] if end_of_text and tokenizer.end_of_text is not None else []
    end = np.array(end_ids, dtype)

    def encode(block: Block) -> tuple[np.ndarray, np.ndarray, int]:
        train, val, n_bytes = [end[:0]], [end[:0]], 0
        for split, text, ends in block.pieces:
            ids = [arrays(text), end] if ends else [arrays(text)]
            (train if split == "train" else val).extend(ids)
            n_bytes += len(text) if text.isascii() else len(text.encode())
        return np.concatenate(train).astype(dtype), np.concatenate(val).astype(dtype), n_bytes

    with ThreadPoolExecutor(workers, "encode") as threads:
        for block, future in _ahead(((b, threads.submit(encode, b)) for b in blocks), workers + 2):
            train, val, n_bytes = future.result()
            n_documents = block.place["documents"]
            progress.took(n_documents, n_bytes, len(train) + len(val), block.done)
            yield "train", train, None
            yield "val", val, {"place": block.place, "bytes": progress.bytes}


def _ahead(items: Iterator[tuple[Block, Any]], most: int) -> Iterator[tuple[Block, Any]]:
    """Yield the items as they come, after some more have been taken: most, or AHEAD characters."""
    waiting: deque[tuple[Block, Any]] = deque()
    size = 0
    for item in items:
        waiting.append(item)
        size += item[0].size
        while len(waiting) > most or (size > AHEAD and len(waiting) > 1):
            size -= waiting[0][0].size
            yield waiting.popleft()
    yield from waiting


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
