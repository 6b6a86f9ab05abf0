"""`--tokenizer=`: which there are, and what one trained on a text is."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers")

from gpt_jax.errors import UserError
from gpt_jax.interop.tokenizer_files import write
from gpt_jax.interop.tokenizers import END_OF_TEXT
from gpt_jax.prepare import prepare, tokenizers
from gpt_jax.prepare.dataset import for_dataset, size_and_dtype
from gpt_jax.prepare.tokenizers import choose, train
from gpt_jax.tokenizer import Tokenizer, from_json

TEXT = "It was the best of times, it was the worst of times.\nNaïve café — 12345!\n" * 30
made_up = settings(derandomize=True, deadline=None, database=None, max_examples=60)


def sample():
    yield from (TEXT[:500], TEXT[500:])


@pytest.fixture(scope="module")
def trained():
    return choose("bpe:297", sample)


def test_char_knows_all_of_the_sample_and_byte_needs_none():
    assert choose("char", sample).spec == {"kind": "char", "symbols": "".join(sorted(set(TEXT)))}
    assert choose("byte").spec == {"kind": "byte"}


def test_a_trained_bpe_has_as_many_ids_as_asked_for_bytes_first_end_of_text_last(trained):
    assert (trained.n_tokens, trained.end_of_text) == (297, 296)
    assert {trained.token_bytes(i) for i in range(256)} == {bytes([b]) for b in range(256)}
    assert trained.token_bytes(296) == END_OF_TEXT.encode()
    assert trained.encode(END_OF_TEXT) == [296]
    assert len(trained.encode(TEXT)) < len(TEXT.encode()) / 3
    assert choose("bpe:257", sample).n_tokens == 257


def test_a_trained_bpe_cuts_words_as_gpt2_does(trained):
    pieces = [trained.token_bytes(i).decode() for i in trained.encode("it was the worst of times")]
    assert pieces == ["it", " was", " the", " worst", " of", " times"]


@made_up
@given(text=st.text() | st.text(alphabet="it was\n'ï"))
def test_any_text_comes_back_from_a_trained_bpe_and_from_its_json(trained, text):
    again = from_json(json.loads(json.dumps(trained.to_json())))
    for text in (text, text + END_OF_TEXT):  # noqa: B020
        ids = trained.encode_ordinary(text)
        assert trained.decode(ids) == text
        assert 296 not in ids
        assert again.encode_ordinary(text) == ids
        assert again.encode(text) == trained.encode(text)


def test_training_gives_the_same_tokenizer_every_time(trained):
    """In another process the library's hashes have other seeds."""
    program = (
        "import sys; from gpt_jax.prepare.tokenizers import train; text = sys.stdin.read();"
        "print(train(297, iter([text[:500], text[500:]])).spec['json'])"
    )
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program], input=TEXT, capture_output=True, text=True,
            encoding="utf-8", cwd=Path(__file__).parents[1], check=True,
        )  # fmt: skip
        assert done.stdout.strip("\n") == trained.spec["json"]


def test_training_reads_no_more_than_the_sample_and_no_long_words(monkeypatch):
    taken = []

    def endless():
        while True:
            taken.append("ab " * 100)
            yield taken[-1]

    monkeypatch.setattr(tokenizers, "SAMPLE", 1000)
    monkeypatch.setattr(tokenizers, "PIECE", 7)
    assert train(258, endless()).token_bytes(256) == b"ab"
    assert len(taken) == 4
    pieces = list(tokenizers._pieces(iter(["ab cd efghijklmn", "", "x" * 2000])))
    assert "".join(pieces) == "ab cd efghijklmn" + "x" * 984
    assert pieces[:5] == ["ab cd", " efghij", "klmn", "xxxxxxx", "xxxxxxx"]


def test_a_text_with_too_little_to_merge_says_how_many_ids_it_gives():
    with pytest.raises(UserError, match=r"bpe:999: the text gives only (\d+) tokens.*use bpe:\1 "):
        choose("bpe:999", lambda: iter(["aa bb aa bb"]))


def test_an_error_while_the_sample_is_read_is_said_as_it_was():
    def broken():
        yield "some text"
        raise UserError("in.txt is not UTF-8 at byte 3")

    with pytest.raises(UserError, match=r"^in\.txt is not UTF-8 at byte 3$"):
        choose("bpe:300", broken)


@pytest.mark.parametrize("size", ["", "0", "256", "1048577", "9" * 5000, "-5", "8k", "1.5", "²"])
def test_a_size_out_of_bounds_is_named_with_them(size):
    with pytest.raises(UserError, match=r"has no size from 257 .* to 1,048,576: write bpe:8192"):
        choose(f"bpe:{size}", sample)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gtp2", "did you mean 'gpt2'?"),
        ("cl100k", "did you mean 'cl100k_base'?"),
        ("bpe8192", "did you mean 'bpe:8192'?"),
        ("Char", "did you mean 'char'?"),
        (
            "models/none",
            "there are char, byte, gpt2 (the default) or another of tiktoken's (cl100k",
        ),
    ],
)
def test_a_name_that_is_none_is_one_line_with_the_nearest_or_all(spec, message):
    with pytest.raises(UserError) as error:
        choose(spec, sample)
    assert str(error.value).startswith(f"tokenizer={spec!r} is no tokenizer and no such path is")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tiktoken_encoding_is_taken_by_its_name_and_asked_for_at_once(monkeypatch):
    import tiktoken

    asked = []

    def absent(name):
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", absent)
    for name in ("gpt2", "o200k_base"):
        with pytest.raises(UserError, match=f"no tiktoken encoding '{name}'"):
            choose(name)
    assert asked == ["gpt2", "o200k_base"]


def test_an_encoding_without_an_end_of_text_is_refused(monkeypatch):
    import tiktoken

    ranks = {bytes([byte]): byte for byte in range(256)}
    made = tiktoken.Encoding("made", pat_str=".", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: made)
    with pytest.raises(UserError, match=r"tiktoken's p50k_base has no <\|endoftext\|>"):
        choose("p50k_base")


def test_a_path_is_a_tokenizer_json_or_its_folder(trained, tmp_path):
    write(trained, tmp_path, 32)
    (tmp_path / "tokenizer.json").rename(tmp_path / "mine.json")
    assert choose(str(tmp_path / "mine.json")).to_json() == trained.to_json()
    (tmp_path / "mine.json").rename(tmp_path / "tokenizer.json")
    assert choose(str(tmp_path)).to_json() == trained.to_json()
    (tmp_path / "no.json").write_text("x")
    with pytest.raises(UserError, match="is not a JSON object"):
        choose(str(tmp_path / "no.json"))


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'gpt_jax\[tokenizers\]'"):
        choose("bpe:300", sample)


# ---- a data set of it


def test_text_is_prepared_by_a_bpe_of_its_own_trained_on_the_training_part(tmp_path):
    (tmp_path / "in.txt").write_text(TEXT + "zqxzqx" * 60, "utf-8")
    text = (tmp_path / "in.txt").read_text("utf-8")
    prepare("text", tmp_path / "set", input=tmp_path / "in.txt", tokenizer="bpe:300", log=[].append)
    tokenizer, vocab_size, dtype = for_dataset(tmp_path / "set")
    at = int(len(text) * 0.9)
    assert tokenizer.to_json() == train(300, iter([text[:at]])).to_json()
    assert (vocab_size, dtype) == (320, np.dtype("<u2"))
    ids = [np.fromfile(tmp_path / "set" / f"{split}.bin", dtype) for split in ("train", "val")]
    assert [tokenizer.decode(part) for part in ids] == [text[:at], text[at:]]
    assert ids[0].tolist() == tokenizer.encode_ordinary(text[:at])


@pytest.mark.parametrize(
    ("kind", "n_tokens", "size", "dtype"),
    [
        ("char", 65, 65, "uint16"),
        ("byte", 256, 256, "uint16"),
        ("tiktoken", 50257, 50304, "uint16"),
        ("tiktoken", 65536, 65536, "uint32"),
        ("tiktoken", 100277, 100288, "uint32"),
        ("huggingface", 8192, 8192, "uint16"),
        ("char", 65535, 65535, "uint16"),
        ("char", 65536, 65536, "uint32"),
    ],
)
def test_vocabularies_of_subwords_are_rounded_up_and_large_ones_take_uint32(
    kind, n_tokens, size, dtype
):
    tokenizer = Tokenizer({"kind": kind}, n_tokens, None, list, bytes)
    assert size_and_dtype(tokenizer) == (size, dtype)


def test_a_set_of_a_bpe_of_another_size_is_not_replaced_but_that_of_an_edited_text_is(tmp_path):
    source = tmp_path / "a.txt"

    def made(n, text):
        source.write_text(text)
        prepare("text", tmp_path / "out", input=source, tokenizer=f"bpe:{n}", log=lambda _: None)
        return for_dataset(tmp_path / "out")[0].n_tokens

    text = "the cat and the hat and the bat sat on the mat\n" * 20
    assert made(270, text) == 270
    with pytest.raises(UserError, match=r"out has a data set of .*huggingface tokenizer: give"):
        made(271, text)  # both are rounded to 320 rows
    assert made(270, text.replace("cat", "rat")) == 270
