"""A model folder's tokenizer, in and out: the files that transformers' AutoTokenizer reads."""

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError
from gpt_jax.interop.tokenizers import (
    ALPHABET,
    END_OF_TEXT,
    gpt2_tokenizer,
    gpt2_vocab,
    huggingface_tokenizer,
    is_gpt2,
)
from gpt_jax.tokenizer import Tokenizer, byte_tokenizer, from_json

# what a converted encoding is proved on, alone and in pairs: where its pattern may cut or not
FRAGMENTS = (
    "a", "Ab", "aB", "DON'T", "it's", "'LL", " x", "1", "1111111", "\u0663", "\u00b2", "{}();", "!",
    " ", "   ", "\n", "\n\n ", "\r\n", "\t", "\x00", "\x85", "\u00a0", "\u2028", "\u3000", "\u200b",
    "\u00e9", "e\u0301", "\u65e5\u672c", "\u00df", "\u017f", "\u01c5", "\u0915\u094d\u0937",
    "\U0001f642", " ...", "-_-", "/", "//\n", "aaaaaaaaa", END_OF_TEXT,
)  # fmt: skip
LARGEST_FILE = 2**26  # bytes; the largest tokenizer.json in use have half of that
CONFIG = "tokenizer_config.json"
PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))  # transformers', OpenAI's
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
CHARACTER = {
    "type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False,
}  # fmt: skip


# ---- in


def are_in(folder: Path) -> bool:
    """Return whether a folder has files that `read` makes a tokenizer of."""
    pairs = (all((folder / name).is_file() for name in pair) for pair in PAIRS)
    return (folder / "tokenizer.json").is_file() or any(pairs)


def read(folder: Path) -> Tokenizer:
    """Return the tokenizer of a folder: of tokenizer.json, or of vocab.json and merges.txt.

    encoder.json and vocab.bpe are OpenAI's names for the latter. GPT-2's own becomes the same as
    tiktoken's gpt2, and what `write` has written of characters or bytes what it was. Raises
    UserError where there is none or it cannot be used.
    """
    if (path := folder / "tokenizer.json").is_file():
        return read_json(path)
    for vocab, merges in PAIRS:
        if (folder / vocab).is_file() and (folder / merges).is_file():
            return read_pair(folder / vocab, folder / merges)
    raise UserError(
        f"{folder} has no tokenizer.json, no vocab.json with merges.txt and no encoder.json with "
        "vocab.bpe: copy there the tokenizer files of the model"
    )


def read_json(path: Path) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json under any name; UserError if it cannot be used.

    A tokenizer_config.json beside it tells the end of text where that is not `<|endoftext|>`.
    """
    text, config = read_text(path), path.with_name(CONFIG)
    end = _parsed(config).get("eos_token") if config.is_file() else None
    end = end.get("content") if isinstance(end, dict) else end
    data = _parsed(path, text)
    if ours := _ours(data):
        return ours
    tokenizer = huggingface_tokenizer(text, end if isinstance(end, str) else None, str(path))
    data = json.loads(tokenizer.spec["json"])
    return gpt2_tokenizer("\n".join(data["model"]["merges"])) if is_gpt2(data) else tokenizer


def read_pair(vocab_path: Path, merges_path: Path) -> Tokenizer:
    """Return the byte-level BPE of two files as GPT-2's; UserError if they cannot be used."""
    lines = read_text(merges_path).replace("\r\n", "\n").removesuffix("\n").split("\n")
    merges = lines[1:] if lines[0].startswith("#version") else lines
    vocab = _parsed(vocab_path)
    if vocab == gpt2_vocab(merges) and is_gpt2(gpt2_json(vocab, merges)):
        return gpt2_tokenizer("\n".join(merges))
    return huggingface_tokenizer(json.dumps(gpt2_json(vocab, merges)), None, str(vocab_path))


def read_text(path: Path) -> str:
    """Return the text of a file of at most LARGEST_FILE bytes; UserError for any other."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise UserError(f"{path} is no regular file: give a tokenizer.json or its folder")
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise UserError(f"{path} has {size:,} bytes, and a tokenizer at most {LARGEST_FILE:,}")
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}: it is no JSON") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _parsed(path: Path, text: str | None = None) -> dict[str, Any]:
    try:
        if isinstance(data := json.loads(read_text(path) if text is None else text), dict):
            return data
        why = f"it is a {type(data).__name__}"
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        why = f"{error!s:.100}"
    raise UserError(f"{path} is not a JSON object ({why}): it is no tokenizer's") from None


def _ours(data: dict[str, Any]) -> Tokenizer | None:
    """Return the tokenizer of characters or bytes that these values were written for."""
    if data == byte_json():
        return byte_tokenizer()
    vocab = data["model"].get("vocab") if isinstance(data.get("model"), dict) else None
    if isinstance(vocab, dict) and [*vocab.values()] == [*range(len(vocab))]:
        single = all(len(symbol) == 1 for symbol in vocab)
        if single and data == char_json(vocab):
            return from_json({"kind": "char", "symbols": "".join(vocab)})
    return None


# ---- out


def write(tokenizer: Tokenizer, folder: Path, n_ctx: int) -> None:
    """Write the files by which transformers' AutoTokenizer gives the same ids as this tokenizer.

    tokenizer.json, which the `tokenizers` library and others read alone; tokenizer_config.json,
    with the context of `n_ctx` tokens and the end of text where that is a token of its own; for
    GPT-2's also its vocab.json and merges.txt. Raises UserError for a tokenizer that has no such
    form: symbols of several characters, or a tiktoken encoding whose ids would differ.
    """
    kind, end = tokenizer.spec["kind"], None
    files: dict[str, str] = {}
    if kind == "byte":
        data = byte_json()
    elif kind == "char":
        if any(len(symbol) != 1 for symbol in tokenizer.spec["symbols"]):
            raise UserError(
                "this char tokenizer has symbols of several characters, for which transformers has "
                "no form: leave the tokenizer out"
            )
        data = char_json(tokenizer.spec["symbols"])
    elif kind == "huggingface":
        data, end = json.loads(tokenizer.spec["json"]), tokenizer.spec["end_of_text"]
    elif tokenizer.spec["name"] == "gpt2":
        vocab, merges = _gpt2_files(tokenizer)
        data, end = gpt2_json(vocab, merges), END_OF_TEXT
        files["vocab.json"] = json.dumps(vocab)
        files["merges.txt"] = "\n".join(["#version: 0.2", *merges, ""])
    else:
        data, end = tiktoken_json(tokenizer.spec["name"]), END_OF_TEXT
        refuse_other_ids(data, tokenizer)
    config = {
        "tokenizer_class": "GPT2Tokenizer" if files else "PreTrainedTokenizerFast",
        "model_max_length": n_ctx,
        "clean_up_tokenization_spaces": False,  # it would take spaces away when decoding
        **({"add_prefix_space": False} if files else {}),
        **({} if end is None else {"eos_token": end}),
        **({"bos_token": end, "unk_token": end} if files else {}),
    }
    files[CONFIG] = json.dumps(config, indent=1) + "\n"
    files["tokenizer.json"] = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for name, text in files.items():
        (folder / name).write_text(text, "utf-8", newline="\n")


def _json(model: dict[str, Any], before: Any, decoder: Any, special: dict[str, int]) -> Any:
    tokens = [
        {"id": i, "content": token, "special": True, "lstrip": False, "rstrip": False,
         "single_word": False, "normalized": False}
        for token, i in special.items()
    ]  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens,
        "normalizer": None, "pre_tokenizer": before, "post_processor": None, "decoder": decoder,
        "model": model,
    }  # fmt: skip


def _bpe(vocab: Any, merges: Iterable[str], ignore_merges: bool = False) -> dict[str, Any]:
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": ignore_merges, "vocab": vocab, "merges": [*merges],
    }  # fmt: skip


def byte_json() -> dict[str, Any]:
    """Return the tokenizer.json of the 256 bytes: a byte-level BPE that never merges."""
    vocab = {ALPHABET[byte]: byte for byte in range(256)}
    whole = {**BYTE_LEVEL, "use_regex": False}
    return _json(_bpe(vocab, []), whole, whole, {})


def char_json(symbols: Iterable[str]) -> dict[str, Any]:
    """Return the tokenizer.json of single characters: each is a word; unknown ones are refused."""
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": ""}
    return _json(model, CHARACTER, {"type": "Fuse"}, {})


def gpt2_json(vocab: dict[str, int], merges: list[str]) -> dict[str, Any]:
    """Return the tokenizer.json of a vocabulary and merges that are used in GPT-2's way."""
    special = {END_OF_TEXT: vocab[END_OF_TEXT]} if END_OF_TEXT in vocab else {}
    whole = {**BYTE_LEVEL, "use_regex": True}
    return _json(_bpe(vocab, merges), whole, whole, special)


def _gpt2_files(tokenizer: Tokenizer) -> tuple[dict[str, int], list[str]]:
    ranks = {tokenizer.token_bytes(i): i for i in range(tokenizer.n_tokens - 1)}
    merges = [" ".join(map(_written, last_pair(token, ranks))) for token in ranks if len(token) > 1]
    return gpt2_vocab(merges), merges


def _written(token: bytes) -> str:
    return "".join(ALPHABET[byte] for byte in token)


def last_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two parts that byte-pair encoding joins last to make a token."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [a + b for a, b in itertools.pairwise(parts)]
        i = min(range(len(joined)), key=lambda i: ranks.get(joined[i], len(ranks)))
        parts[i : i + 2] = [joined[i]]
    return parts[0], parts[1]


def tiktoken_json(name: str) -> dict[str, Any]:
    """Return the tokenizer.json of a tiktoken encoding.

    tiktoken joins any two tokens that together are one, and takes a whole word that is one as it
    is; so every such pair is a merge here, by the rank of what it makes.
    """
    import tiktoken

    # the attributes that tiktoken's README extends an encoding by
    encoding = tiktoken.get_encoding(name)
    ranks, special = encoding._mergeable_ranks, encoding._special_tokens
    merges = [
        (rank, ranks[token[:i]], ranks[token[i:]], f"{_written(token[:i])} {_written(token[i:])}")
        for token, rank in ranks.items()
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    vocab = {**{_written(token): rank for token, rank in ranks.items()}, **special}
    model = _bpe(vocab, (merge for *_, merge in sorted(merges)), ignore_merges=True)
    split = {
        "type": "Split", "pattern": {"Regex": for_oniguruma(encoding._pat_str)},
        "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    whole = {**BYTE_LEVEL, "use_regex": False}
    before = {"type": "Sequence", "pretokenizers": [split, whole]}
    return _json(model, before, whole, special)


def for_oniguruma(pattern: str) -> str:
    """Return a tiktoken pattern in the syntax of the `tokenizers` library's regular expressions.

    There `{1,3}+` repeats, where it is only possessive here, which says nothing at the end of an
    alternative; and `$` is also before a line's end.
    """
    pattern = re.sub(r"(\{\d+(?:,\d*)?\})\+(?=[|)]|$)", r"\1", pattern)
    return re.sub(r"\$(?=[|)]|$)", r"\\z", pattern)


def refuse_other_ids(data: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Raise UserError where a tokenizer.json gives other ids than the tokenizer it is made of."""
    name = f"tiktoken's {tokenizer.spec['name']} as a tokenizer.json"
    made = huggingface_tokenizer(json.dumps(data), END_OF_TEXT, name)
    pairs = ["".join(pair) for pair in itertools.product(FRAGMENTS, repeat=2)]
    for text in [*pairs, "".join(pairs)]:
        if made.encode_ordinary(text) != tokenizer.encode_ordinary(text) or (
            made.encode(text) != tokenizer.encode(text)
        ):
            raise UserError(
                f"{name} gives other ids for {text!r:.40}: leave the tokenizer out, and take its "
                "publisher's"
            )
