"""Tokenizers of others: what is kept of them, what their ids stand for, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers")

from gpt_jax.errors import UserError
from gpt_jax.evaluation import text_bytes
from gpt_jax.interop import tokenizers as others
from gpt_jax.interop.tokenizer_files import gpt2_json
from gpt_jax.interop.tokenizers import (
    ALPHABET,
    END_OF_TEXT,
    PROBE,
    huggingface_tokenizer,
    in_a_line,
)
from gpt_jax.tokenizer import Tokenizer, from_json, stream_decoder

ROOT = Path(__file__).parents[1]
made_up = settings(derandomize=True, deadline=None, database=None, max_examples=60)


def added(content, i, **flags):
    return {"id": i, "content": content, "special": True, "lstrip": False, "rstrip": False,
            "single_word": False, "normalized": False, **flags}  # fmt: skip


def byte_level(merges=("t h", "th e", "Ġ the"), tokens=(END_OF_TEXT,), **parts):
    """A tokenizer.json's values: bytes, a few merges, special tokens."""
    vocab = {token: i for i, token in enumerate([*ALPHABET.values(), *map(joined, merges)])}
    special = [added(token, len(vocab) + i) for i, token in enumerate(tokens)]
    return {**gpt2_json(vocab, [*merges]), "added_tokens": special, **parts}


def joined(merge):
    return merge.replace(" ", "")


def sentencepiece(normalizer=None, decoder=None):
    """As Gemma's: spaces are U+2581, what has no id falls back to bytes."""
    tokens = ["<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abthe", "th", "the"]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    return {
        "added_tokens": [added("<eos>", 0)],
        "normalizer": normalizer or replace,
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": decoder or [back, {"type": "ByteFallback"}, {"type": "Fuse"}],
        },
        "model": {
            "type": "BPE", "byte_fallback": True, "unk_token": None, "merges": ["t h", "th e"],
            "vocab": {token: i for i, token in enumerate(tokens)},
        },
    }  # fmt: skip


def made(data, end=None):
    return huggingface_tokenizer(json.dumps(data), end, "it")


BYTE_LEVEL, SENTENCEPIECE = made(byte_level()), made(sentencepiece())


@made_up
@given(text=st.text(), cut=st.integers(0, 99))
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte", "sentencepiece"])
def test_text_comes_back_whole_or_streamed_and_lengths_are_its_bytes(tokenizer, text, cut):
    text = text.replace("\u2581", "")  # which is a space to the second
    ids = tokenizer.encode_ordinary(text)
    assert tokenizer.decode(ids) == text
    stream = stream_decoder(tokenizer)
    assert stream(ids[:cut]) + stream(ids[cut:]) + stream([], final=True) == text
    assert tokenizer.byte_lengths()[np.array(ids, int)].sum() == len(text.encode())


def test_ids_are_those_of_the_merges_and_each_id_has_its_bytes():
    ids = BYTE_LEVEL.encode("the the")
    assert ids == [257, 258]
    assert [BYTE_LEVEL.token_bytes(i) for i in ids] == [b"the", b" the"]
    ids = SENTENCEPIECE.encode("the the\x01")
    assert [SENTENCEPIECE.token_bytes(i) for i in ids] == [b"the", b" ", b"the", b"\x01"]


def test_end_of_text_is_one_id_in_a_prompt_and_ordinary_text_in_data():
    text = f"a{END_OF_TEXT}b"
    assert (BYTE_LEVEL.n_tokens, BYTE_LEVEL.end_of_text) == (260, 259)
    assert BYTE_LEVEL.encode(text) == [64, 259, 65]
    assert 259 not in BYTE_LEVEL.encode_ordinary(text)
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text)) == text
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode_ordinary(text)) == text
    assert text_bytes(BYTE_LEVEL)[[64, 258, 259]].tolist() == [1, 4, 0]


@pytest.mark.parametrize(
    ("tokens", "given", "end"),
    [
        (["<eos>", END_OF_TEXT], "<eos>", END_OF_TEXT),
        (["<eos>", "<stop>"], "<stop>", "<stop>"),
        (["<eos>", "<stop>"], None, "<eos>"),
        (["<stop>"], None, None),
        (["<stop>"], "<none>", None),
    ],
)
def test_the_end_of_text_is_the_well_known_one_else_the_folders(tokens, given, end):
    tokenizer = made(byte_level(tokens=tokens), given)
    assert tokenizer.spec["end_of_text"] == end
    assert tokenizer.end_of_text == (None if end is None else 259 + tokens.index(end))
    assert from_json(tokenizer.to_json()).spec == tokenizer.spec


@pytest.mark.parametrize("flag", [{"special": False}, None], ids=["not special", "not added"])
def test_an_end_of_text_that_was_not_special_becomes_so(flag):
    data = byte_level()
    if flag:
        data["added_tokens"][0].update(flag)
    else:
        data["model"]["vocab"][END_OF_TEXT] = 259
        data["added_tokens"] = []
    tokenizer = made(data)
    assert tokenizer.spec == BYTE_LEVEL.spec or flag is None
    assert tokenizer.encode(END_OF_TEXT) == [tokenizer.end_of_text] == [259]
    assert 259 not in tokenizer.encode_ordinary(END_OF_TEXT)


def test_the_same_tokenizer_has_the_same_spec_however_its_file_is_written():
    data = byte_level()
    data["model"]["merges"] = [merge.split(" ") for merge in data["model"]["merges"]]
    data["model"]["vocab"] = dict(reversed(data["model"]["vocab"].items()))
    data["model"]["dropout"] = 0.5
    data["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0}
    data["post_processor"] = {"type": "ByteLevel", "trim_offsets": False}
    again = huggingface_tokenizer(json.dumps(data, indent=2), None, "it")
    assert again.spec == BYTE_LEVEL.spec
    assert len(again.encode("many words are kept")) > 2


def test_to_json_is_plain_and_from_json_undoes_it():
    for tokenizer in (BYTE_LEVEL, SENTENCEPIECE):
        again = from_json(json.loads(json.dumps(tokenizer.to_json())))
        assert again.to_json() == tokenizer.to_json()
        assert (again.n_tokens, again.end_of_text) == (tokenizer.n_tokens, tokenizer.end_of_text)
        for text in (PROBE, "the the", END_OF_TEXT):
            assert again.encode(text) == tokenizer.encode(text)
            assert again.encode_ordinary(text) == tokenizer.encode_ordinary(text)
        assert again.byte_lengths().tolist() == tokenizer.byte_lengths().tolist()


def test_unused_ids_are_no_bytes_and_count():
    data = byte_level(tokens=[])
    data["model"]["vocab"][END_OF_TEXT] = 300
    tokenizer = made(data)
    assert (tokenizer.n_tokens, tokenizer.token_bytes(280)) == (301, b"")
    assert tokenizer.encode(f"the{END_OF_TEXT}") == [257, 300]


def test_an_added_token_is_its_own_text_though_its_letters_stand_for_bytes():
    tokenizer = made(byte_level(tokens=[END_OF_TEXT, "Ġé"]))
    assert tokenizer.decode(tokenizer.encode("Ġé")) == "Ġé"
    assert tokenizer.encode("Ġé") == [260]


def without(token):
    data = byte_level()
    del data["model"]["vocab"][token]
    return data


def decoder(*kinds):
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    return [back, *({"type": kind} for kind in kinds)]


PREPEND = {"type": "Prepend", "prepend": "\u2581"}
METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True}
WORDS = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
REFUSED = {
    "no model": ({}, "KeyError: 'model'"),
    "a list": ([], "TypeError"),
    "unigram": ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "model is 'Unigram'"),
    "words": ({"model": WORDS}, "model is 'WordLevel'"),
    "no decoder": (byte_level(decoder=None), r"decoder \(none\) an id has no bytes"),
    "strip": (
        sentencepiece(decoder=decoder("ByteFallback", "Fuse", "Strip")), r"Fuse, Strip\) an id has",
    ),
    "prepend": (sentencepiece(PREPEND), "normalizer 'Prepend' changes the text"),
    "lowercase": (byte_level(normalizer={"type": "Lowercase"}), "'Lowercase' changes"),
    "nested": (
        byte_level(normalizer={"type": "Sequence", "normalizers": [{"type": "NFKC"}]}), "'NFKC'",
    ),
    "a missing byte": (without("Ā"), "no ids for 1 of the 256 bytes"),
    "no bytes": (byte_level(model={"type": "BPE", "vocab": {"a": 0}, "merges": []}), "242 of the"),
    "huge id": (byte_level(added_tokens=[added("x", 2**20)]), "tokens from 0 to 1,048,575"),
    "negative id": (byte_level(added_tokens=[added("x", -1)]), "not those of tokens"),
    "true id": (byte_level(added_tokens=[added("x", True)]), "not those of tokens"),
    "empty token": (byte_level(added_tokens=[added("", 400)]), "not those of tokens"),
    "one id twice": (byte_level(added_tokens=[added("x", 0)]), "two of its tokens have one id"),
    "strip tokens": (byte_level(added_tokens=[added("x", 259, special=False, lstrip=True)]), "'x'"),
    "not text": (byte_level(added_tokens=[added(3, 259)]), "not those of tokens"),
    "a lone half": (byte_level(added_tokens=[added("\ud800", 259)]), "UnicodeEncodeError"),
    "merges of numbers": (byte_level(model={"type": "BPE", "vocab": {}, "merges": [1]}), "TypeErr"),
    "a part that is no part": (byte_level(pre_tokenizer="x"), "TypeError"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), REFUSED.values(), ids=REFUSED)
def test_a_file_whose_ids_have_no_bytes_of_their_own_is_one_line(data, message):
    with pytest.raises(UserError, match=f"it cannot be used.*{message}") as error:
        made(data)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def regex(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": False}


USED = {
    "a space before": (
        byte_level(pre_tokenizer={**byte_level()["pre_tokenizer"], "add_prefix_space": True}),
        "text does not come back",
    ),
    "characters dropped": (
        byte_level(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [regex(" "), byte_level()["pre_tokenizer"]],
            }
        ),
        "text does not come back",
    ),
    "metaspace": ({**sentencepiece(), "pre_tokenizer": METASPACE}, "text does not come back"),
    "bad regex": (byte_level(pre_tokenizer=regex("(")), "Oniguruma error"),
    "unknown part": (byte_level(pre_tokenizer={"type": "Psychic"}), "package tokenizers"),
    "unknown merge": (byte_level(model={**byte_level()["model"], "merges": ["q z"]}), "`qz`"),
    "numbered otherwise": (byte_level(added_tokens=[added("x", 999)]), "numbers its tokens"),
    "ends the text": (
        byte_level(
            merges=[],
            tokens=[],
            pre_tokenizer={**byte_level()["pre_tokenizer"], "use_regex": False},
            model={
                **byte_level([])["model"],
                "vocab": {**byte_level([])["model"]["vocab"], "<|": 256, "<|e": 257, "</s>": 258,
                          "</": 259, "s>": 260},
                "merges": ["< /", "s >", "</ s>"],
            },
        ),
        "'</s>' in ordinary text would end",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), USED.values(), ids=USED)
def test_a_file_that_loses_text_is_one_line_before_any_text_is_encoded(data, message):
    tokenizer = made(data)
    for encode in (tokenizer.encode, tokenizer.encode_ordinary):
        with pytest.raises(UserError, match=message) as error:
            encode("a")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "{", "nul", "[" * 10**5, '{"model":' * 10**5, "\ud800", '{"a": 1e999}']
)
def test_text_that_is_no_json_of_a_tokenizer_is_one_line(text):
    with pytest.raises(UserError, match="it cannot be used") as error:
        huggingface_tokenizer(text, None, "it")
    assert "\n" not in str(error.value)


def test_a_file_too_large_for_a_meta_json_is_refused_by_its_size(monkeypatch):
    size = len(json.dumps(BYTE_LEVEL.spec["json"]))
    monkeypatch.setattr(others, "LARGEST", size)
    made(byte_level())
    monkeypatch.setattr(others, "LARGEST", size - 1)
    with pytest.raises(UserError, match=rf"kept, {size:,} characters are more than {size - 1:,}"):
        huggingface_tokenizer(BYTE_LEVEL.spec["json"], None, "it")
    with pytest.raises(UserError, match=f"characters are more than {size - 1:,}"):
        huggingface_tokenizer(" " * size, None, "it")


def test_a_tokenizer_of_200_000_ids_fits_in_meta_json_and_takes_the_longest_ids(tmp_path):
    """o200k's size: 200,000 tokens, every second a letter that JSON escapes, two merges to each."""
    from gpt_jax.prepare.dataset import LONGEST_META, size_and_dtype

    letters = "".join(ALPHABET.values())[120:]  # of two bytes each in UTF-8
    tokens = [a + b + c + d for a in letters for b in letters for c in letters for d in letters[:1]]
    data = byte_level(tokens=[END_OF_TEXT])
    data["model"]["vocab"] |= {token: 1000 + i for i, token in enumerate(tokens[:200_000])}
    data["model"]["vocab"] |= {token * 2: 201_000 + i for i, token in enumerate(tokens[:60_000])}
    data["model"]["merges"] += [f"{token} {token}" for token in tokens[:60_000]] * 7
    tokenizer = made(data)
    assert len(json.dumps({"tokenizer": tokenizer.to_json()}, indent=1)) < LONGEST_META
    assert tokenizer.n_tokens == 261_000
    assert size_and_dtype(tokenizer) == (261_056, "uint32")


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "huggingface"},
        {"kind": "huggingface", "json": 3, "end_of_text": None},
        {"kind": "huggingface", "json": "{}", "end_of_text": 3},
        {"kind": "huggingface", "json": "{}", "end_of_text": None},
        {"kind": "tiktoken", "name": "gpt2", "merges": 3},
        {"kind": "tiktoken", "name": "gpt2", "merges": "a b"},
        {"kind": "tiktoken", "name": "gpt2", "merges": "\ud800"},
        {"kind": "tiktoken", "name": "p50k_base", "merges": "a b"},
        {"kind": "huggingface", "x" * 10**6: 3},
    ],
    ids=lambda spec: str(spec)[:60],
)
def test_from_json_refuses_what_to_json_cannot_write(spec):
    with pytest.raises(UserError) as error:
        from_json(spec)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


class Panic(BaseException):
    """As the library's pyo3_runtime.PanicException, which is no Exception."""


def test_whatever_the_library_raises_is_one_line_and_interrupts_stay():
    for error in (Exception("a\nb"), Panic("index out of\nbounds"), RecursionError()):
        with (
            pytest.raises(UserError, match="it cannot be used by the package") as said,
            in_a_line("it"),
        ):
            raise error
        assert "\n" not in str(said.value)
    for error in (KeyboardInterrupt(), MemoryError(), UserError("as it was")):
        with pytest.raises(type(error)) as said, in_a_line("it"):
            raise error
        assert said.value is error


def test_without_the_package_all_but_encoding_works(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    tokenizer = from_json(BYTE_LEVEL.to_json())
    assert tokenizer.decode([257, 258, 259]) == f"the the{END_OF_TEXT}"
    assert tokenizer.byte_lengths().sum() == BYTE_LEVEL.byte_lengths().sum()
    with pytest.raises(UserError, match=r"pip install 'gpt_jax\[tokenizers\]'"):
        tokenizer.encode("a")


def test_two_data_sets_whose_tokenizers_differ_only_in_files_kept_are_alike():
    from gpt_jax.start import refuse_another_tokenizer

    bare = Tokenizer({"kind": "tiktoken", "name": "gpt2"}, 50257, 50256, list, bytes)
    refuse_another_tokenizer("out", {"kind": "tiktoken", "name": "gpt2"}, bare)
    kept = Tokenizer(bare.spec, 50257, 50256, list, bytes, {"merges": "..."})
    refuse_another_tokenizer("out", {"kind": "tiktoken", "name": "gpt2"}, kept)
    refuse_another_tokenizer("out", BYTE_LEVEL.to_json(), BYTE_LEVEL)
    with pytest.raises(UserError, match=r"trained with a huggingface tokenizer unlike") as error:
        refuse_another_tokenizer("out", BYTE_LEVEL.to_json(), SENTENCEPIECE)
    assert len(str(error.value)) < 300


def test_importing_the_core_and_the_edge_imports_neither_library():
    program = (
        "import sys, gpt_jax.interop.tokenizer_files, gpt_jax.prepare.tokenizers;"
        "assert not {'tokenizers', 'tiktoken'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
