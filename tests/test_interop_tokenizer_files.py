"""Tokenizer files in and out: what transformers' AutoTokenizer reads gives the same ids.

The `tokenizers` library stands for it here: AutoTokenizer is that library with settings from
tokenizer_config.json. Both were compared by hand with transformers 5.24, on all of tiny Shakespeare
and 3,500 made-up texts for each kind.
"""

import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

tokenizers = pytest.importorskip("tokenizers")

from gpt_jax.errors import UserError
from gpt_jax.interop import tokenizer_files as files
from gpt_jax.interop.tokenizer_files import FRAGMENTS, read, write
from gpt_jax.interop.tokenizers import ALPHABET, END_OF_TEXT, GPT2_PATTERN, PROBE, gpt2_vocab
from gpt_jax.prepare.tokenizers import train
from gpt_jax.tokenizer import byte_tokenizer, char_tokenizer, from_json, tiktoken_tokenizer

DATA = Path(__file__).parents[2] / "shared" / "data"
VOCAB_BPE = "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"  # as tiktoken names it
ENCODER_JSON = "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"
made_up = settings(derandomize=True, deadline=None, database=None, max_examples=60)
# tiktoken's two newer patterns
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def library(folder):
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def openai(tmp_path_factory):
    """A folder with OpenAI's two files."""
    cache = Path(os.environ.get("TIKTOKEN_CACHE_DIR", DATA / "tiktoken_cache"))
    if not (cache / VOCAB_BPE).is_file() or not (cache / ENCODER_JSON).is_file():
        pytest.skip("GPT-2's files are absent")
    folder = tmp_path_factory.mktemp("openai")
    (folder / "vocab.bpe").write_bytes((cache / VOCAB_BPE).read_bytes())
    (folder / "encoder.json").write_bytes((cache / ENCODER_JSON).read_bytes())
    return folder


@pytest.fixture
def offline(monkeypatch):
    import tiktoken

    def absent(*_):
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", absent)


# ---- GPT-2's


@pytest.mark.usefixtures("offline")
def test_gpt2_from_openais_files_is_tiktokens_on_tiny_shakespeare(openai, gpt2):
    tokenizer = read(openai)
    assert tokenizer.spec == gpt2.spec == {"kind": "tiktoken", "name": "gpt2"}
    assert tokenizer.byte_lengths().tolist() == gpt2.byte_lengths().tolist()
    path = DATA / "tinyshakespeare.txt"
    text = path.read_text("utf-8") if path.is_file() else PROBE
    assert tokenizer.encode(text) == gpt2.encode(text)


@pytest.fixture(scope="module")
def three_gpt2s(openai, tmp_path_factory):
    """From OpenAI's files, from their JSON, and from the exported tokenizer.json as it is."""
    tokenizer = read(openai)
    folder = tmp_path_factory.mktemp("gpt2")
    write(tokenizer, folder, 1024)
    again = from_json(json.loads(json.dumps(tokenizer.to_json())))
    return tokenizer, again, library(folder)


@made_up
@given(text=st.text())
def test_gpt2_from_files_is_tiktokens_on_any_text(three_gpt2s, gpt2, text):
    for text in (text, f"{text}{END_OF_TEXT} {text}"):  # noqa: B020
        ids = gpt2.encode(text)
        ours, again, exported = three_gpt2s
        assert ours.encode(text) == again.encode(text) == ids
        assert exported.encode(text).ids == ids
        assert ours.encode_ordinary(text) == gpt2.encode_ordinary(text)
        assert ours.decode(ids) == text == exported.decode(ids, skip_special_tokens=False)


@pytest.mark.usefixtures("offline")
def test_gpt2_is_written_as_openai_did_and_read_from_each_of_its_files(openai, tmp_path):
    tokenizer = read(openai)
    write(tokenizer, tmp_path, 77)
    assert (tmp_path / "merges.txt").read_bytes() == (openai / "vocab.bpe").read_bytes()
    vocab = json.loads((tmp_path / "vocab.json").read_text("utf-8"))
    assert vocab == json.loads((openai / "encoder.json").read_text("utf-8"))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    assert config["model_max_length"] == 77
    assert {config[f"{name}_token"] for name in ("bos", "eos", "unk")} == {END_OF_TEXT}
    assert read(tmp_path).to_json() == tokenizer.to_json()
    data = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    del data["model"]["type"], data["pre_tokenizer"]["use_regex"]  # as in openai-community/gpt2
    data["post_processor"] = data["decoder"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data, indent=2), "utf-8")
    assert read(tmp_path).to_json() == tokenizer.to_json()
    (tmp_path / "tokenizer.json").unlink()
    assert read(tmp_path).to_json() == tokenizer.to_json()
    assert "merges" in tokenizer.to_json()


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["added_tokens"].append({**d["added_tokens"][0], "id": 50257, "content": "x"}),
        lambda d: d["pre_tokenizer"].update(use_regex=False),
        lambda d: d["pre_tokenizer"].update(add_prefix_space=True),
        lambda d: d.update(normalizer={"type": "NFC"}),
        lambda d: d["model"]["merges"].reverse(),
        lambda d: d["model"]["vocab"].update({"!": 1, '"': 0}),
    ],
    ids=["a token more", "no pattern", "a space", "a normalizer", "other merges", "other ids"],
)
def test_what_is_not_quite_gpt2_is_not_taken_for_it(openai, tmp_path, change):
    write(read(openai), tmp_path, 1024)
    data = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    change(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), "utf-8")
    assert read(tmp_path).spec["kind"] == "huggingface"


# ---- our own


SYMBOLS = "\n !aé€🙂\r\x00\u0301"


@made_up
@given(text=st.text(alphabet=SYMBOLS))
def test_a_char_tokenizer_exports_to_the_same_ids(tmp_path_factory, text):
    folder, tokenizer = tmp_path_factory.mktemp("char"), char_tokenizer(SYMBOLS)
    write(tokenizer, folder, 32)
    exported, ids = library(folder), tokenizer.encode(text)
    assert exported.encode(text).ids == ids
    assert exported.decode(ids) == text
    assert read(folder).to_json() == tokenizer.to_json()


def test_a_character_that_an_exported_char_tokenizer_does_not_know_is_an_error(tmp_path):
    write(char_tokenizer("ab"), tmp_path, 32)
    with pytest.raises(Exception, match="Missing"):
        library(tmp_path).encode("abc")


@pytest.fixture(scope="module")
def exported_bytes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    write(byte_tokenizer(), folder, 32)
    assert read(folder).spec == {"kind": "byte"}
    return library(folder)


@made_up
@given(text=st.text())
def test_a_byte_tokenizer_exports_to_the_same_ids(exported_bytes, text):
    for text in (text, text + END_OF_TEXT):  # noqa: B020
        assert exported_bytes.encode(text).ids == list(text.encode())
        assert exported_bytes.decode(list(text.encode())) == text


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    tokenizer = train(280, iter(["the cat sat on the mat, naïve as it was. " * 20]))
    folder = tmp_path_factory.mktemp("trained")
    write(tokenizer, folder, 32)
    assert read(folder).to_json() == tokenizer.to_json()
    return tokenizer, library(folder)


@made_up
@given(text=st.text() | st.text(alphabet="the cat\n'aï"))
def test_a_trained_tokenizer_exports_to_the_same_ids(trained, text):
    tokenizer, exported = trained
    for text in (text, text + END_OF_TEXT + text):  # noqa: B020
        ids = tokenizer.encode(text)
        assert exported.encode(text).ids == ids
        assert exported.decode(ids, skip_special_tokens=False) == text


def test_the_config_names_the_end_of_text_of_those_that_have_one(trained, tmp_path):
    for i, (tokenizer, end) in enumerate([(trained[0], END_OF_TEXT), (byte_tokenizer(), None)]):
        (folder := tmp_path / str(i)).mkdir()
        write(tokenizer, folder, 32)
        config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        assert config.get("eos_token") == end
        assert config["clean_up_tokenization_spaces"] is False


def test_symbols_of_several_characters_are_refused(tmp_path):
    with pytest.raises(UserError, match="symbols of several characters"):
        write(char_tokenizer(["a", "th"]), tmp_path, 32)
    assert not any(tmp_path.iterdir())


# ---- tiktoken's


def made_encoding(pattern, seed=0):
    """An encoding of made-up ranks, most of them of letters that come often, with unused ids."""
    import tiktoken

    draw = random.Random(seed)
    first = draw.sample(range(256), 256)
    ranks = {bytes([byte]): i for i, byte in enumerate(first)}
    pool = [bytes([byte]) for byte in "aab cdehilor 1'\né".encode()]
    while len(ranks) < 700:
        token = draw.choice(pool) + draw.choice(pool)
        if token not in ranks and len(token) < 9:
            ranks[token] = len(ranks)
            pool.append(token)
    ranks[b"zqxw"] = 700  # which no two tokens make
    ranks = dict(draw.sample([*ranks.items()], len(ranks)))
    special = {"<|fim|>": 703, END_OF_TEXT: 705}
    return tiktoken.Encoding("made", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture(scope="module", params=[CL100K, O200K], ids=["cl100k", "o200k"])
def encoded(request, tmp_path_factory):
    import tiktoken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiktoken, "get_encoding", lambda _: made_encoding(request.param))
        tokenizer = tiktoken_tokenizer("made")
        folder = tmp_path_factory.mktemp("tiktoken")
        write(tokenizer, folder, 32)
        return tokenizer, library(folder), read(folder)


@made_up
@given(text=st.text() | st.text(alphabet="aaab cdehilor1'\nÉé!"))
def test_a_tiktoken_encoding_exports_to_the_same_ids(encoded, text):
    tokenizer, exported, again = encoded
    for text in (text, text + END_OF_TEXT + text):  # noqa: B020
        ids = tokenizer.encode(text)
        assert exported.encode(text).ids == again.encode(text) == ids
        assert tokenizer.decode(ids) == text == exported.decode(ids, skip_special_tokens=False)
        assert again.encode_ordinary(text) == tokenizer.encode_ordinary(text)


def test_a_word_that_no_two_tokens_make_is_one_id_as_in_tiktoken(encoded):
    tokenizer, exported, again = encoded
    assert tokenizer.encode("zqxw a") == exported.encode("zqxw a").ids == again.encode("zqxw a")
    assert tokenizer.encode("zqxw")[0] == 700


def test_a_tiktoken_encoding_read_back_has_its_sizes(encoded):
    tokenizer, _, again = encoded
    assert (again.n_tokens, again.end_of_text) == (tokenizer.n_tokens, 705) == (706, 705)
    assert again.byte_lengths().tolist() == tokenizer.byte_lengths().tolist()


def test_an_encoding_whose_ids_would_differ_is_refused(monkeypatch, tmp_path):
    import tiktoken

    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: made_encoding(CL100K))
    monkeypatch.setattr(files, "for_oniguruma", lambda _: GPT2_PATTERN)
    with pytest.raises(UserError, match=r"tiktoken's made .* gives other ids for ") as error:
        write(tiktoken_tokenizer("made"), tmp_path, 32)
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_possessive_counts_and_the_end_are_written_for_oniguruma():
    assert files.for_oniguruma(r"\p{N}{1,3}+|\s++$|a{2}+") == r"\p{N}{1,3}|\s++\z|a{2}"
    assert files.for_oniguruma(O200K) == O200K


def test_the_proof_has_each_fragment_once():
    assert len(set(FRAGMENTS)) == len(FRAGMENTS)


# ---- folders


def test_two_files_that_are_not_gpt2s_are_read_in_its_way(tmp_path):
    merges = ["t h", "th e"]
    (tmp_path / "vocab.json").write_text(json.dumps(gpt2_vocab(merges)), "utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\r\nt h\r\nth e\r\n", "utf-8")
    tokenizer = read(tmp_path)
    assert tokenizer.encode(f"the the{END_OF_TEXT}") == [257, 220, 257, 258]
    assert (tokenizer.n_tokens, tokenizer.end_of_text) == (259, 258)
    assert from_json(tokenizer.to_json()).spec == tokenizer.spec


def test_the_end_of_text_of_tokenizer_config_is_taken(tmp_path):
    vocab = {**{token: i for i, token in enumerate(ALPHABET.values())}, "<stop>": 256}
    data = files.gpt2_json(vocab, [])
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), "utf-8")
    assert read(tmp_path).end_of_text is None
    for token in ("<stop>", {"content": "<stop>", "lstrip": False}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}), "utf-8")
        assert read(tmp_path).end_of_text == 256
    for token in (3, [], None, {"content": []}, "<none>"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}), "utf-8")
        assert read(tmp_path).end_of_text is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x", b"", "has no tokenizer.json, no vocab.json with"),
        ("tokenizer.json", b"", "is not a JSON object"),
        ("tokenizer.json", b"[]", "is not a JSON object .it is a list"),
        ("tokenizer.json", b"[" * 10**5, "is not a JSON object"),
        ("tokenizer.json", b"\xff\xfe", "is not UTF-8 at byte 0"),
        ("tokenizer.json", b"{}", "cannot be used .KeyError: 'model'"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 0}}}', "only BPE"),
        ("tokenizer.json", b'{"model": 3}', "cannot be used"),
        ("vocab.json", b"[]", "has no tokenizer.json"),
    ],
)
def test_a_folder_without_a_tokenizer_that_can_be_used_is_one_line(
    tmp_path, name, content, message
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_damaged_pair_is_one_line(tmp_path):
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\n", "utf-8")
    for vocab in ("[]", "{}", '{"t": 0}', '{"t": "x"}', "{"):
        (tmp_path / "vocab.json").write_text(vocab)
        with pytest.raises(UserError, match=r"vocab\.json ") as error:
            read(tmp_path)
        assert "\n" not in str(error.value)


def test_a_file_too_large_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(UserError, match="has 67,108,865 bytes, and a tokenizer at most 67,108,864"):
        read(tmp_path)


def test_a_char_tokenizer_json_of_half_characters_is_refused(tmp_path):
    data = files.char_json(["a", "\ud800"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="no tokenizer of kind") as error:
        read(tmp_path)
    assert "\n" not in str(error.value)
