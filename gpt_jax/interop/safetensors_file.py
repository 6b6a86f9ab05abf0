"""The safetensors format: files as maps whose tensors are not read before a slice is asked for.

Eight bytes give the length of a JSON header, which gives each tensor its dtype, shape and place;
then come the tensors' bytes, without gaps (github.com/huggingface/safetensors). All that a header
claims is held against the file here before anything is made of it.
"""

import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gpt_jax.errors import UserError

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": jnp.bfloat16, "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32",
    "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
LONGEST_HEADER = 10**7  # bytes: 48 layers need 70,000
MOST_AXES = 8


def open_tensors(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a file by name: read-only views of a map of it, of which none is read.

    Raises UserError for a file that is not whole, or whose header claims what it does not hold.
    """
    try:
        if not path.is_file():  # to open a pipe may take for ever
            raise ValueError("it is not there" if not os.path.lexists(path) else "it is no file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            most = min(LONGEST_HEADER, size - 8)
            if length > most:
                raise ValueError(f"of {size:,} bytes, its header claims {length:,}")
            header = json.loads(file.read(length), object_pairs_hook=_once)
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        return _views(header, data[8 + length :])
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path} is not a whole safetensors file ({reason!s:.200}): get it anew"
        ) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict; ValueError where it has a name twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"its header has {twice!r:.60} twice")
    return found


def _views(header: Any, data: np.ndarray) -> dict[str, np.ndarray]:
    """Return the tensors that a header describes, as views of the bytes after it."""
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    header.pop("__metadata__", None)
    views, places = {}, []
    for name, entry in header.items():
        if not (isinstance(entry, dict) and {"dtype", "shape", "data_offsets"} <= entry.keys()):
            raise ValueError(f"{name!r:.60} has no dtype, shape and data_offsets")
        code, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(code, str) or code not in DTYPES:
            raise ValueError(
                f"{name!r:.60} holds {code!r:.20}, which is none of {', '.join(DTYPES)}"
            )
        if not (_counts(shape) and len(shape) <= MOST_AXES and _counts(place) and len(place) == 2):
            raise ValueError(f"{name!r:.60} has shape {shape!r:.40} and data_offsets {place!r:.40}")
        dtype, (start, end) = np.dtype(DTYPES[code]), place
        needed = math.prod(shape) * dtype.itemsize
        if end - start != needed or end > len(data):
            raise ValueError(
                f"{name!r:.60} of shape {shape!r:.40} needs {needed!s:.30} bytes, is said to have "
                f"{end - start!s:.30}, up to byte {end!s:.30} of {len(data)}"
            )
        places.append((start, end, name))
        views[name] = data[start:end].view(dtype).reshape(shape)
    reached = 0
    for start, end, name in sorted(places):
        if start != reached:
            raise ValueError(f"{name!r:.60} starts at byte {start}, and {reached} is the next free")
        reached = end
    if reached != len(data):
        raise ValueError(f"its tensors end at byte {reached} of {len(data)}")
    return views


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)


def write(
    path: Path, arrays: Mapping[str, np.ndarray], dtype: str, metadata: Mapping[str, str]
) -> None:
    """Write arrays to a new file as ``dtype``, "float32", "bfloat16" or "float16", one by one.

    Raises UserError for a value that is finite and beyond the dtype, OSError as the disk does.
    """
    codes = {np.dtype(numpy): code for code, numpy in DTYPES.items()}
    kept = np.dtype(jnp.bfloat16 if dtype == "bfloat16" else dtype)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, x in arrays.items():
        start, end = end, end + x.size * kept.itemsize
        header[name] = {
            "dtype": codes[kept], "shape": list(x.shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, x in arrays.items():
            with np.errstate(over="ignore"):
                y = np.ascontiguousarray(x, kept)
            if kept.itemsize < 4 and not np.isfinite(y).all() and np.isfinite(x).all():
                largest = np.abs(x).max()
                raise UserError(f"{name} holds {largest:.4g}, beyond {dtype}: use --dtype=float32")
            file.write(y.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
