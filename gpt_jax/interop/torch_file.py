"""torch.save's files, read and written without PyTorch: a zip of a pickle and the tensors' bytes.

The pickle is not unpickled. A small machine goes through its opcodes and knows of plain values,
dicts and tensors: there is nothing that could be imported or called, whatever the file names. What
it may hold follows torch.load(weights_only=True), and the archive's layout torch/serialization.py.
"""

import math
import os
import pickletools
import secrets
import struct
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from gpt_jax.errors import UserError
from gpt_jax.integrity import refuse_to_overwrite

LONGEST_PICKLE = 2**24  # bytes; GPT-2 XL with its optimizer takes about 200 kB
LONGEST_RECORD = 16  # bytes of "version" and "byteorder"
NEWEST_VERSION = 10  # of the archive, as in caffe2/serialize/versions.h; torch.save writes 3
ALIGNMENT = 64  # bytes; so that a tensor can be used where it lies
OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what torch.save wrote first, before 1.6
DTYPES = {
    "FloatStorage": np.dtype("float32"),
    "DoubleStorage": np.dtype("float64"),
    "HalfStorage": np.dtype("float16"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("int64"),
    "IntStorage": np.dtype("int32"),
}
STORAGES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Tensor:
    """An array of a file: read when it is asked for. One tensor under two names is stored once."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]  # UserError where its bytes are not those that were written

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.read(), dtype, copy=copy)


class _Entry(NamedTuple):
    start: int  # bytes from the beginning of the file
    size: int
    crc: int


class _Global(NamedTuple):
    name: str  # "torch.FloatStorage"


class _Storage(NamedTuple):
    dtype: np.dtype
    elements: int
    name: str  # of its entry


ORDERED_DICT = _Global("collections.OrderedDict")
REBUILD_TENSOR = _Global("torch._utils._rebuild_tensor_v2")
REBUILD_PARAMETER = _Global("torch._utils._rebuild_parameter")
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
GLOBALS = [ORDERED_DICT, REBUILD_TENSOR, REBUILD_PARAMETER]
KNOWN = {x.name: x for x in [*GLOBALS, *(_Global(f"torch.{name}") for name in DTYPES)]}


# ---- reading


def load(path: str | Path) -> Any:
    """Return what torch.save has written: plain values, dicts, lists and tuples, and `Tensor`s.

    The tensors' bytes stay in the file. Raises UserError for anything but such a file: for one
    that names what is not a tensor, claims more than it holds, or is damaged.
    """
    try:
        with open(path, "rb", opener=_open_regular) as file:
            entries = _entries(file)
            size = os.fstat(file.fileno()).st_size
            for name, most in ("data.pkl", LONGEST_PICKLE), ("version", LONGEST_RECORD):
                _require(name in entries, f"it has no {name!r}")
                _require(entries[name].size <= most, f"its {name!r} has more than {most:,} bytes")
            version = _bytes(file, entries["version"]).strip()
            known = version.isdigit() and 1 <= int(version) <= NEWEST_VERSION
            _require(known, f"its version is {version!r}")
            order = entries.get("byteorder")  # PyTorch before 2.1 writes none
            same = not order or (order.size < LONGEST_RECORD and
                                 _bytes(file, order).decode() == sys.byteorder)  # fmt: skip
            _require(same, f"it is of another byte order than this machine's ({sys.byteorder})")
            machine = _Machine(Path(path), entries)
            value = machine.run(_bytes(file, entries["data.pkl"]))
            claimed = sum(math.prod(x.shape) * x.dtype.itemsize for x in machine.tensors)
            # nanoGPT's output layer is its embedding once more: never twice the file
            _require(claimed <= 2 * size, f"its tensors claim {claimed:,} bytes, it has {size:,}")
            return value
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # what a bad archive or pickle can raise is open-ended
        ours = type(error) is ValueError and str(error).isprintable()
        reason = str(error) if ours else repr(error)
        raise UserError(
            f"{path} cannot be read as a file of tensors by torch.save ({reason:.200}): copy it "
            "again, or save it again with tensors and plain values alone"
        ) from None


def _open_regular(path: str, flags: int) -> int:
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
        raise ValueError("it is no regular file")
    return os.open(path, flags)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _entries(file: BinaryIO) -> dict[str, _Entry]:
    """Return where the archive's entries lie, by their names without the folder they are in.

    Each must be stored as it is, lie within the file, and share its bytes with no other.
    """
    start = file.read(ALIGNMENT * 8)
    old = start.startswith(OLD_MAGIC) or start[257:262] == b"ustar"
    _require(not old, "it is of PyTorch's format before 1.6: torch.load it there and save it anew")
    with zipfile.ZipFile(file) as archive:
        infos, end_of_data = archive.infolist(), archive.start_dir
    _require(bool(infos), "the archive is empty")
    root = infos[0].filename.partition("/")[0] + "/"
    entries, last = {}, 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        name = info.orig_filename
        shown = f"the archive's {name!r:.60}"
        inside = name.startswith(root) and not {"", ".", ".."} & set(name.split("/"))
        _require(inside and name.isprintable(), f"{shown} is not a name in {root!r:.60}")
        _require(name.removeprefix(root) not in entries, f"{shown} is there twice")
        stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
        _require(stored and info.compress_size == info.file_size, f"{shown} is compressed")
        file.seek(info.header_offset)
        header = file.read(30)
        _require(len(header) == 30 and header[:4] == b"PK\3\4", f"{shown} has no header")
        name_length, extra_length = struct.unpack("<HH", header[26:])
        _require(file.read(name_length) == name.encode(), f"{shown} has another name in its header")
        at = info.header_offset + 30 + name_length + extra_length
        apart = last <= info.header_offset and at + info.file_size <= end_of_data
        _require(apart, f"{shown} claims bytes that are not its own")
        last = at + info.file_size
        entries[name.removeprefix(root)] = _Entry(at, info.file_size, info.CRC)
    return entries


def _bytes(file: BinaryIO, entry: _Entry) -> bytes:
    file.seek(entry.start)
    data = file.read(entry.size)
    _require(zlib.crc32(data) == entry.crc, "it is damaged: a checksum differs")
    return data


class _Machine:
    """Goes through a pickle of protocol 2: a stack of values, a memo, and five things to make."""

    def __init__(self, path: Path, entries: dict[str, _Entry]):
        self.path, self.entries = path, entries
        self.tensors: list[Tensor] = []
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        push, pop = self.stack.append, self.stack.pop
        argument: Any
        for opcode, argument, _ in pickletools.genops(data):
            match opcode.name:
                case "PROTO":
                    _require(argument == 2, f"its pickle is of protocol {argument}, not 2")
                case "NONE":
                    push(None)
                case "NEWTRUE" | "NEWFALSE":
                    push(opcode.name == "NEWTRUE")
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                    push(argument)
                case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                    push(EMPTY[opcode.name]())
                case "MARK":
                    self.marks.append(len(self.stack))
                case "TUPLE":
                    push(tuple(self.marked()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    push(tuple(self.last(int(opcode.name[-1]))))
                case "APPEND" | "APPENDS":
                    items = self.last(1) if opcode.name == "APPEND" else self.marked()
                    self.top(list).extend(items)
                case "SETITEM" | "SETITEMS":
                    items = self.last(2) if opcode.name == "SETITEM" else self.marked()
                    self.set_items(items)
                case "BINPUT" | "LONG_BINPUT":
                    self.memo[argument] = self.stack[-1]  # a dict: a large number takes no room
                case "BINGET" | "LONG_BINGET":
                    push(self.memo[argument])
                case "GLOBAL":
                    name = argument.replace(" ", ".")
                    _require(name in KNOWN, f"it names {name!r:.80}, which is no tensor")
                    push(KNOWN[name])
                case "BINPERSID":
                    push(self.storage(pop()))
                case "REDUCE":
                    function, arguments = self.last(2)
                    push(self.made(function, arguments))
                case "BUILD":  # a state_dict's _metadata: versions of modules, of no use here
                    attributes = pop()
                    _require(type(attributes) is dict, "it sets what only objects have")
                    self.top(dict)
                case "STOP":
                    return pop()
                case _:
                    raise ValueError(f"its pickle has a {opcode.name}, which no tensor needs")
        raise ValueError("its pickle has no end")

    def marked(self) -> list[Any]:
        return self.last(len(self.stack) - self.marks.pop())

    def last(self, n: int) -> list[Any]:
        _require(0 <= n <= len(self.stack), "its pickle takes more than it has")
        items = self.stack[len(self.stack) - n :]
        del self.stack[len(self.stack) - n :]
        return items

    def top(self, kind: type) -> Any:
        _require(type(self.stack[-1]) is kind, f"its pickle fills what is no {kind.__name__}")
        return self.stack[-1]

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            # no tuples: to hash one that is nested deep enough would overflow the stack
            _require(type(key) in (str, int), f"its pickle has a key of {type(key).__name__}")
            target[key] = value

    def made(self, function: Any, arguments: Any) -> Any:
        _require(type(arguments) is tuple, "its pickle calls with what are no arguments")
        if function is ORDERED_DICT and not arguments:
            return {}
        if function is REBUILD_PARAMETER and len(arguments) == 3:
            _require(isinstance(arguments[0], Tensor), "it has a parameter that is no tensor")
            return arguments[0]
        _require(function is REBUILD_TENSOR and len(arguments) in (6, 7), "its pickle calls amiss")
        return self.tensor(*arguments[:4])

    def storage(self, of: Any) -> _Storage:
        match of:
            case ("storage", _Global(name), str() as key, str(), int() as elements):
                dtype = DTYPES.get(name.removeprefix("torch."))
                entry = self.entries.get(f"data/{key}")
                _require(dtype is not None, f"it has a storage of {name!r:.60}")
                _require(entry is not None, f"it has no 'data/{key!s:.60}'")
                assert dtype is not None
                assert entry is not None
                fits = elements > 0 and elements * dtype.itemsize == entry.size
                _require(fits, f"'data/{key}' has {entry.size:,} bytes, not {elements} {dtype}")
                return _Storage(dtype, elements, f"data/{key}")
        raise ValueError("it has a persistent id that is no storage")

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
        _require(type(storage) is _Storage, "it has a tensor without a storage")
        both = type(shape) is tuple and type(strides) is tuple and len(shape) == len(strides) <= 8
        _require(both, "it has a tensor whose shape is no shape")
        numbers = [offset, *shape, *strides]
        whole = all(type(n) is int and 0 <= n <= storage.elements for n in numbers)
        last = (
            offset + sum((n - 1) * m for n, m in zip(shape, strides, strict=True)) if whole else 0
        )
        inside = whole and 0 < math.prod(shape) <= storage.elements and last < storage.elements
        _require(inside, f"a tensor is not within its {storage.name!r:.60}")
        entry, dtype = self.entries[storage.name], storage.dtype

        def read() -> np.ndarray:
            data = np.asarray(np.memmap(self.path, np.uint8, "r", entry.start, (entry.size,)))
            if zlib.crc32(data.data) != entry.crc:
                raise UserError(
                    f"{self.path} is damaged: {storage.name!r:.60} is not what was saved (its "
                    "checksum differs): copy it again"
                )
            flat = data.view(dtype)[offset:]
            steps = [n * dtype.itemsize for n in strides]
            return np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False)

        self.tensors.append(Tensor(shape, dtype, read))
        return self.tensors[-1]


# ---- writing


def save(path: Path, value: Any) -> None:
    """Write plain values, dicts, lists, tuples and `Tensor`s to where torch.load reads them.

    One tensor after the other is read and written, under another name until the file is whole.
    Raises UserError where there is a file of that name, or it cannot be written.
    """
    tensors: dict[int, Tensor] = {}
    pickle = pickled(value, tensors)
    refuse_to_overwrite(path)
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                _write(archive, "data.pkl", np.frombuffer(pickle, np.uint8))
                _write(archive, "byteorder", np.frombuffer(sys.byteorder.encode(), np.uint8))
                for number, tensor in enumerate(tensors.values()):
                    _write(archive, f"data/{number}", np.asarray(tensor))
                _write(archive, "version", np.frombuffer(b"3\n", np.uint8))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    info = zipfile.ZipInfo(f"archive/{name}")
    large = data.size >= 2**30  # 20 bytes more of header
    assert archive.fp is not None
    at = archive.fp.tell() + 30 + len(info.filename) + 4 + 20 * large
    padding = -at % ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding  # as PyTorch pads
    info.file_size = data.size
    with archive.open(info, "w", force_zip64=large) as entry:
        entry.write(data.data)


def pickled(value: Any, tensors: dict[int, Tensor] | None = None) -> bytes:
    """Return the pickle, of protocol 2, of plain values, and of tensors where these are collected.

    ``tensors`` gets each once, by its id, in the order of their storages.
    """
    tensors = {} if tensors is None else tensors

    def within(values: Any) -> bytes:
        return b"(" + b"".join(map(piece, values))

    def piece(x: Any) -> bytes:
        match x:
            case None:
                return b"N"
            case bool():
                return b"\x88" if x else b"\x89"
            case int() if -(2**31) <= x < 2**31:
                return b"J" + struct.pack("<i", x)
            case int():
                data = x.to_bytes(x.bit_length() // 8 + 1, "little", signed=True)
                return b"\x8a" + bytes([len(data)]) + data
            case float():
                return b"G" + struct.pack(">d", x)
            case str():
                data = x.encode("utf-8", "surrogatepass")
                return b"X" + struct.pack("<I", len(data)) + data
            case tuple():
                return within(x) + b"t"
            case list():
                return b"]" + within(x) + b"e"
            case dict():
                new = b"ccollections\nOrderedDict\n)R" if isinstance(x, OrderedDict) else b"}"
                items = within(part for item in x.items() for part in item) + b"u"
                return new + items if x else new
            case Tensor():
                tensors.setdefault(id(x), x)
                key, elements = str([*tensors].index(id(x))), math.prod(x.shape)
                kind = f"ctorch\n{STORAGES[x.dtype]}\n".encode()
                storage = piece("storage") + kind + piece(key) + piece("cpu") + piece(elements)
                strides = tuple(math.prod(x.shape[axis + 1 :]) for axis in range(len(x.shape)))
                rest = b"".join(map(piece, (0, x.shape, strides, False, OrderedDict())))
                return b"ctorch._utils\n_rebuild_tensor_v2\n((" + storage + b"tQ" + rest + b"tR"
        raise TypeError(f"{type(x).__name__} is no plain value")

    return b"\x80\x02" + piece(value) + b"."
