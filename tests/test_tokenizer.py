import io
import itertools
import json
import pickle
import pickletools
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_jax.errors import UserError
from gpt_jax.prepare.dataset import for_dataset
from gpt_jax.tokenizer import (
    byte_tokenizer,
    char_tokenizer,
    from_json,
    stream_decoder,
    tiktoken_tokenizer,
)

SYMBOLS = "\n !aé€🙂"
made_up = settings(derandomize=True, deadline=None, database=None, max_examples=60)


@pytest.fixture
def no_tiktoken(monkeypatch, tmp_path):
    import tiktoken

    def offline(path, *_):
        raise OSError(f"no network for {path}")

    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(tiktoken.load, "read_file", offline)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))


def streamed(tokenizer, ids, cuts):
    text, bounds = (
        stream_decoder(tokenizer),
        sorted({0, len(ids), *(c % (len(ids) + 1) for c in cuts)}),
    )
    parts = [text(ids[a:b]) for a, b in itertools.pairwise(bounds)]
    return [*parts, text([], final=True)]


@made_up
@given(st.text(), st.lists(st.integers(0, 99)))
def test_byte_decode_undoes_encode_whole_or_streamed(text, cuts):
    ids = byte_tokenizer().encode(text)
    assert ids == list(text.encode())
    assert byte_tokenizer().decode(ids) == text
    assert "".join(streamed(byte_tokenizer(), ids, cuts)) == text


@made_up
@given(st.text(alphabet=SYMBOLS), st.lists(st.integers(0, 99)))
def test_char_decode_undoes_encode_whole_or_streamed(text, cuts):
    tokenizer = char_tokenizer(SYMBOLS)
    ids = tokenizer.encode(text)
    assert ids == [SYMBOLS.index(char) for char in text]
    assert tokenizer.decode(ids) == text
    assert "".join(streamed(tokenizer, ids, cuts)) == text


@made_up
@given(text=st.text(), cuts=st.lists(st.integers(0, 99)))
def test_gpt2_decode_undoes_encode_whole_or_streamed(gpt2, text, cuts):
    ids = gpt2.encode_ordinary(text)
    assert gpt2.decode(ids) == text
    assert "".join(streamed(gpt2, ids, cuts)) == text


@made_up
@given(st.lists(st.integers(0, 255)), st.lists(st.integers(0, 99)))
def test_streaming_any_bytes_in_any_parts_gives_what_decode_gives(ids, cuts):
    whole = bytes(ids).decode("utf-8", "replace")
    assert byte_tokenizer().decode(ids) == whole
    assert "".join(streamed(byte_tokenizer(), ids, cuts)) == whole


def test_streaming_holds_a_character_back_until_its_last_byte():
    text = stream_decoder(byte_tokenizer())
    assert [text([i]) for i in "a€".encode()] == ["a", "", "", "€"]
    assert text([0xE2]) == ""
    assert text([], final=True) == "\ufffd"


def test_gpt2_agrees_with_published_ids(gpt2):
    ids = gpt2.encode("First Citizen:\nBefore we proceed any")
    assert ids == [5962, 22307, 25, 198, 8421, 356, 5120, 597]
    assert (gpt2.n_tokens, gpt2.end_of_text) == (50257, 50256)
    assert gpt2.token_bytes(50256) == b"<|endoftext|>"


def test_end_of_text_is_one_id_in_a_prompt_and_ordinary_text_in_data(gpt2):
    assert gpt2.encode("<|endoftext|>") == [50256]
    assert 50256 not in gpt2.encode_ordinary("<|endoftext|>")
    assert gpt2.decode(gpt2.encode_ordinary("<|endoftext|>")) == "<|endoftext|>"


def test_byte_lengths_add_up_to_the_bytes_of_the_text(gpt2):
    text = "naïve €5 🙂\n"
    for tokenizer in (gpt2, byte_tokenizer(), char_tokenizer(sorted(set(text)))):
        lengths = tokenizer.byte_lengths()
        assert lengths.dtype == np.int64
        assert lengths.shape == (tokenizer.n_tokens,)
        assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


def test_a_character_never_trained_on_is_named_with_its_place():
    with pytest.raises(UserError) as error:
        char_tokenizer("abc").encode("abcabc€")
    assert str(error.value) == (
        "character '€' (U+20AC) at position 6 is not among the 3 symbols this model was trained on"
    )


@pytest.mark.parametrize("token", [-1, 256, 50300])
def test_an_id_out_of_range_is_named_with_its_bound(token):
    with pytest.raises(UserError, match=rf"token id {token} is not in 0\.\.255"):
        byte_tokenizer().decode([65, token])


def test_half_a_character_from_a_command_line_is_refused(gpt2):
    for tokenizer in (gpt2, byte_tokenizer(), char_tokenizer("ab")):
        with pytest.raises(UserError, match="not Unicode at position 1"):
            tokenizer.encode("a\udc80")


def test_decode_takes_numpy_ids():
    assert byte_tokenizer().decode(np.array([104, 105], np.uint16)) == "hi"


@pytest.mark.parametrize(
    "tokenizer",
    [byte_tokenizer(), char_tokenizer(SYMBOLS), char_tokenizer(["a", "th"])],
    ids=["byte", "char", "long symbols"],
)
def test_to_json_is_plain_and_from_json_undoes_it(tokenizer):
    again = from_json(json.loads(json.dumps(tokenizer.to_json())))
    ids = list(range(tokenizer.n_tokens))
    assert again.to_json() == tokenizer.to_json()
    assert (again.n_tokens, again.end_of_text) == (tokenizer.n_tokens, tokenizer.end_of_text)
    assert again.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    "spec",
    [
        None,
        [],
        {},
        {"kind": "word"},
        {"kind": "char"},
        {"kind": "char", "symbols": ""},
        {"kind": "char", "symbols": "aa"},
        {"kind": "char", "symbols": 3},
        {"kind": "tiktoken", "name": 3},
        {"kind": "tiktoken", "name": "gpt9"},
    ],
)
def test_from_json_refuses_what_to_json_cannot_write(spec):
    with pytest.raises(UserError, match="no t") as error:
        from_json(spec)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("no_tiktoken")
def test_gpt2_without_its_files_says_which_variable_and_which_files():
    with pytest.raises(UserError, match=r"TIKTOKEN_CACHE_DIR .*vocab\.bpe.*encoder\.json") as error:
        tiktoken_tokenizer("gpt2").encode("hello")
    assert "\n" not in str(error.value)


# ---- the tokenizer of a data folder


@pytest.mark.usefixtures("no_tiktoken")
def test_a_folder_with_no_meta_is_gpt2_and_needs_no_files_until_text_comes(tmp_path):
    tokenizer, vocab_size, dtype = for_dataset(tmp_path)
    assert (tokenizer.n_tokens, tokenizer.end_of_text, vocab_size) == (50257, 50256, 50304)
    assert dtype == np.dtype("<u2")
    assert tokenizer.to_json() == {"kind": "tiktoken", "name": "gpt2"}
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        tokenizer.encode("hello")


def test_meta_json_comes_before_meta_pkl(tmp_path):
    meta = {"vocab_size": 300, "dtype": "uint32", "tokenizer": {"kind": "byte"}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    (tmp_path / "meta.pkl").write_bytes(b"not read")
    tokenizer, vocab_size, dtype = for_dataset(tmp_path)
    assert (tokenizer.to_json(), vocab_size, dtype) == ({"kind": "byte"}, 300, np.dtype("<u4"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        '{"vocab_size": 256, "dtype": "uint16"}',
        '{"vocab_size": 256, "dtype": "int8", "tokenizer": {"kind": "byte"}}',
        '{"vocab_size": "256", "dtype": "uint16", "tokenizer": {"kind": "byte"}}',
        '{"vocab_size": 255, "dtype": "uint16", "tokenizer": {"kind": "byte"}}',
        '{"vocab_size": Infinity, "dtype": "uint16", "tokenizer": {"kind": "byte"}}',
        '{"vocab_size": 256, "dtype": [], "tokenizer": {"kind": "byte"}}',
    ],
    ids=str,
)
def test_a_damaged_meta_json_is_one_line_that_names_it(tmp_path, text):
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(UserError, match=r"meta\.json cannot be used .*prepare it again") as error:
        for_dataset(tmp_path)
    assert "\n" not in str(error.value)


def meta_of(symbols, **other):
    itos = dict(enumerate(symbols))
    stoi = {symbol: i for i, symbol in itos.items()}
    return {"vocab_size": len(itos), "itos": itos, "stoi": stoi, **other}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_meta_pkl_of_nanogpt_is_read_in_every_protocol(tmp_path, protocol):
    symbols = [chr(i) for i in range(32, 700)]
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta_of(symbols), protocol))
    tokenizer, vocab_size, dtype = for_dataset(tmp_path)
    assert (tokenizer.n_tokens, vocab_size, dtype) == (668, 668, np.dtype("<u2"))
    assert tokenizer.encode(" !") == [0, 1]
    assert tokenizer.decode(range(668)) == "".join(symbols)


def test_meta_pkl_may_hold_symbols_of_several_characters_and_plain_extras(tmp_path):
    meta = meta_of(["a", "th"], note="x", more=[1, None, True])
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    assert for_dataset(tmp_path)[0].to_json() == {"kind": "char", "symbols": ["a", "th"]}


class Trap:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return io.open, (str(self.marker), "w")


def refused(folder, data):
    (folder / "meta.pkl").write_bytes(data)
    with pytest.raises(UserError, match=r"meta\.pkl is not nanoGPT's meta\.pkl") as error:
        for_dataset(folder)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_code_runs_none(tmp_path, protocol):
    marker = tmp_path / "marker"
    data = pickle.dumps(meta_of("ab", trap=Trap(marker)), protocol)
    refused(tmp_path, data)
    assert not marker.exists()
    pickle.loads(data)["trap"].close()  # the trap works: plain pickle falls into it
    assert marker.exists()


def test_no_global_is_looked_up_even_past_the_opcode_check(monkeypatch, tmp_path):
    from gpt_jax.prepare import meta_pickle

    marker = tmp_path / "marker"
    data = pickle.dumps(meta_of("ab", trap=Trap(marker)))
    everything = {opcode.name for opcode in pickletools.opcodes}
    monkeypatch.setattr(meta_pickle, "PLAIN", everything)
    refused(tmp_path, data)
    assert not marker.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        b"\x80\x04.",
        pickle.dumps([1, 2]),
        pickle.dumps("text"),
        pickle.dumps({}),
        pickle.dumps({1, 2}),
        b"]" * 100_000 + b"a" * 99_999 + b".",  # lists in lists in lists
        b"}" + b")" + b"\x85" * 1_000_000 + b"K\x00s.",  # hashing this key would overflow the stack
        b"\x8d" + struct.pack("<Q", 1 << 62) + b"a.",  # a string of 4 EiB
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b".",
        b"\x8b" + struct.pack("<i", 1 << 30) + b"\x01.",
        b"K\x01r" + struct.pack("<I", 0xFFFFFFFF) + b".",  # a memo of 4 billion entries
        b"I" + b"9" * 100_000 + b"\n.",
        b"X\x03\x00\x00\x00\xed\xa0\x80.",
        b"N" * (1 << 23),
        pickle.dumps({**meta_of("ab"), "vocab_size": 3}),
        pickle.dumps({**meta_of("ab"), "stoi": {"a": 1, "b": 0}}),
        pickle.dumps({**meta_of("ab"), "stoi": {"a": 0, "c": 1}}),
        pickle.dumps({**meta_of("ab"), "itos": {1: "a", 2: "b"}}),
        pickle.dumps({**meta_of("ab"), "itos": ["a", "b"]}),
        pickle.dumps(meta_of([b"a", b"b"])),
        pickle.dumps(meta_of(["\ud800"])),
        pickle.dumps(meta_of([])),
    ],
    ids=lambda data: repr(data[:20]),
)
def test_a_meta_pkl_of_anything_else_is_one_line(tmp_path, data):
    refused(tmp_path, data)


def test_a_truncated_meta_pkl_is_one_line_wherever_it_ends(tmp_path):
    data = pickle.dumps(meta_of("abc"))
    for end in range(len(data)):
        refused(tmp_path, data[:end])


@made_up
@given(data=st.binary(max_size=60))
def test_random_bytes_as_meta_pkl_are_one_line(tmp_path_factory, data):
    refused(tmp_path_factory.mktemp("random"), data)
