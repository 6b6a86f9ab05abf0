"""Which files in a data set's folder are tokens of which split, and where in a file they begin.

- nanoGPT's: ids and nothing else. train.bin, or several: train_000.bin, train-00001-of-00010.bin
- llm.c's, which modded-nanogpt reads too: a header of 256 int32, then the ids.
  fineweb_train_000001.bin (github.com/karpathy/llm.c, dev/data/data_common.py)
- build-nanogpt's: numpy's own. edufineweb_train_000001.npy (github.com/karpathy/build-nanogpt,
  fineweb.py)
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt_jax.errors import UserError

HEADER_BYTES = 1024
# a magic number -> version, dtype and whose ids
SHARDS = {20240520: (1, "uint16", "GPT-2"), 20240801: (7, "uint32", "Llama 3")}
EXAMPLES = 20240522  # of llm.c's files of multiple-choice questions
LONGEST_NPY_HEADER = 10_000  # bytes
WORD = re.compile("(?<![a-zA-Z])(train|val)(?![a-zA-Z])")


class Layout(NamedTuple):
    """How the ids lie in a file."""

    kind: str  # for messages
    dtype: str  # "uint16" or "uint32"
    header_bytes: int


def named(folder: Path, name: str) -> list[Path]:
    """Return the files whose names say that they are of a split, "train" or "val", in order.

    The last of the two words in a name counts.
    """
    there = folder.iterdir() if folder.is_dir() else ()
    token_files = [p for p in there if p.suffix in (".bin", ".npy") and not p.name.startswith(".")]
    return sorted(p for p in token_files if WORD.findall(p.stem)[-1:] == [name])


def files_of(folder: Path, name: str) -> list[Path]:
    """Return the files of a split; UserError where a split has none and the other has shards.

    Where there is none at all it is nanoGPT's, which is not there either.
    """
    plain = folder / f"{name}.bin"
    found = named(folder, name)
    if plain in found and len(found) > 1:
        (other, *_) = (path for path in found if path != plain)
        raise UserError(f"{plain} and {other} are both {name}: take one of them out of the folder")
    other = "val" if name == "train" else "train"
    shards = [path for path in named(folder, other) if path.name != f"{other}.bin"]
    if shards and not found:
        raise UserError(
            f"{folder} has no file of {name} beside {shards[0].name}: add "
            f"{WORD.sub(name, shards[0].name)}, say, or {name}.bin"
        )
    return found or [plain]


def layout(path: Path, dtype: np.dtype, again: str) -> Layout:
    """Return how the ids lie in a file that may be of any kind, with ids of ``dtype``.

    ``again`` is the remedy for a file that is damaged. Raises UserError for a header that is of no
    known kind or does not fit the file or the dtype, OSError where the file cannot be read.
    """
    size = path.stat().st_size
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise UserError(f"{path} is {kind}, not a file of token ids: remove it and {again}")
    if size == 0:
        raise UserError(f"{path} is empty: {again}")
    found = _of_npy(path, size) if path.suffix == ".npy" else _of_bin(path, size)
    if found and found.dtype != dtype.name:
        raise UserError(
            f"{path} holds {found.dtype} ids ({found.kind}), but the ids of its data set are "
            f'{dtype.name}: put a meta.json beside it with their "tokenizer", "vocab_size" and '
            f'"dtype": "{found.dtype}"'
        )
    if not found and size % dtype.itemsize:
        raise UserError(
            f"{path}: {size:,} bytes is not a whole number of {dtype.name} tokens, it is cut off "
            f"or of another dtype than its meta.json says: {again}"
        )
    return found or Layout("ids without a header", dtype.name, 0)


def _of_bin(path: Path, size: int) -> Layout | None:
    """Return the layout of a shard of llm.c, None for ids without a header."""
    with open(path, "rb") as file:
        words = np.frombuffer(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), "<i4")
    magic, version, count = (int(word) for word in words[:3])
    if magic == EXAMPLES and not words[4:].any():
        raise UserError(
            f"{path} (magic {magic}) holds llm.c's multiple-choice questions, not text: take it "
            "out of the folder"
        )
    if words[3:].any():  # of 256 words llm.c uses three
        return None
    if magic not in SHARDS:
        if count > 0 and size in (HEADER_BYTES + 2 * count, HEADER_BYTES + 4 * count):
            known = " or ".join(f"{magic} ({ids})" for magic, (*_, ids) in SHARDS.items())
            raise UserError(
                f"{path} has the header of a shard of {count:,} tokens, but magic {magic}, not "
                f"{known}: prepare it by llm.c or without a header"
            )
        return None
    known, dtype, ids = SHARDS[magic]
    if version != known:
        raise UserError(
            f"{path} is a shard of {ids} ids (magic {magic}) of version {version}, and only "
            f"version {known} is known: prepare it by a newer llm.c"
        )
    expected = HEADER_BYTES + count * np.dtype(dtype).itemsize
    if size != expected:
        raise UserError(
            f"{path}: its header says {count:,} tokens of {dtype}, which with the header is "
            f"{expected:,} bytes, but it has {size:,}: it is cut off or damaged, get it again"
        )
    return Layout(f"a shard of {ids} ids, magic {magic}", dtype, HEADER_BYTES)


def _of_npy(path: Path, size: int) -> Layout:
    """Return the layout of one array that numpy has saved."""
    with open(path, "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"version {version}")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file, LONGEST_NPY_HEADER)
        except ValueError as error:
            raise UserError(f"{path} is no .npy file ({error!s:.200}): get it again") from None
        header_bytes = file.tell()
    if len(shape) != 1 or dtype not in ("<u2", "<u4"):
        raise UserError(
            f"{path} holds {dtype} of shape {shape}: save the ids as one row of uint16 or uint32"
        )
    if size != header_bytes + shape[0] * dtype.itemsize:
        raise UserError(
            f"{path}: its header says {shape[0]:,} tokens of {dtype}, which with the header is "
            f"{header_bytes + shape[0] * dtype.itemsize:,} bytes, but it has {size:,}: it is cut "
            "off or damaged, get it again"
        )
    return Layout("an array of numpy's", dtype.name, header_bytes)
