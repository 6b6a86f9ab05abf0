"""Token files, and which windows of them a step reads."""

import itertools
import math
import os
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from gpt_jax import data
from gpt_jax.data import (
    Split,
    batch_starts,
    batches,
    evaluation_starts,
    locate,
    mix,
    permute,
    place,
    window_starts,
)
from gpt_jax.errors import UserError
from gpt_jax.integrity.token_file import TokenFile, open_file
from gpt_jax.prepare.mixture import turns
from gpt_jax.sharding import batch_sharding, make_mesh

ONE = make_mesh("cpu:0")
EXAMPLES = settings(derandomize=True, deadline=None, database=None)  # the same everywhere


def open_split(folder, name, vocab_size, dtype, block_size):
    return Split((open_file(folder / f"{name}.bin", dtype),), vocab_size, block_size)


@pytest.fixture
def split(tmp_path):
    """A file of 1,003 different tokens, so that a token tells its place."""
    np.arange(1003, dtype="<u2").tofile(tmp_path / "train.bin")
    return open_split(tmp_path, "train", 1003, "uint16", 10)


def epoch(n_tokens, block_size, seed, number):
    n = max(1, (n_tokens - block_size) // block_size)
    return window_starts(np.array([n_tokens]), block_size, seed, np.arange(n) + number * n)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_mix_is_splitmix64():
    with np.errstate(over="ignore"):
        states = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert mix(states).tolist() == published


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1000, 4096])
def test_permute_is_a_bijection_and_each_key_its_own(n):
    orders = []
    for key in range(3):
        index = np.arange(n, dtype=np.uint64)
        order = permute(index, n, mix(np.full_like(index, key + 1)))
        assert sorted(order.tolist()) == list(range(n))
        orders.append(tuple(order))
    if n >= 15:
        assert len({*orders, tuple(range(n))}) == 4


def test_permute_sends_every_index_to_every_place_about_equally_often():
    n, keys = 100, 7000
    index = np.tile(np.arange(n, dtype=np.uint64), keys)
    key = mix(np.repeat(np.arange(1, keys + 1, dtype=np.uint64), n))
    counts = np.zeros((n, n))
    np.add.at(counts, (index, permute(index, n, key)), 1)
    chi_square = ((counts - keys / n) ** 2 / (keys / n)).sum()
    assert chi_square / (n - 1) ** 2 < 1.2  # 1 if it were chance


@pytest.mark.parametrize("n_tokens", [11, 12, 19, 20, 21, 29, 30, 31, 100, 1003])
def test_every_epoch_visits_each_window_once_and_none_overlap_but_by_one_token(n_tokens):
    """T5: nanoGPT draws with replacement; here no token is a target twice in an epoch."""
    for number in range(20):
        starts = np.sort(epoch(n_tokens, 10, 1337, number))
        assert len(starts) == max(1, (n_tokens - 10) // 10)
        assert (np.diff(starts) == 10).all()  # so the last target is the next one's first input
        assert starts[0] >= 0
        assert starts[-1] + 10 + 1 <= n_tokens


@pytest.mark.parametrize("block_size", [1, 2, 7, 10])
def test_no_window_runs_past_the_file_however_short(block_size):
    for n_tokens in range(block_size + 1, 5 * block_size + 3):
        starts = window_starts(np.array([n_tokens]), block_size, 5, np.arange(300))
        assert starts.min() >= 0
        assert starts.max() + block_size + 1 <= n_tokens


def test_every_token_of_a_file_is_read_in_some_epoch():
    seen = np.zeros(1003, bool)
    for number in range(60):
        for start in epoch(1003, 10, 1337, number):
            seen[start : start + 11] = True
    assert seen.all()


def test_epochs_are_shifted_and_shuffled_differently():
    shifts, orders = set(), set()
    for number in range(100):
        starts = epoch(1003, 10, 1337, number)
        shifts.add(int(starts.min()))
        orders.add(tuple((starts - starts.min()) // 10))
    assert shifts == set(range(13))  # 99 windows of 10 leave 12 of the 1,003 tokens, and a target
    assert len(orders) == 100
    assert not any((np.diff(order) == 1).all() for order in orders)


def test_seeds_give_different_streams():
    streams = {
        tuple(window_starts(np.array([1003]), 10, seed, np.arange(50))) for seed in range(100)
    }
    assert len(streams) == 100


def test_any_step_is_read_from_its_place_in_the_stream(split):
    """C10: what a resumed run reads follows from the step alone."""
    stream = window_starts(np.array([1003]), 10, 7, np.arange(6000))
    for step in (0, 1, 16, 17, 499, 998):  # 99 windows an epoch: steps run across its end
        expected = stream[step * 6 : step * 6 + 6].reshape(2, 3)
        np.testing.assert_array_equal(batch_starts(split, (2, 3), 7, step), expected)


def test_the_stream_is_the_one_that_older_runs_were_trained_on():
    """A resumed run goes on with the data it would have had: changing these breaks old runs."""
    starts = window_starts(np.array([1003]), 10, 1337, np.array([0, 1, 2, 98, 99, 100, 10**12]))
    assert starts.tolist() == [569, 839, 59, 19, 681, 581, 361]


def test_micro_batches_of_any_shape_read_the_same_samples(split):
    """C10, C13: devices take accumulation steps or rows, and the update reads the same."""
    for step in (0, 3, 50):
        flat = batch_starts(split, (1, 24), 3, step).ravel()
        for shape in ((24, 1), (2, 12), (12, 2), (3, 8), (8, 3)):
            np.testing.assert_array_equal(batch_starts(split, shape, 3, step).ravel(), flat)


def test_targets_are_the_tokens_shifted_by_one(split):
    starts = batch_starts(split, (2, 4), 1337, 0)
    tokens, targets = place(split, starts, batch_sharding(ONE, 3))
    assert tokens.shape == targets.shape == (2, 4, 10)
    assert tokens.dtype == targets.dtype == np.int32
    np.testing.assert_array_equal(tokens, starts[..., None] + np.arange(10))
    np.testing.assert_array_equal(targets, np.asarray(tokens) + 1)


@pytest.mark.parametrize("first", [0, 1, 5, 40])
def test_batches_read_ahead_are_those_placed_directly_from_any_step(split, first):
    sharding = batch_sharding(ONE, 3)
    stream = batches(split, (2, 3), 1337, first, sharding)
    for step, (tokens, targets) in enumerate(itertools.islice(stream, 6), first):
        x, y = place(split, batch_starts(split, (2, 3), 1337, step), sharding)
        np.testing.assert_array_equal(tokens, x)
        np.testing.assert_array_equal(targets, y)
    stream.close()


def test_rows_spread_over_eight_devices_are_the_rows_of_one(split):
    """C12."""
    starts = batch_starts(split, (2, 16), 1337, 4)
    one = place(split, starts, batch_sharding(ONE, 3))
    mesh = make_mesh()
    eight = place(split, starts, batch_sharding(mesh, 3))
    whole = place(split, starts, NamedSharding(mesh, PartitionSpec()))
    for a, b, c in zip(one, eight, whole, strict=True):
        assert {shard.data.shape for shard in b.addressable_shards} == {(2, 2, 10)}
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


def test_each_device_reads_its_own_rows_alone(split, monkeypatch):
    read = []
    windows = data.Split.windows
    monkeypatch.setattr(data.Split, "windows", lambda *a: read.append(a[1].shape) or windows(*a))
    place(split, batch_starts(split, (2, 16), 1337, 0), batch_sharding(make_mesh(), 3))
    assert read == [(2, 2)] * 16  # 8 devices, tokens and targets


def test_evaluation_windows_tile_the_split_in_order(split):
    starts = evaluation_starts(split)
    assert starts.tolist() == list(range(0, 1000, 10))
    assert evaluation_starts(split, 100).tolist() == starts.tolist()
    assert evaluation_starts(split, 10**9).tolist() == starts.tolist()


@pytest.mark.parametrize("at_most", [1, 2, 3, 7, 50, 99])
def test_fewer_evaluation_windows_spread_evenly_over_the_split(split, at_most):
    """T13: nanoGPT draws anew at each evaluation; here they are the same every time."""
    starts = evaluation_starts(split, at_most)
    assert len(starts) == at_most
    assert set(starts.tolist()) <= set(evaluation_starts(split).tolist())
    steps = np.diff(np.append(starts, 1000)) // 10
    assert set(steps.tolist()) <= {100 // at_most, math.ceil(100 / at_most)}


@pytest.mark.parametrize(("n_tokens", "windows"), [(11, 1), (20, 1), (21, 2), (30, 2), (31, 3)])
def test_evaluation_leaves_out_only_the_tail_that_fills_no_window(tmp_path, n_tokens, windows):
    np.zeros(n_tokens, "<u2").tofile(tmp_path / "val.bin")
    split = open_split(tmp_path, "val", 5, "uint16", 10)
    assert evaluation_starts(split).tolist() == [10 * i for i in range(windows)]


def test_evaluating_between_steps_leaves_the_training_stream_alone(split):
    """Appendix A 14: in nanoGPT each evaluation moves the training stream on."""
    sharding = batch_sharding(ONE, 3)

    def read(evaluating):
        stream, seen = batches(split, (2, 3), 1337, 0, sharding), []
        for _ in range(5):
            if evaluating:
                place(split, evaluation_starts(split, 8), batch_sharding(ONE, 2))
                np.random.default_rng(0).random()
            seen.append(np.asarray(next(stream)[0]).tolist())
        stream.close()
        return seen

    assert read(evaluating=True) == read(evaluating=False)


# ---- several files, several sets


def made_of(*sizes, sets=None, turns=(0,), block_size=10):
    """Files of these many tokens, no two tokens of all the same."""
    ids = np.split(np.arange(sum(sizes), dtype=np.uint32), np.cumsum(sizes)[:-1])
    files = [
        TokenFile(Path(f"file{i}"), tokens, part=part)
        for i, (tokens, part) in enumerate(zip(ids, sets or [0] * len(sizes), strict=True))
    ]
    return Split(tuple(files), sum(sizes), block_size, turns)


def inside(starts, sizes, block_size=10):
    """The file of each window, which holds it and the target of its last token."""
    files, places = locate(starts, np.array(sizes))
    assert (places >= 0).all()
    assert (places + block_size + 1 <= np.array(sizes)[files]).all()
    return files


SIZES = st.lists(st.integers(11, 200), min_size=1, max_size=6)


@EXAMPLES
@given(SIZES, st.integers(0, 2**32 - 1), st.integers(0, 50))
def test_an_epoch_visits_each_window_of_every_file_once_and_crosses_no_files_end(
    sizes, seed, number
):
    counts = [max(1, (size - 10) // 10) for size in sizes]
    samples = np.arange(sum(counts)) + number * sum(counts)
    starts = window_starts(np.array(sizes), 10, seed, samples)
    assert np.bincount(inside(starts, sizes), minlength=len(sizes)).tolist() == counts
    for i in range(len(sizes)):
        own = np.sort(starts[inside(starts, sizes) == i])
        assert (np.diff(own) == 10).all()


def test_every_token_of_every_file_is_read_in_some_epoch():
    sizes = np.array([64, 23, 11, 105])
    seen = np.zeros(sizes.sum(), bool)
    for start in window_starts(sizes, 10, 1337, np.arange(2000)):
        seen[start : start + 11] = True
    assert seen.all()


def test_files_of_one_size_are_cut_differently():
    starts = window_starts(np.array([105] * 20), 10, 1337, np.arange(180))
    assert len({int(place) % 10 for place in locate(starts, np.array([105] * 20))[1]}) > 5


@EXAMPLES
@given(SIZES, st.integers(0, 1))
def test_windows_are_read_from_the_files_that_hold_them(sizes, shift):
    split = made_of(*sizes)
    starts = batch_starts(split, (3, 4), 7, 5)
    expected = starts[..., None] + shift + np.arange(10)
    np.testing.assert_array_equal(split.windows(starts, shift), expected)


def test_evaluation_tiles_each_file():
    split = made_of(11, 30, 31, 10, 41)
    starts = evaluation_starts(split)
    assert starts.tolist() == [0, 11, 21, 41, 51, 61, 82, 92, 102, 112]
    assert evaluation_starts(split, 5).tolist() == [0, 21, 51, 82, 102]


def test_an_unknown_id_in_a_later_file_is_named_by_its_place_there():
    split = replace(made_of(40, 40, 40), vocab_size=57)
    with pytest.raises(UserError, match=r"^file1: token 17 is 57, but vocab_size=57"):
        split.windows(np.array([0, 50]))


@st.composite
def mixtures(draw):
    """A split of a few sets, each of a few files, and how many sets there are."""
    n = draw(st.integers(2, 4))
    shares = [Fraction(draw(st.integers(1, 20))) for _ in range(n)]
    cycle = turns([share / sum(shares) for share in shares], "")
    files = [
        (draw(st.integers(11, 150)), i) for i in range(n) for _ in range(draw(st.integers(1, 3)))
    ]
    sizes, sets = zip(*files, strict=True)
    return made_of(*sizes, sets=sets, turns=cycle), n


def set_of(split, starts):
    files, _ = locate(starts, split.lengths)
    return np.array([file.part for file in split.files])[files]


@EXAMPLES
@given(mixtures(), st.integers(0, 2**32 - 1), st.integers(0, 10**9))
def test_each_set_of_a_mixture_has_its_share_of_any_stretch(mixture, seed, first):
    """Within one sample of it from the first sample on, so within two from any other on."""
    split, n = mixture
    its = set_of(split, batch_starts(split, (1, 60), seed, first).ravel())
    shares = np.array([split.turns.count(i) for i in range(n)]) / len(split.turns)
    for length in range(1, 61):
        off = np.bincount(its[:length], minlength=n) - length * shares
        assert (abs(off) < (2 if first else 1)).all()


@EXAMPLES
@given(mixtures(), st.integers(0, 2**32 - 1))
def test_each_set_of_a_mixture_is_read_as_it_is_alone(mixture, seed):
    """So without replacement in its own epochs, at whatever rate."""
    split, _ = mixture
    starts = batch_starts(split, (1, 500), seed, 0).ravel()
    its = set_of(split, starts)
    for i, (_, lengths, first) in enumerate(split.sets):
        own = starts[its == i] - first
        assert own.tolist() == window_starts(lengths, 10, seed, np.arange(len(own))).tolist()


@EXAMPLES
@given(mixtures(), st.integers(0, 1000), st.sampled_from([(1, 24), (24, 1), (4, 6), (3, 8)]))
def test_any_step_of_a_mixture_is_read_from_its_place_in_the_stream(mixture, step, shape):
    """C10: whatever the shape of a batch, what was read before does not matter."""
    split, _ = mixture
    stream = batch_starts(split, (step + 1, 24), 7, 0)
    assert batch_starts(split, shape, 7, step).ravel().tolist() == stream[step].tolist()


def test_rows_of_a_mixture_spread_over_eight_devices_are_the_rows_of_one():
    """C12."""
    split = made_of(100, 57, 300, sets=(0, 0, 1), turns=(0, 1, 0))
    starts = batch_starts(split, (2, 16), 1337, 4)
    one = place(split, starts, batch_sharding(ONE, 3))
    eight = place(split, starts, batch_sharding(make_mesh(), 3))
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_array_equal(a, b)


@EXAMPLES
@given(mixtures(), st.integers(1, 100))
def test_a_mixture_is_evaluated_in_the_shares_in_which_it_is_trained_on(mixture, at_most):
    split, n = mixture
    starts = evaluation_starts(split, at_most)
    total = sum((size - 1) // 10 for size in split.lengths)
    assert len(starts) == min(at_most, total)
    inside(starts, split.lengths)
    first = np.array([*split.turns] * len(starts))[: len(starts)]
    assert (
        np.bincount(set_of(split, starts), minlength=n).tolist()
        == np.bincount(first, minlength=n).tolist()
    )


def test_a_set_that_is_too_small_to_be_evaluated_on_in_its_share_is_taken_several_times():
    split = made_of(21, 1001, sets=(0, 1), turns=(0, 1))
    starts = evaluation_starts(split, 8)
    assert starts.tolist() == [0, 0, 10, 10, 21, 271, 521, 771]


# ---- what is wrong is named


@pytest.mark.parametrize("bad", [0, 37, 98, 99, 100])
def test_an_unknown_id_is_refused_when_read_with_file_offset_and_id(tmp_path, bad):
    """C20: the ends of the file are the first token of a window and the last target of one."""
    tokens = np.zeros(101, "<u2")
    tokens[bad] = 70
    tokens.tofile(tmp_path / "val.bin")
    split = open_split(tmp_path, "val", 65, "uint16", 10)
    with pytest.raises(UserError) as error:
        place(split, evaluation_starts(split), batch_sharding(ONE, 2))
    assert f"{tmp_path / 'val.bin'}: token {bad} is 70, but vocab_size=65" in one_line(error)


def test_an_unknown_id_read_ahead_is_refused_where_its_batch_is_asked_for(tmp_path):
    """C20."""
    tokens = np.zeros(101, "<u2")
    good = open_split_of(tmp_path, tokens)
    late = batch_starts(good, (1, 2), 1337, 3)[0, 0]
    assert late not in batch_starts(good, (3, 2), 1337, 0)
    tokens[late + 5] = 300
    stream = batches(open_split_of(tmp_path, tokens), (1, 2), 1337, 0, batch_sharding(ONE, 3))
    for _ in range(3):
        next(stream)
    with pytest.raises(UserError, match=f"token {late + 5} is 300"):
        next(stream)


def open_split_of(folder, tokens):
    tokens.tofile(folder / "train.bin")
    return open_split(folder, "train", 65, "uint16", 10)


def rewrite(path):
    """The same size at a later time, in place."""
    with open(path, "r+b") as file:
        file.write(b"\7\0")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def exchange(path):
    """The same size, time and bytes, under another inode."""
    shutil.copy2(path, path.with_name("other"))
    os.replace(path.with_name("other"), path)


CHANGES = {
    "cut short": lambda path: os.truncate(path, 100),
    "emptied": lambda path: os.truncate(path, 0),
    "grown": lambda path: os.truncate(path, 10_000),
    "rewritten": rewrite,
    "exchanged": exchange,
    "removed": Path.unlink,
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_that_changes_while_in_use_is_named_before_it_is_read(split, change):
    """Read all the same, the file cut short would end the process by SIGBUS."""
    of_model = replace(split, vocab_size=2000)  # as train.py does
    split.windows(np.array([900]))
    change(split.files[0].path)
    for used in (split, of_model):
        with pytest.raises(UserError) as error:
            used.windows(np.array([900]))
        message = one_line(error)
        assert message.startswith(
            f"{split.files[0].path} was replaced, written to or removed while in use"
        )
        assert "2,006 bytes" in message


def test_a_change_is_named_where_the_batch_after_it_is_asked_for(split):
    stream = batches(split, (1, 2), 1337, 0, batch_sharding(ONE, 3))
    next(stream)
    exchange(split.files[0].path)
    with pytest.raises(UserError, match="while in use"):
        list(itertools.islice(stream, 4))  # those that were read ahead are whole


def test_a_file_that_is_only_read_elsewhere_is_not_changed(split):
    path = split.files[0].path
    path.read_bytes()
    os.utime(path, ns=(0, path.stat().st_mtime_ns))
    path.chmod(0o444)
    assert split.windows(np.array([5])).tolist() == [list(range(5, 15))]


def test_tokens_of_no_file_have_nothing_to_change():
    split = Split((TokenFile(Path("nowhere"), np.arange(20, dtype=np.uint16)),), 20, 10)
    assert split.windows(np.array([5])).tolist() == [list(range(5, 15))]


def test_a_file_of_one_window_is_enough(tmp_path):
    np.arange(11, dtype="<u2").tofile(tmp_path / "train.bin")
    split = open_split(tmp_path, "train", 11, "uint16", 10)
    tokens, targets = place(split, batch_starts(split, (1, 2), 1, 9), batch_sharding(ONE, 3))
    assert np.asarray(tokens).tolist() == [[list(range(10))] * 2]
    assert np.asarray(targets).tolist() == [[list(range(1, 11))] * 2]


def test_uint32_files_hold_ids_beyond_uint16(tmp_path):
    ids = np.arange(30) + 100_000
    ids.astype("<u4").tofile(tmp_path / "train.bin")
    split = open_split(tmp_path, "train", 100_030, "uint32", 10)
    starts = evaluation_starts(split)
    np.testing.assert_array_equal(split.windows(starts), ids[starts[:, None] + np.arange(10)])
    with pytest.raises(UserError, match="token 29 is 100029, but vocab_size=100029"):
        open_split(tmp_path, "train", 100_029, "uint32", 10).windows(starts, 10)


def test_files_are_little_endian_on_any_machine(tmp_path):
    (tmp_path / "train.bin").write_bytes(b"\x01\x00\x00\x01")
    assert open_split(tmp_path, "train", 257, "uint16", 1).files[0].tokens.tolist() == [1, 256]


def test_a_file_is_mapped_and_not_read_into_memory(split):
    [file] = split.files
    assert isinstance(file.tokens.base, np.memmap)
    assert not file.tokens.flags.writeable


def test_batches_are_on_the_device_before_they_are_asked_for(split):
    """Two are made ahead; each arrives as arrays of the sharding asked for."""
    sharding = batch_sharding(make_mesh(), 3)
    stream = batches(split, (1, 8), 1337, 0, sharding)
    tokens, targets = next(stream)
    assert isinstance(tokens, jax.Array)
    assert tokens.sharding == targets.sharding == sharding
    stream.close()
