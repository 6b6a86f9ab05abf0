"""torch.save's files: read as they are, written as torch.load reads them, refused if they lie."""

import os
import pickle
import resource
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt_jax.errors import UserError
from gpt_jax.interop.torch_file import Tensor, load, pickled, save

REFERENCE = Path(__file__).parent / "reference"
MARKER = "marker"  # what code in a file would make
MOST_MEMORY = 2**18  # KiB that a refusal may take


def tensor(array):
    return Tensor(array.shape, array.dtype, lambda: array)


def plain(value):
    """A file's values, its tensors as shape, dtype and bytes, to compare."""
    if isinstance(value, Tensor):
        array = np.asarray(value)
        return array.shape, str(array.dtype), array.tobytes()
    if isinstance(value, dict):
        return {key: plain(x) for key, x in value.items()}
    return type(value)(map(plain, value)) if isinstance(value, list | tuple) else value


def refusal(path):
    """What is said of a file that is not read, and that it is one line."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as error:
        plain(load(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY
    assert not Path(MARKER).exists()
    text = str(error.value)
    assert text.isprintable()
    assert len(text) < 600
    assert str(path) in text
    return text


# ---- what is written

VALUES = {
    "model": OrderedDict(a=tensor(np.arange(6, dtype=np.float32).reshape(2, 3))),
    "half": [tensor(np.float16([1.5])), tensor(np.asarray(jnp.arange(3, dtype="bfloat16")))],
    "long": (tensor(np.int64([[2**40]])), tensor(np.int32([7])), tensor(np.float64([0.1]))),
    "count": tensor(np.float32(2000)),
    "plain": {"int": 3, "float": 1e-8, "bool": True, "none": None, "text": "é\n", 0: [], "d": {}},
}
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner)
    ),
)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    save(tmp_path / "x.pt", VALUES)
    assert plain(load(tmp_path / "x.pt")) == plain(VALUES)


@given(TREES)
def test_plain_values_are_pickled_as_pickle_reads_them(value):
    assert pickle.loads(pickled(value)) == value


def test_a_tensor_of_two_names_is_stored_once(tmp_path):
    shared = tensor(np.arange(1000.0))
    save(tmp_path / "one.pt", {"wte": shared})
    save(tmp_path / "two.pt", {"wte": shared, "lm_head": shared})
    with zipfile.ZipFile(tmp_path / "two.pt") as archive:
        assert [name for name in archive.namelist() if "/data/" in name] == ["archive/data/0"]
    sizes = [(tmp_path / name).stat().st_size for name in ("one.pt", "two.pt")]
    assert sizes[1] - sizes[0] < 400
    found = load(tmp_path / "two.pt")
    assert plain(found["lm_head"]) == plain(found["wte"])


def test_tensors_lie_where_they_can_be_mapped(tmp_path):
    save(tmp_path / "x.pt", VALUES)
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            with archive.open(info) as entry:
                assert entry._orig_compress_start % 64 == 0, info.filename


def test_tensors_are_asked_for_one_after_the_other(tmp_path):
    held = []

    def read(i):
        assert not held or held == [i - 1]  # the one before is still there at most
        held[:] = [i]
        return np.full(4, i, np.float32)

    tensors = [Tensor((4,), np.dtype("float32"), lambda i=i: read(i)) for i in range(5)]
    save(tmp_path / "x.pt", tensors)
    assert [np.asarray(x)[0] for x in load(tmp_path / "x.pt")] == [0, 1, 2, 3, 4]


def test_a_file_that_is_there_is_not_written_over_and_a_failure_leaves_none(tmp_path):
    path = tmp_path / "new" / "x.pt"
    save(path, {"a": 1})
    with pytest.raises(UserError, match=r"x\.pt is there already: move it away"):
        save(path, {"a": 2})
    assert load(path) == {"a": 1}

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "new" / "y.pt", {"a": Tensor((1,), np.dtype("float32"), fail)})
    assert os.listdir(tmp_path / "new") == ["x.pt"]
    with pytest.raises(UserError, match=r"cannot be written: (File exists|Not a directory)"):
        save(path / "z.pt", {})


def test_pytorch_reads_what_is_written(tmp_path):
    torch = pytest.importorskip("torch")
    save(tmp_path / "x.pt", VALUES)
    found = torch.load(tmp_path / "x.pt", map_location="cpu", weights_only=True)
    assert found["model"]["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["half"][1].dtype == torch.bfloat16
    assert found["count"].shape == ()
    assert found["plain"] == VALUES["plain"]


# ---- what is read


def piece(x):
    return pickled(x)[2:-1]


def storage(kind=b"FloatStorage", key="0", elements=4, tag="storage"):
    named = b"ctorch\n" + kind + b"\n"
    return b"(" + piece(tag) + named + piece(key) + piece("cpu") + piece(elements) + b"tQ"


def rebuilt(storage=None, offset=0, shape=(4,), strides=(1,), function=b"_rebuild_tensor_v2"):
    first = globals()["storage"]() if storage is None else storage
    parts = (offset, shape, strides, False, OrderedDict())
    rest = b"".join(x if isinstance(x, bytes) else piece(x) for x in parts)
    return b"ctorch._utils\n" + function + b"\n(" + first + rest + b"tR"


def archive(path, value=b"N", root="archive", protocol=b"\x80\x02", compression=0, **more):
    """Write an archive by hand: a pickle of what lies in ``value``, and 16 bytes of storage."""
    pickle = {"data.pkl": protocol + value + b"."}
    entries = {**pickle, "byteorder": b"little", "data/0": np.arange(4, dtype="<f4").tobytes()}
    entries = {**entries, "version": b"3\n", **more}
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in entries.items():
            if data is not None:
                file.writestr(f"{root}/{name}", data)
    return path


def test_a_view_is_read_as_the_view_that_it_is(tmp_path):
    path = archive(tmp_path / "x.pt", rebuilt(offset=1, shape=(3,)))
    assert np.asarray(load(path)).tolist() == [1, 2, 3]
    path = archive(tmp_path / "x.pt", rebuilt(shape=(2, 2), strides=(1, 2)))
    assert np.asarray(load(path)).tolist() == [[0, 2], [1, 3]]


def test_a_parameter_is_read_as_its_tensor(tmp_path):
    value = b"ctorch._utils\n_rebuild_parameter\n(" + rebuilt() + b"\x88"
    value += b"ccollections\nOrderedDict\n)RtR"
    assert np.asarray(load(archive(tmp_path / "x.pt", value))).tolist() == [0, 1, 2, 3]


def test_a_byte_order_need_not_be_said(tmp_path):
    assert load(archive(tmp_path / "x.pt", byteorder=None)) is None


def test_nothing_of_a_tensor_is_read_before_it_is_asked_for(tmp_path):
    data = bytearray((REFERENCE / "ckpt_bias.pt").read_bytes())
    whole = load(REFERENCE / "ckpt_bias.pt")["model"]["transformer.wpe.weight"]
    at = data.index(np.asarray(whole).tobytes())
    data[at + 100] ^= 1
    (tmp_path / "x.pt").write_bytes(data)
    model = load(tmp_path / "x.pt")["model"]
    np.asarray(model["transformer.wte.weight"])
    with pytest.raises(UserError, match=r"x\.pt is damaged: 'data/1' is not what was saved"):
        np.asarray(model["transformer.wpe.weight"])


LAUGHS = b"(K\x01K\x01t" + b"".join(b"q%c(h%ch%ct" % (i, i, i) for i in range(60))
PICKLES = {
    "os.mkdir": (b"cos\nmkdir\n(" + piece(MARKER) + b"tR", "it names 'os.mkdir'"),
    "builtins": (b"cbuiltins\neval\n(" + piece("1") + b"tR", "it names 'builtins.eval'"),
    "a global alone": (b"cos\nsystem\n", "it names 'os.system'"),
    "a global with controls": (b"co\x1b[1ms\nx\n", "it names"),
    "numpy": (b"cnumpy.core.multiarray\nscalar\n)R", "'numpy.core.multiarray.scalar'"),
    "torch, but no tensor": (b"ctorch.hub\nload\n(" + piece(MARKER) + b"tR", "'torch.hub.load'"),
    "dots": (b"ctorch\nos.mkdir\n)R", "it names 'torch.os.mkdir'"),
    "INST": (b"(" + piece(MARKER) + b"ios\nmkdir\n", "a INST"),
    "OBJ": (b"(cos\nmkdir\n" + piece(MARKER) + b"o", "it names"),
    "OBJ of ours": (b"(ccollections\nOrderedDict\no", "a OBJ"),
    "NEWOBJ of ours": (b"ccollections\nOrderedDict\n)\x81", "a NEWOBJ"),
    "BUILD of a list": (b"]}b", "fills what is no dict"),
    "BUILD of a tensor": (rebuilt() + b"}b", "fills what is no dict"),
    "BUILD of a global": (b"ccollections\nOrderedDict\n}b", "fills what is no dict"),
    "a call of a dict": (b"})R", "calls amiss"),
    "a call of a storage": (storage() + b")R", "calls amiss"),
    "a call of a type": (b"ctorch\nFloatStorage\n)R", "calls amiss"),
    "a call with a list": (b"ccollections\nOrderedDict\n]R", "calls with what are no arguments"),
    "OrderedDict of something": (b"ccollections\nOrderedDict\n(]tR", "calls amiss"),
    "too few arguments": (b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01tR", "calls amiss"),
    "a parameter of nothing": (b"ctorch._utils\n_rebuild_parameter\n(NNNtR", "is no tensor"),
    "a number as storage": (rebuilt(piece(1)), "without a storage"),
    "extension registry": (b"\x82\x01", "a EXT1"),
    "persistent id as text": (b"P0\n", "a PERSID"),
    "persistent id of text": (piece(MARKER) + b"Q", "that is no storage"),
    "persistent module": (storage(tag="module"), "that is no storage"),
    "storage of no type": (storage(b"../../x"), "it names 'torch.../../x'"),
    "storage of a function": (
        b"(" + piece("storage") + b"ctorch._utils\n_rebuild_tensor_v2\n" + piece("0")
        + piece("cpu") + piece(4) + b"tQ",
        "it has a storage of 'torch._utils._rebuild_tensor_v2'",
    ),
    "storage that is not there": (storage(key="1"), "it has no 'data/1'"),
    "storage outside": (storage(key="../../../etc/passwd"), "it has no 'data/../"),
    "storage of a terabyte": (storage(elements=2**38), "has 16 bytes, not 274877906944 float32"),
    "storage of a negative size": (storage(elements=-4), "has 16 bytes, not -4"),
    "storage of another dtype": (storage(b"DoubleStorage"), "has 16 bytes, not 4 float64"),
    "a tensor past its storage": (rebuilt(offset=1), "is not within its 'data/0'"),
    "a tensor before it": (rebuilt(offset=-1, shape=(1,)), "is not within"),
    "a terabyte by strides of 0": (rebuilt(shape=(2**38,), strides=(0,)), "is not within"),
    "more by strides of 0": (rebuilt(shape=(4, 4), strides=(0, 1)), "is not within"),
    "a shape that overflows": (rebuilt(shape=(2**33, 2**33), strides=(0, 0)), "is not within"),
    "long strides": (rebuilt(shape=(2, 2), strides=(2**62, 1)), "is not within"),
    "negative strides": (rebuilt(offset=3, strides=(-1,)), "is not within"),
    "an empty tensor": (rebuilt(shape=(0, 2**60), strides=(1, 1)), "is not within"),
    "shapes of floats": (rebuilt(shape=(4.0,)), "is not within"),
    "a shape without end": (
        b"((" + LAUGHS + b"t" + rebuilt(shape=b"h\x3b", strides=(1, 1)) + b"t", "is not within",
    ),
    "a list as shape": (rebuilt(shape=[4]), "whose shape is no shape"),
    "100 axes": (rebuilt(shape=(1,) * 100, strides=(1,) * 100), "whose shape is no shape"),
    "a key of a tuple": (b"}(K\x01tNs", "a key of tuple"),
    "a key of a float": (b"}" + piece(1.5) + b"Ns", "a key of float"),
    "a key without a value": (b"}(K\x01u", "zip()"),
    "items of a list": (b"](K\x01K\x01u", "fills what is no dict"),
    "appended to a dict": (b"}K\x01a", "fills what is no list"),
    "nothing": (b"", "IndexError"),
    "more than it has": (b"\x87", "takes more than it has"),
    "a mark that is not there": (b"t", "IndexError"),
    "a memo that is not there": (b"h\x05", "KeyError(5)"),
    "next buffer": (b"\x97", "a NEXT_BUFFER"),
    "protocol 4": (b"\x80\x04N", "its pickle is of protocol 4, not 2"),
    "a frame of 4 EiB": (b"\x95" + struct.pack("<Q", 2**62) + b"N", "a FRAME"),
    "bytes of 4 GB": (b"B" + struct.pack("<I", 2**32 - 1), "expected 4294967295 bytes"),
    "text of 4 GB": (b"X" + struct.pack("<I", 2**32 - 1), "expected 4294967295 bytes"),
    "text that is not UTF-8": (b"X\1\0\0\0\xff", "UnicodeDecodeError"),
    "a long number": (b"I" + b"9" * 5000 + b"\n", "4300 digits"),
    "an unknown opcode": (b"\xff", "unknown"),
}  # fmt: skip


@pytest.mark.parametrize(("value", "said"), PICKLES.values(), ids=PICKLES)
def test_a_pickle_of_anything_but_tensors_and_plain_values_is_refused(
    tmp_path, monkeypatch, value, said
):
    monkeypatch.chdir(tmp_path)
    assert said in refusal(archive(tmp_path / "x.pt", value))


def test_a_pickle_that_plain_pickle_would_run_is_one_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(PICKLES["os.mkdir"][0] + b".")
    assert Path(MARKER).is_dir()


def test_nesting_and_large_memos_take_no_room(tmp_path):
    values = {
        "deep": b"]" * 100_000 + b"a" * 99_999,
        "deep tuples": b")" + b"\x85" * 100_000,
        "laughs": LAUGHS,
        "memo": b"Nr" + struct.pack("<I", 2**32 - 1),
        "itself": b"]q\0h\0a",
        "marks": b"(" * 100_000 + b"N",
    }
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for value in values.values():
        load(archive(tmp_path / "x.pt", value))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY


def test_one_tensor_a_hundred_times_is_more_than_the_file_holds(tmp_path):
    path, one = tmp_path / "x.pt", rebuilt(storage(elements=2**14), shape=(2**14,))
    archive(path, b"(" + one * 2 + b"t", **{"data/0": bytes(2**16)})  # as nanoGPT's lm_head is
    assert len(load(path)) == 2
    archive(path, b"(" + one * 100 + b"t", **{"data/0": bytes(2**16)})
    assert "its tensors claim 6,553,600 bytes, it has" in refusal(path)


def nested_entries():
    """An archive in which an entry lies within another: both claim its bytes."""
    inner = b"PK\3\4" + bytes(22) + struct.pack("<HH", len("archive/data/1"), 0) + b"archive/data/1"
    return {"data/0": inner + bytes(2**16), "data/1": bytes(2**16)}


def overlapping(path):
    archive(path, **nested_entries())
    data = bytearray(path.read_bytes())
    outer = data.index(b"archive/data/0") + len("archive/data/0")
    in_directory = data.rindex(b"PK\1\2", 0, data.rindex(b"archive/data/1"))
    data[in_directory + 42 : in_directory + 46] = struct.pack("<I", outer)
    path.write_bytes(data)


def changed(old, new, last=False):
    """Change some bytes of an archive, in its directory (the ``last``) or in an entry's header."""

    def change(path):
        data = bytearray(archive(path).read_bytes())
        at = data.rindex(old) if last else data.index(old)
        data[at : at + len(new)] = new
        path.write_bytes(data)

    return change


def written(data):
    return lambda path: path.write_bytes(data)


def duplicate(path):
    archive(path)
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("archive/data/0", bytes(16))


LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
ARCHIVES = {
    "nothing": (written(b""), "not a zip file"),
    "noise": (written(bytes(range(256)) * 10), "not a zip file"),
    "a bare pickle": (written(b"cos\nmkdir\n(" + piece(MARKER) + b"tR."), "not a zip file"),
    "before 1.6": (written(LEGACY), "of PyTorch's format before 1.6"),
    "a tar": (written(bytes(257) + b"ustar" + bytes(250)), "of PyTorch's format before 1.6"),
    "no entries": (written(b"PK\5\6" + bytes(18)), "the archive is empty"),
    "compressed": (lambda p: archive(p, compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "encrypted": (changed(b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1"), "is compressed"),
    "twice": (duplicate, "'archive/data/0' is there twice"),
    "two folders": (lambda p: archive(p, **{"x": b""}, root="a/../b"), "is not a name in"),
    "out of it": (lambda p: archive(p, **{"../x": b""}), "'archive/../x' is not a name in"),
    "at the root": (lambda p: archive(p, root=""), "is not a name in"),
    "other names": (changed(b"archive/version", b"brchive/version", True), "is not a name in"),
    "a name that is another": (
        changed(b"archive/version", b"archive/versiom", True), "has another name in its header",
    ),
    "a name of controls": (lambda p: archive(p, **{"a\x1b[1mb": b""}), "is not a name in"),
    "no pickle": (lambda p: archive(p, **{"data.pkl": None}), "it has no 'data.pkl'"),
    "no version": (lambda p: archive(p, version=None), "it has no 'version'"),
    "version 11": (lambda p: archive(p, version=b"11\n"), "its version is b'11'"),
    "version x": (lambda p: archive(p, version=b"x"), "its version is b'x'"),
    "a long version": (lambda p: archive(p, version=b"1" * 100), "more than 16 bytes"),
    "a long pickle": (
        lambda p: archive(p, **{"data.pkl": bytes(2**24 + 1)}), "more than 16,777,216 bytes",
    ),
    "another byte order": (lambda p: archive(p, byteorder=b"big"), "of another byte order"),
    "no end": (lambda p: archive(p, **{"data.pkl": b"\x80\x02N"}), "pickle exhausted"),
    "a header that is none": (changed(b"PK\3\4", b"PK\3\5"), "has no header"),
    "one in another": (overlapping, "claims bytes that are not its own"),
    "a damaged pickle": (changed(b"\x80\x02N.", b"\x80\x02K."), "a checksum differs"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "said"), ARCHIVES.values(), ids=ARCHIVES)
def test_an_archive_that_torch_save_does_not_write_is_refused(tmp_path, monkeypatch, make, said):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "x.pt")
    assert said in refusal(tmp_path / "x.pt")


def test_every_truncation_is_refused(tmp_path):
    data = (REFERENCE / "ckpt_bias.pt").read_bytes()
    path = tmp_path / "x.pt"
    for length in range(0, len(data), len(data) // 40):
        path.write_bytes(data[:length])
        refusal(path)


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "endless.pt").symlink_to("/dev/zero")
    for name in ("pipe.pt", "folder.pt", "endless.pt"):
        assert "it is no regular file" in refusal(tmp_path / name)
    assert "cannot be read: No such file or directory" in refusal(tmp_path / "nothing.pt")


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    path = tmp_path_factory.mktemp("valid") / "x.pt"
    state = {"b": tensor(np.arange(6, dtype=np.float32)), "c": tensor(np.float32(1))}
    save(path, {"model": OrderedDict(state), "n": 3, "config": {"dataset": "x"}})
    return path.read_bytes()


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "delete", "copy"]),
        st.integers(0, 10**6),
        st.integers(0, 10**6),
        st.integers(1, 255),
    ),
    min_size=1,
    max_size=3,
)


@settings(
    max_examples=300, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(EDITS)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_file_that_was_changed_holds_the_same_values_or_is_refused(valid, tmp_path, edits):
    path = tmp_path / "x.pt"
    path.write_bytes(valid)
    expected = plain(load(path))
    data = bytearray(valid)
    for kind, a, b, byte in edits:
        a, b = a % len(data), b % len(data)
        if kind == "flip":
            data[a] ^= byte
        elif kind == "insert":
            data[a:a] = bytes([byte] * (b % 9))
        elif kind == "delete":
            del data[a : a + b % 9]
        else:
            data[a : a + 16] = data[b : b + 16]
    path.write_bytes(data)
    try:
        found = plain(load(path))
    except UserError:
        refusal(path)
    else:
        assert found == expected
