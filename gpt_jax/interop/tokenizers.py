"""Byte-pair tokenizers of others, whole: a Hugging Face tokenizer.json, and GPT-2's own merges.

Their specs hold the file, so that a data set and a checkpoint need nothing beside them. Such a
spec may come from anyone. It is read here as plain JSON, and what an id stands for is known from
that alone; only to encode text is the `tokenizers` library needed, and only a file of known
parts comes to it.
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from gpt_jax.errors import UserError
from gpt_jax.tokenizer import Tokenizer, tiktoken_tokenizer

LARGEST = 2**26 - 2**16  # characters of a spec as JSON, with room in a meta.json of 64 MiB
MOST_TOKENS = 2**20  # ids: four times the largest vocabulary in use
END_OF_TEXT = "<|endoftext|>"
OTHERS = ("<|end_of_text|>", "</s>", "<eos>")  # Llama 3's, Llama 2's and Gemma's
# of GPT-2's 50,000 merges, a line each
GPT2_SHA256 = "04e3597d7996f292ca9b8b7285ca4d58a6ae171ac47d73fc7140ceb0c7a6bbc0"
# as tiktoken writes it: the same matches as the published one, in less time
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# GPT-2's character for each byte, in the order of its ids
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
REST = [byte for byte in range(256) if byte not in PRINTABLE]
ALPHABET = {byte: chr(byte) for byte in PRINTABLE} | {
    byte: chr(256 + i) for i, byte in enumerate(REST)
}
BYTE_OF = {char: byte for byte, char in ALPHABET.items()}
NEVER = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that no UTF-8 has
# what a tokenizer must give back; in Unicode's composed form, as Qwen's turns everything into
PROBE = "Hello  world's\n\n\t€5 naïve 日本語 🙂 12345 \x00\x7f\u0378 DON'T   "


def from_files(spec: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer of a spec that holds its files; UserError for what is none."""
    match spec:
        case {"kind": "tiktoken", "name": "gpt2", "merges": str() as merges}:
            return gpt2_tokenizer(merges)
        case {"kind": "huggingface", "json": str() as text, "end_of_text": str() | None as end}:
            return huggingface_tokenizer(
                text, end, "the tokenizer.json kept with this model or data"
            )
    raise UserError(f"no tokenizer can be made of a spec with {', '.join(map(repr, spec)):.60}")


def gpt2_tokenizer(merges: str) -> Tokenizer:
    """Return GPT-2's tokenizer, by tiktoken, of its 50,000 merges; UserError for any others."""
    if hashlib.sha256(merges.encode("utf-8", "replace")).hexdigest() != GPT2_SHA256:
        raise UserError(f"{merges.count(chr(10)) + 1:,} merges are not GPT-2's 50,000")
    its = gpt2_vocab(merges.split("\n"))

    def encoding() -> Any:
        import tiktoken

        ranks = {bytes_of(token): i for token, i in its.items() if token != END_OF_TEXT}
        special = {END_OF_TEXT: its[END_OF_TEXT]}
        return tiktoken.Encoding(
            "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )

    return replace(tiktoken_tokenizer("gpt2", encoding), files={"merges": merges})


def gpt2_vocab(merges: list[str]) -> dict[str, int]:
    """Return the vocabulary that merges make in GPT-2's way: bytes, merges, end of text."""
    tokens = [*BYTE_OF, *(merge.replace(" ", "") for merge in merges), END_OF_TEXT]
    return {token: i for i, token in enumerate(tokens)}


def bytes_of(token: str) -> bytes:
    """Return the bytes that a token of byte-level BPE is written for."""
    try:
        return bytes(BYTE_OF[char] for char in token)
    except KeyError:  # not written in that alphabet, as some special tokens
        return token.encode()


def huggingface_tokenizer(text: str, end_of_text: str | None, name: str) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json's text; `name` is what messages call it.

    The end of text is `<|endoftext|>` where there is one, else `end_of_text`, else another
    well-known one or none. It becomes special; padding, truncation, dropout and what is put around
    a text (such as a token at its start) are left out, so that a text's ids are those that models
    are trained on here. encode() knows all that the file says is special. Raises UserError for what
    is no byte-pair encoding, or one where an id's bytes hang on its place.
    """
    try:
        if len(text) > LARGEST:
            raise ValueError(f"{len(text):,} characters are more than {LARGEST:,}")
        data, end = canonical(json.loads(text), end_of_text)
        ids, bytes_by_id = vocabulary(data)
        text = json.dumps(data, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        text.encode()
        if (size := len(json.dumps(text))) > LARGEST:
            raise ValueError(f"kept, {size:,} characters are more than {LARGEST:,}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"{type(error).__name__}: " * (type(error) is not ValueError) + f"{error!s:.200}"
        raise UserError(
            f"{name} cannot be used ({' '.join(why.split())}): take a byte-level BPE, such as "
            "GPT-2's, Llama 3's, Qwen's or one of your own by bpe:8192"
        ) from None
    specials = [token["content"] for token in data["added_tokens"] if token["special"]]

    @functools.cache
    def library(special: bool) -> Any:
        try:
            import tokenizers  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError(
                f"{name} needs the package tokenizers: pip install 'gpt_jax[tokenizers]'"
            ) from None
        with in_a_line(name):
            made = tokenizers.Tokenizer.from_str(text)
            made.encode_special_tokens = not special
            if not special:
                refuse_lossy(made)
        return made

    def refuse_lossy(made: Any) -> None:
        if made.get_vocab(with_added_tokens=True) != ids:
            raise ValueError("the library numbers its tokens otherwise than the file says")
        probe = PROBE + (end or "")
        found = made.encode(probe, add_special_tokens=False).ids
        if b"".join(map(bytes_by_id.__getitem__, found)) != probe.encode():
            raise ValueError("text does not come back from its ids as it was")
        if end and ids[end] in found:
            raise ValueError(f"{end!r:.40} in ordinary text would end the text")

    def encode(text: str, special: bool) -> list[int]:
        made = library(False)
        if special and any(token in text for token in specials):
            made = library(True)
        with in_a_line(name):  # a batch, though of one: it lets other threads run, and is faster
            return made.encode_batch_fast([text], add_special_tokens=False)[0].ids

    spec = {"kind": "huggingface", "json": text, "end_of_text": end}
    n_tokens, end_id = max(ids.values()) + 1, ids[end] if end else None
    # some files leave ids unused
    return Tokenizer(spec, n_tokens, end_id, encode, lambda i: bytes_by_id.get(i, b""))


@contextmanager
def in_a_line(name: str) -> Iterator[None]:
    """Turn what the `tokenizers` library raises into one line; it raises plain Exceptions."""
    try:
        yield
    except (UserError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of its Rust is no Exception
        why = " ".join(str(error).split())
        raise UserError(f"{name} cannot be used by the package tokenizers: {why:.200}") from None


def canonical(data: Any, end_of_text: str | None) -> tuple[dict[str, Any], str | None]:
    """Return a tokenizer.json's values as they are kept, the same for the same tokenizer.

    And its end of text, as huggingface_tokenizer says. Raises ValueError, KeyError, TypeError or
    AttributeError for other values.
    """
    model = data["model"]
    kind = model.get("type", "BPE" if "merges" in model else None)  # older files do not say it
    if kind != "BPE":
        raise ValueError(f"its model is {kind!r:.40}, and only BPE keeps every text")
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    if all(len(pair) == 2 and not any(" " in part for part in pair) for pair in merges):
        merges = [" ".join(pair) for pair in merges]  # shorter, and every version reads it
    known = [_added(token) for token in data.get("added_tokens") or []]
    ids = {**model["vocab"], **{token["content"]: token["id"] for token in known}}
    end = next((end for end in (END_OF_TEXT, end_of_text, *OTHERS) if end in ids), None)
    if end is not None:
        its = next((token for token in known if token["content"] == end), None)
        known = [token for token in known if token is not its]
        known.append({**(its or _added({"content": end, "id": ids[end]})), "special": True})
    model = {**model, "type": "BPE", "merges": merges, "dropout": None}
    kept = {
        "version": "1.0", "truncation": None, "padding": None, "post_processor": None,
        "added_tokens": sorted(known, key=lambda token: token["id"]), "model": model,
        **{part: data.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")},
    }  # fmt: skip
    return kept, end


def _added(token: dict[str, Any]) -> dict[str, Any]:
    flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
    return {
        "id": token["id"],
        "content": token["content"],
        **{f: token.get(f) is True for f in flags},
    }


def vocabulary(data: dict[str, Any]) -> tuple[dict[str, int], dict[int, bytes]]:
    """Return the ids of all tokens and the bytes of all ids; ValueError where these are not clear.

    That is so of a byte-level BPE, and of one that falls back to bytes and puts U+2581 for each
    space, if neither changes the text before.
    """
    model, added = data["model"], {t["content"]: t["id"] for t in data["added_tokens"]}
    decoder, normalizer = (
        _parts(data["decoder"], "decoders"),
        _parts(data["normalizer"], "normalizers"),
    )
    _parts(data["pre_tokenizer"], "pretokenizers")
    for part in normalizer:
        if part["type"] != "NFC" and part != _replace(" ", "\u2581"):
            raise ValueError(f"its normalizer {part['type']!r:.40} changes the text")
    for token in data["added_tokens"]:
        if not token["special"] and (token["lstrip"] or token["rstrip"]):
            raise ValueError(f"its added token {token['content']!r:.40} takes spaces away")
    ids = {**model["vocab"], **added}
    if not all(
        type(t) is str and t and type(i) is int and 0 <= i < MOST_TOKENS for t, i in ids.items()
    ):
        raise ValueError(f"its ids are not those of tokens from 0 to {MOST_TOKENS - 1:,}")
    if len({*ids.values()}) != len(ids):
        raise ValueError("two of its tokens have one id")
    if [part["type"] for part in decoder] == ["ByteLevel"]:
        of, missing = (
            bytes_of,
            {ALPHABET[byte] for byte in range(256) if byte not in NEVER} - {*ids},
        )
    elif model.get("byte_fallback") is True and all(
        part["type"] in ("ByteFallback", "Fuse") or part == _replace("\u2581", " ")
        for part in decoder
    ):
        fallback = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
        of, missing = (
            lambda t: fallback.get(t) or t.replace("\u2581", " ").encode(),
            {*fallback} - {*ids},
        )
    else:
        kinds = ", ".join(str(part["type"]) for part in decoder) or "none"
        raise ValueError(f"with its decoder ({kinds:.60}) an id has no bytes of its own")
    if missing:
        raise ValueError(
            f"it has no ids for {len(missing)} of the 256 bytes, so not for every text"
        )
    by_id = {i: of(token) for token, i in model["vocab"].items()}
    return ids, {**by_id, **{i: token.encode() for token, i in added.items()}}


def _parts(part: Any, name: str) -> list[dict[str, Any]]:
    """Return the parts of a Sequence, the part itself, or none."""
    return [] if part is None else part[name] if part["type"] == "Sequence" else [part]


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def is_gpt2(data: dict[str, Any]) -> bool:
    """Return whether canonical values are those of GPT-2's tokenizer: its ids for every text."""
    before, model = data["pre_tokenizer"] or {}, data["model"]
    return (
        hashlib.sha256("\n".join(map(str, model["merges"])).encode()).hexdigest() == GPT2_SHA256
        and model["vocab"] == gpt2_vocab(model["merges"])
        and [before.get(k, True) for k in ("type", "use_regex")] == ["ByteLevel", True]
        and before.get("add_prefix_space") is False
        and data["normalizer"] is None
        and [token["content"] for token in data["added_tokens"]] == [END_OF_TEXT]
    )
