"""What was written is what comes back, or it is refused."""

import errno
import json
import os
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_checkpoint import META, ONE, assert_same, plain, real_state, restored, save_one, shapes

from gpt_jax import checkpoint, integrity
from gpt_jax.errors import DamageError, RunError
from gpt_jax.integrity import (
    amend,
    check_digests,
    checksums,
    digests,
    free_bytes,
    replace_file,
    sealed,
    written,
)
from gpt_jax.sharding import make_mesh, placed


def reference(x):
    """The two sums of an array's bits, element by element, in Python's own integers."""
    first = second = 0
    for index, element in enumerate(x.ravel()):
        word = int.from_bytes(element.tobytes(), "little") ^ index * 0x9E3779B9 % 2**32
        word = (word ^ word >> 16) * 0x85EBCA6B % 2**32
        word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
        word ^= word >> 16
        first, second = first + word, second + word * (2 * index + 1)
    return [first % 2**32, second % 2**32]


def sums(*arrays):
    return np.asarray(checksums(list(arrays))).tolist()


@pytest.mark.parametrize("dtype", ["float32", "int32", "uint32", "bfloat16", "float16", "uint8"])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4)])
def test_the_sums_are_those_of_the_slow_reference(dtype, shape):
    x = (100 * np.random.default_rng(0).uniform(size=shape)).astype(jnp.dtype(dtype))
    assert sums(jnp.asarray(x)) == [[*reference(np.asarray(x)), 1]]


def test_they_are_the_same_however_the_array_is_laid_out():
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    mesh = make_mesh(data=2, fsdp=4)
    for spec in (PartitionSpec(), PartitionSpec("data"), PartitionSpec("fsdp", "data")):
        assert sums(jax.device_put(x, NamedSharding(mesh, spec))) == [[*reference(x), 1]]


def test_every_single_bit_that_flips_changes_both_sums():
    x = np.random.default_rng(0).normal(size=6).astype(np.float32)
    for bit in range(8 * x.nbytes):
        data = bytearray(x.tobytes())
        data[bit // 8] ^= 1 << bit % 8
        for before, after in zip(reference(x), reference(np.frombuffer(data, "f4")), strict=True):
            assert before != after, bit


def test_elements_that_change_places_change_the_sums():
    x = np.arange(12, dtype=np.float32)
    assert len({tuple(sums(jnp.asarray(y))[0]) for y in (x, x[::-1], np.roll(x, 1))}) == 3


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_an_array_that_holds_no_number_has_no_digest(number):
    tree = {"a": jnp.ones(3), "b": {"c": jnp.array([0, number, 1])}, "n": jnp.int32(3)}
    found = digests(tree)()
    assert found["b/c"] is None
    assert len(found["a"]) == len(found["n"]) == 16


def test_a_digest_missing_changed_or_too_many_is_refused():
    tree, path = {"a": jnp.ones(3), "b": jnp.zeros(2)}, Path("run/params")
    good = digests(tree)()
    check_digests(path, tree, {"params": good})
    for bad in (
        {**good, "a": good["b"]}, {"a": good["a"]}, {**good, "c": good["a"]}, {}, None, [],
        {**good, "a": None}, {**good, "a": ["x"]},
    ):  # fmt: skip
        with pytest.raises(DamageError, match="run/params "):
            check_digests(path, tree, {"params": bad})
    for nothing in ({}, None, [], "x"):
        with pytest.raises(DamageError, match="no digests"):
            check_digests(path, tree, nothing)


# --- a checkpoint's files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("saved")
    state = real_state(ONE)
    save_one(out_dir, state, {**META, "iter": 600})
    return out_dir, plain(state)


@pytest.fixture
def run(saved, tmp_path):
    """A copy to damage, its files, and the state that it holds."""
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    files = [path for path in (tmp_path / "checkpoints" / "600").rglob("*") if path.is_file()]
    return tmp_path, sorted(files), saved[1]


def outcome(run):
    """ "refused", or "same" where the damage is in bytes that nobody reads; anything else fails."""
    out_dir, _, state = run
    try:
        back = restored(out_dir, 600, ONE)
    except DamageError as error:
        said = str(error)
    else:
        assert_same(plain(back), state)
        return "same"
    assert str(out_dir / "checkpoints" / "600") in said
    assert "\n" not in said
    return "refused"


def test_of_200_single_bits_that_flip_each_is_refused_or_changes_nothing(run, capfd):
    """C17: half of them in files drawn by size, half in files drawn alike."""
    _, files, _ = run
    draw, found = random.Random(1), []
    sizes = [path.stat().st_size for path in files]
    for n in range(200):
        path = draw.choice(files) if n % 2 else draw.choices(files, sizes)[0]
        data = path.read_bytes()
        bit = draw.randrange(8 * len(data))
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        found.append(outcome(run))
        path.write_bytes(data)
    assert found.count("refused") > 80
    assert "Traceback" not in capfd.readouterr().err
    assert outcome(run) == "same"


@pytest.mark.parametrize("how", ["cut", "emptied", "deleted", "a folder"])
def test_a_file_cut_emptied_or_deleted_is_refused_or_was_never_needed(run, how, capfd):
    """C18: each file of a checkpoint in turn."""
    _, files, _ = run
    for path in files:
        data = path.read_bytes()
        path.unlink()
        if how == "a folder":
            path.mkdir()
        elif how != "deleted":
            path.write_bytes(data[: len(data) // 2 if how == "cut" else 0])
        result = outcome(run)
        if path.parts[-2:] == ("meta", "metadata") or path.name == "_METADATA":
            assert result == "refused", path
        if how == "a folder":
            path.rmdir()
        path.write_bytes(data)
    assert "Traceback" not in capfd.readouterr().err
    assert outcome(run) == "same"


def test_another_dtype_is_refused_and_never_cast(run):
    """C19: to Orbax a target of another dtype is a wish to cast."""
    like = placed(ONE, shapes())
    half = jax.tree.map(lambda x: x.update(dtype=jnp.bfloat16), like.params)
    meta = checkpoint.read_meta(str(run[0]), 600)
    with pytest.raises(DamageError, match=r"holds other arrays .*float32.* not .*bfloat16"):
        checkpoint.restore(str(run[0]), 600, like.replace(params=half), meta)


def test_more_bytes_than_the_files_can_hold_are_refused_before_they_are_allocated(tmp_path):
    """C26: what is not stored reads as zeros, any number of them."""
    zeros = jnp.zeros(2**24, jnp.float32)
    state = real_state(ONE).replace(params={"a": zeros})
    save_one(tmp_path, state, META)
    path = tmp_path / "checkpoints" / "1"
    like = jax.eval_shape(lambda: {"a": zeros})
    with pytest.raises(DamageError, match=r"claims 67,108,864 bytes of arrays, but its files have"):
        checkpoint.restore_tree(path, "params", like, {})


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["params", "optimizer"])
def test_a_state_that_holds_no_number_is_never_saved(tmp_path, number, where):
    """C22."""
    state = real_state(ONE)
    if where == "params":
        state = state.replace(params={**state.params, "ln_f": {"weight": jnp.full(16, number)}})
    else:
        state = state.replace(loss_scale=jnp.float32(number))
    leaf = {"params": "params/ln_f/weight", "optimizer": "optimizer/loss_scale"}[where]
    save_one(tmp_path, real_state(ONE), META)
    with pytest.raises(RunError, match=f"iteration 2 is not saved, {leaf} holds nan or inf"):
        save_one(tmp_path, state, {**META, "iter": 2, "val_loss": 0.1})
    assert checkpoint.steps(str(tmp_path)) == [1]


# --- files of text


def test_a_seal_holds_whatever_the_order_and_tells_of_every_change():
    meta = sealed({"iter": 1, "config": {"a": 1.5, "b": [None, float("nan")]}, "text": "ä"})
    assert sealed(meta)["sha256"] == meta["sha256"]
    assert sealed(dict(reversed(meta.items())))["sha256"] == meta["sha256"]
    assert sealed(json.loads(json.dumps(meta)))["sha256"] == meta["sha256"]
    for change in ({"iter": 2}, {"config": {"a": 1.25}}, {"more": None}):
        assert sealed({**meta, **change})["sha256"] != meta["sha256"]


def test_a_file_that_is_replaced_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "file"
    replace_file(path, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("plug pulled")))
    with pytest.raises(OSError, match="plug pulled"):
        replace_file(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    replace_file(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_sealed_json_can_be_amended(run):
    path = run[0] / "checkpoints" / "600" / "meta" / "metadata"
    amend(path, {"val_loss": 0.25})
    assert checkpoint.read_meta(str(run[0]), 600)["val_loss"] == 0.25


def test_why_a_write_failed_is_said_whatever_tensorstore_says_behind_it(tmp_path):
    path = f"{tmp_path}/ocdbt.process_0/d/4242c06d120a57df2b268e0622867995"
    why = f'OUT_OF_RANGE: Error writing "p1.weight/.zarray": Failed writing: "{path}": Failed to '
    why += f"write {'1' * 200} bytes to file 4: No space left on device"
    for behind in ("", " [os_error_code='28']", f" [os_error_code='28'] [spec='{'x' * 900}']"):
        with (
            pytest.raises(RunError, match="to file 4: No space left on device;"),
            written(tmp_path),
        ):
            raise ValueError(why + behind)


def test_what_cannot_be_written_is_said_in_a_line_with_the_place_and_its_free_bytes(tmp_path):
    """C16."""
    path = tmp_path / "not" / "there"
    with pytest.raises(RunError) as error, written(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    said = str(error.value)
    assert said.startswith(f"{path} cannot be written (OSError: [Errno 28] No space left")
    assert " bytes are free there): what was saved before is whole" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, "no"), NotADirectoryError(20, "no")]
)
def test_free_bytes_are_no_answer_to_what_is_not_for_want_of_them(tmp_path, error):
    assert free_bytes(tmp_path, error) == ""
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        assert " bytes are free there" in free_bytes(tmp_path, OSError(code, "full"))
    assert " bytes are free there" in free_bytes(tmp_path, ValueError("RESOURCE_EXHAUSTED: disk"))


class Device:
    """A GPU of 100 bytes, of which an update has needed so many."""

    def __init__(self, peak):
        self.peak = peak

    def memory_stats(self):
        return {"bytes_limit": 100, "peak_bytes_in_use": self.peak}


class Leaf:
    nbytes = 10

    def __init__(self, *peaks):
        self.peaks = peaks

    def devices(self):
        return [Device(peak) for peak in self.peaks]


@pytest.mark.parametrize(
    ("peaks", "room"), [((40,), True), ((46,), False), ((47, 47), True), ((40, 48), False)]
)
def test_a_copy_is_made_where_what_an_update_needs_would_fit_twice_beside_it(peaks, room):
    assert integrity.room_for_a_copy({"a": Leaf(*peaks)}) is room


def test_a_cpu_has_room_and_eight_virtual_ones_are_left_alone():
    assert integrity.room_for_a_copy({"a": jax.device_put(np.ones(3), jax.devices()[0])})
    spread = jax.device_put(np.ones(8), NamedSharding(make_mesh(), PartitionSpec("data")))
    assert not integrity.room_for_a_copy({"a": spread})
