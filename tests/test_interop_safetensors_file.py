"""Safetensors files: read without their library, as it does, and written as it reads them."""

import json
import os
import struct
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.errors import UserError
from gpt_jax.interop.safetensors_file import LONGEST_HEADER, open_tensors, write

DTYPES = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32",
          "uint16", "uint8", "bool"]  # fmt: skip
WEIGHTS = ["float32", "float16", "bfloat16"]


def library():
    pytest.importorskip("safetensors")
    import safetensors.numpy

    return safetensors.numpy


def equal(a, b):
    return [*a] == [*b] and all(
        (a[n].dtype, a[n].shape, a[n].tobytes()) == (b[n].dtype, b[n].shape, b[n].tobytes())
        for n in a
    )


def some(dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 4), "b": (5,), "c": (), "d": (0, 3), "é.w": (2, 1, 3)}
    dtype = jnp.bfloat16 if dtype == "bfloat16" else dtype
    return {name: rng.normal(0, 9, shape).astype(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_library_writes_is_read(tmp_path, dtype):
    library().save_file(some(dtype), tmp_path / "x", {"format": "pt"})
    found = open_tensors(tmp_path / "x")
    assert equal({name: found[name] for name in some()}, some(dtype))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_written_the_library_reads(tmp_path, dtype):
    write(tmp_path / "x", some(), dtype, {"config": '{"é": 1}'})
    theirs = library().load_file(tmp_path / "x")
    ours = {name: x.astype(dtype) for name, x in some().items()}
    assert equal({name: theirs[name] for name in ours}, ours)
    with library().safe_open(tmp_path / "x", "np") as file:
        assert file.metadata() == {"config": '{"é": 1}'}


@pytest.mark.parametrize("dtype", WEIGHTS)
def test_what_is_written_is_read_again_rounded_once(tmp_path, dtype):
    write(tmp_path / "x", some(), dtype, {})
    expected = {name: x.astype(some(dtype)["a"].dtype) for name, x in some().items()}
    assert equal(open_tensors(tmp_path / "x"), expected)


def test_tensors_start_at_a_multiple_of_8_whatever_the_header(tmp_path):
    for n in range(9):
        write(tmp_path / str(n), some(), "float32", {"x": n * "y"})
        data = (tmp_path / str(n)).read_bytes()
        assert int.from_bytes(data[:8], "little") % 8 == 0


def test_tensors_are_written_in_the_order_given_from_any_layout_in_memory(tmp_path):
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    arrays = {"z": x.T, "a": x[:, ::2], "k": np.broadcast_to(np.float32(3), (2, 2))}
    write(tmp_path / "x", arrays, "float32", {})
    assert equal(open_tensors(tmp_path / "x"), arrays)


def test_a_value_beyond_float16_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"^w holds 7e\+04, beyond float16: use --dtype=float32$"):
        write(tmp_path / "x", {"w": np.float32([1, -7e4])}, "float16", {})
    write(tmp_path / "y", {"w": np.float32([1, np.inf])}, "float16", {})  # what it was before


def test_no_tensor_is_read_before_a_slice_of_it_is(tmp_path):
    """64 GiB that are not there: none of it can have been read."""
    n, path = 2**34, tmp_path / "x"
    text = json.dumps({"w": {"dtype": "F32", "shape": [n], "data_offsets": [0, 4 * n]}}).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 4 * n)
        file.seek(-4, os.SEEK_END)
        file.write(struct.pack("<f", 2.5))
    tracemalloc.start()
    try:
        w = open_tensors(path)["w"]
        assert (w.shape, w[0], w[-1]) == ((n,), 0, 2.5)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert not w.flags.writeable


def header(text, length=None):
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def tensor(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def one(**changes):
    return header({"w": tensor(**changes)})


TWICE = b'{"w":%s,"w":%s}' % ((json.dumps(tensor()).encode(),) * 2)
HOSTILE = {
    "nothing": (b"", "header"),
    "less than a length": (b"\x01\0", "header"),
    "a header of 2^63 bytes": (header({}, 2**63), "claims 9,223,372,036,854,775,808"),
    "a header beyond the file": (header({}, 3) + b"", "claims 3"),
    "a header nested too deep": (header(b"[" * 100_000), "recursion"),
    "a header that is a list": (header([]), "no object"),
    "a header that is no JSON": (header(b"{'w'"), "whole safetensors"),
    "a header that is not UTF-8": (header(b'{"\xff": 1}'), "utf-8"),
    "a name twice": (header(TWICE) + bytes(4), "has 'w' twice"),
    "a key twice": (header(b'{"w":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}')
                    + bytes(4), "has 'dtype' twice"),
    "an entry that is a number": (header({"w": 1}), "'w' has no dtype"),
    "an entry without a shape": (header({"w": {"dtype": "F32", "data_offsets": [0, 4]}}) + bytes(4),
                                 "has no dtype, shape"),
    "a name of two lines": (header({"a\nb": 1}), r"a\\nb"),
    "an unknown dtype": (one(dtype="F999") + bytes(4), "'F999'"),
    "a dtype that is a list": (one(dtype=[]) + bytes(4), r"\[\]"),
    "a wider dtype than the bytes": (one(dtype="F64") + bytes(4), "needs 8 bytes"),
    "a narrower dtype than the bytes": (one(dtype="BF16") + bytes(4), "needs 2 bytes"),
    "a shape that overflows": (one(shape=[2**62, 2**62]) + bytes(4), "needs"),
    "a shape of digits": (one(shape=[int("9" * 4000)]) + bytes(4), "needs"),
    "a shape of terabytes": (one(shape=[10**12], offsets=[0, 4 * 10**12]), "of 0"),
    "a shape below 0": (one(shape=[-1]) + bytes(4), "has shape"),
    "a shape of floats": (one(shape=[1.0]) + bytes(4), "has shape"),
    "a shape of truths": (one(shape=[True]) + bytes(4), "has shape"),
    "a shape of 9 axes": (one(shape=[1] * 9) + bytes(4), "has shape"),
    "a shape that is null": (one(shape=None) + bytes(4), "has shape"),
    "an end before its start": (one(offsets=[4, 0]) + bytes(4), "said to have -4"),
    "an end beyond the file": (one(shape=[100], offsets=[0, 400]) + bytes(4), "to byte 400 of 4"),
    "a start beyond the file": (one(offsets=[2**62, 2**62 + 4]) + bytes(4), "up to byte"),
    "a start below 0": (one(offsets=[-4, 0]) + bytes(4), "data_offsets"),
    "three offsets": (one(offsets=[0, 4, 4]) + bytes(4), "data_offsets"),
    "two tensors that overlap": (header({"v": tensor(), "w": tensor(offsets=[2, 6])}) + bytes(6),
                                 "'w' starts at byte 2, and 4 is the next free"),
    "two tensors in one place": (header({"v": tensor(), "w": tensor()}) + bytes(4),
                                 "'w' starts at byte 0, and 4"),
    "a gap": (header({"v": tensor(), "w": tensor(offsets=[8, 12])}) + bytes(12), "'w' starts at"),
    "bytes after the last": (one() + bytes(5), "end at byte 4 of 5"),
    "no tensors but bytes": (header({}) + bytes(4), "end at byte 0 of 4"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_lies_is_refused_in_a_line_with_nothing_allocated(tmp_path, name):
    data, said = HOSTILE[name]
    path = tmp_path / "x"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=said) as error:
            open_tensors(path)
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()
    assert str(error.value).startswith(f"{path} is not a whole safetensors file (")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300 + len(str(path))


@pytest.mark.parametrize("name", HOSTILE)
def test_the_library_would_refuse_it_too_but_for_names_that_come_twice(tmp_path, name):
    """To it the last of two entries counts."""
    safetensors = library()
    (tmp_path / "x").write_bytes(HOSTILE[name][0])
    if name in ("a name twice", "a shape of 9 axes"):
        assert [*safetensors.load_file(tmp_path / "x")] == ["w"]
    else:
        with pytest.raises(Exception, match=r"[Hh]eader|[Oo]ffset|[Dd]type|[Ff]ile|variant"):
            safetensors.load_file(tmp_path / "x")


def test_a_header_longer_than_any_is_not_even_parsed(tmp_path):
    text = b'{"w":{}' + b" " * LONGEST_HEADER + b"}"
    (tmp_path / "x").write_bytes(header(text))
    with pytest.raises(UserError, match="its header claims 10,000,008"):
        open_tensors(tmp_path / "x")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "it is not there"),
        (Path.mkdir, "it is no file"),
        (os.mkfifo, "it is no file"),
        (lambda path: path.symlink_to(path.name), "it is no file"),
        (lambda path: path.symlink_to("/dev/zero"), "it is no file"),
    ],
)
def test_what_is_no_file_is_not_opened(tmp_path, make, said):
    make(tmp_path / "x")
    with pytest.raises(UserError, match=said):
        open_tensors(tmp_path / "x")
