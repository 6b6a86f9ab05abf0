"""Which data sets --dataset names, and whose turn a sample is."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_jax.errors import UserError
from gpt_jax.prepare import mixture
from gpt_jax.prepare.checked import open_dataset, sizes
from gpt_jax.prepare.mixture import prepare_sets, sets_of, turns

EXAMPLES = settings(derandomize=True, deadline=None, database=None)  # the same everywhere


def refused(dataset, what=sets_of):
    with pytest.raises(UserError) as error:
        what(dataset)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"dataset={dataset!r}")
    return message


@pytest.mark.parametrize(
    ("dataset", "shares"),
    [
        ("openwebtext", {"openwebtext": None}),
        ("web/2024", {"web/2024": None}),
        (" my set", {" my set": None}),
        ("a:0.7,b:0.3", {"a": Fraction(7, 10), "b": Fraction(3, 10)}),
        ("a:7, b:3", {"a": Fraction(7, 10), "b": Fraction(3, 10)}),
        ("a:.5,b:.25,c:0.250", {"a": Fraction(1, 2), "b": Fraction(1, 4), "c": Fraction(1, 4)}),
        ("b,a", {"b": None, "a": None}),
    ],
)
def test_a_mixture_is_its_sets_and_their_shares(dataset, shares):
    assert list(sets_of(dataset).items()) == list(shares.items())


@pytest.mark.parametrize(
    ("dataset", "part"),
    [
        ("a:0.7,b:0.3,", "a data set has no name"),
        (",", "a data set has no name"),
        (":1,b:2", "a data set has no name"),
        ("a:0.7,b:0", "the weight '0' of 'b' is not a number above 0"),
        ("a:0.7,b:0.000", "the weight '0.000' of 'b' is not a number above 0"),
        ("a:0.7,b:-1", "the weight '-1' of 'b'"),
        ("a:0.7,b:nan", "the weight 'nan' of 'b'"),
        ("a:0.7,b:inf", "the weight 'inf' of 'b'"),
        ("a:0.7,b:1e999999999", "the weight '1e999999999' of 'b'"),
        ("a:0.7,b:1/0", "the weight '1/0' of 'b'"),
        ("a:0.7,b:9999999999", "the weight '9999999999' of 'b'"),
        ("a:0.7,b:", "the weight '' of 'b'"),
        ("a:0.7,b:1:2", "the weight '1:2' of 'b'"),
        ("a:0.7,b:\u0663", "of 'b' is not a number above 0"),
        ("a:0.7,b", "give each of several data sets a weight, or none"),
        ("a:0.7", "give each of several data sets a weight, or none"),
        ("a:1,b:1,a:1", "names 'a' twice: give it one weight"),
        ("a,./a", "names './a' twice"),
    ],
)
def test_what_is_no_mixture_is_refused_in_one_line(dataset, part):
    assert part in refused(dataset)


def test_a_share_too_small_for_the_cycle_is_refused():
    dataset = "a:100000,b:1"
    shares = list(sets_of(dataset).values())
    assert "the smallest weight is less than 1/10,000 of the sum" in refused(
        dataset, lambda name: turns(shares, name)
    )


SHARES = st.lists(st.integers(1, 100), min_size=2, max_size=8).map(
    lambda weights: [Fraction(weight, sum(weights)) for weight in weights]
)


@EXAMPLES
@given(SHARES)
def test_after_any_number_of_turns_each_set_is_within_one_of_its_share(shares):
    cycle = np.array(turns(shares, ""))
    n = np.arange(1, len(cycle) + 1)
    for i, share in enumerate(shares):
        # in whole numbers: share is a fraction of len(cycle)
        off = np.cumsum(cycle == i) * len(cycle) - n * int(share * len(cycle))
        assert (abs(off) < len(cycle)).all()
        assert off[-1] == 0


def test_a_cycle_is_as_short_as_its_weights_allow():
    assert turns([Fraction(2, 3), Fraction(1, 3)], "") == (0, 0, 1)
    assert turns([Fraction(1, 2), Fraction(1, 2)], "") == (0, 1)
    assert len(turns([Fraction(7, 10), Fraction(3, 10)], "")) == 10


@EXAMPLES
@given(st.lists(st.integers(10**6, 10**9), min_size=2, max_size=5))
def test_weights_that_fit_no_short_cycle_are_rounded_to_a_10000th_of_their_sum(weights):
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    if min(shares) * 10_000 < 1:
        return
    cycle = turns(shares, "")
    assert len(cycle) <= mixture.LONGEST_CYCLE
    for i, share in enumerate(shares):
        assert abs(Fraction(cycle.count(i), len(cycle)) - share) < Fraction(1, 10_000)


# ---- the sets of a mixture are opened together


def make(name, symbols="abc", vocab_size=3, n=100, kind="char", **files):
    folder = Path("data", name)
    folder.mkdir(parents=True)
    tokenizer = {"kind": kind} | ({"symbols": symbols} if kind == "char" else {})
    meta = {"tokenizer": tokenizer, "vocab_size": vocab_size, "dtype": "uint16"}
    (folder / "meta.json").write_text(json.dumps(meta))
    for split in ("train", "val"):
        np.full(n, len(name) % 3, "<u2").tofile(folder / f"{split}.bin")


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_sets_by_size_are_one_set_of_all_files():
    make("a")
    make("bb", n=50)
    _, _, splits = open_dataset("data", "a,bb", 10)
    assert splits["train"].turns == (0,)
    assert [file.part for file in splits["train"].files] == [0, 0]
    assert splits["train"].lengths.tolist() == [100, 50]


def test_sets_by_weight_take_turns_and_are_told_of():
    make("a")
    make("bb", n=50)
    said = []
    tokenizer, vocab_size, splits = open_dataset("data", "bb:1,a:3", 10, log=said.append)
    assert (tokenizer.to_json()["symbols"], vocab_size) == ("abc", 3)
    for split in splits.values():
        assert [file.path.parent.name for file in split.files] == ["bb", "a"]
        assert [file.part for file in split.files] == [0, 1]
        assert sorted(split.turns) == [0, 1, 1, 1]
    assert said == [
        f"{split}: {line}"
        for split in ("train", "val")
        for line in (
            "bb, 50 tokens in 1 file, 25.00% of the samples",
            "a, 100 tokens in 1 file, 75.00% of the samples",
        )
    ]
    assert sizes(splits) == {
        "files of train": 2, "files of val": 2,
        "tokens in data/bb/train.bin": 50, "tokens in data/a/train.bin": 100,
        "tokens in data/bb/val.bin": 50, "tokens in data/a/val.bin": 100,
    }  # fmt: skip


def test_one_set_of_one_file_is_not_told_of():
    make("a")
    said = []
    open_dataset("data", "a", 10, log=said.append)
    assert said == []


@pytest.mark.parametrize(
    "other",
    [
        {"symbols": "abd"},
        {"vocab_size": 64},
        {"kind": "byte", "vocab_size": 256},
    ],
)
@pytest.mark.parametrize("dataset", ["a:1,b:1", "a,b"])
def test_sets_with_other_ids_are_not_mixed(other, dataset):
    make("a")
    make("b", **other)
    message = refused(dataset, lambda name: open_dataset("data", name, 10))
    assert "a has a char tokenizer of 3 ids and vocab_size=3, b a " in message


def test_a_set_of_a_mixture_that_is_not_there_is_named():
    make("a")
    with pytest.raises(UserError, match=r"^there is no data set in data/b: `python -m gpt_jax\.pr"):
        prepare_sets("data", "a:0.5,b:0.5")


def test_small_sets_of_a_mixture_are_made_when_first_used(monkeypatch):
    made = []
    monkeypatch.setattr(mixture, "prepare_on_first_use", lambda *what: made.append(what))
    prepare_sets("data", "pystdlib:1,text:3")
    assert made == [("pystdlib", Path("data/pystdlib")), ("text", Path("data/text"))]
    del made[:]
    prepare_sets("data", "web/2024")
    assert made == [("web/2024", Path("data/web/2024"))]
