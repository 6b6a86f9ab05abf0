"""Text to token ids and back: by character, by byte, or by byte-pair encoding such as GPT-2's."""

import codecs
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpt_jax.errors import UserError


@dataclass(frozen=True, eq=False, repr=False)  # its spec may hold a file of megabytes
class Tokenizer:
    """Text to token ids and back; made by the functions below."""

    spec: dict[str, Any]
    n_tokens: int  # the ids are 0 to n_tokens - 1
    end_of_text: int | None  # the id between documents
    _encode: Callable[[str, bool], list[int]]  # text, is `<|endoftext|>` special -> ids
    _bytes: Callable[[int], bytes]  # of an id in range
    files: dict[str, str] | None = None  # those that a spec only names, to go with it

    def encode(self, text: str) -> list[int]:
        """Return the ids of text; UserError where the tokenizer has none for it."""
        try:
            text.encode()
        except UnicodeEncodeError as error:  # as from a command line that is not UTF-8
            raise UserError(f"text is not Unicode at position {error.start}: use UTF-8") from None
        return self._encode(text, True)

    def encode_ordinary(self, text: str) -> list[int]:
        """Return the ids of text in which nothing is special, `<|endoftext|>` included."""
        return self._encode(text, False)

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of one id; UserError for an id out of range."""
        if not 0 <= token < self.n_tokens:
            last = self.n_tokens - 1
            raise UserError(f"token id {token} is not in 0..{last}: use this model's tokenizer")
        return self._bytes(int(token))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD."""
        return stream_decoder(self)(ids, final=True)

    def byte_lengths(self) -> np.ndarray:
        """Return the UTF-8 bytes of each id, int64 (n_tokens,)."""
        return np.array([len(self._bytes(token)) for token in range(self.n_tokens)], np.int64)

    def to_json(self) -> dict[str, Any]:
        """Return plain values from which from_json makes this tokenizer again.

        Whether two are alike their specs say: one may have files kept with it, the other not.
        """
        return {**self.spec, **(self.files or {})}


def char_tokenizer(symbols: Sequence[str]) -> Tokenizer:
    """Return nanoGPT's character level: the id of a code point is its place among the symbols."""
    ids = {symbol: i for i, symbol in enumerate(symbols)}

    def encode(text: str, _: bool) -> list[int]:
        try:
            return [ids[char] for char in text]
        except KeyError as error:
            char, known = error.args[0], f"the {len(ids)} symbols this model was trained on"
            found = f"character {char!r} (U+{ord(char):04X}) at position {text.index(char)}"
            raise UserError(f"{found} is not among {known}") from None

    single = set(map(len, symbols)) == {1}
    spec = {"kind": "char", "symbols": "".join(symbols) if single else list(symbols)}
    return Tokenizer(spec, len(ids), None, encode, lambda i: symbols[i].encode("utf-8", "replace"))


def byte_tokenizer() -> Tokenizer:
    """Return the 256 bytes of UTF-8; byte 0 ends a document."""
    return Tokenizer({"kind": "byte"}, 256, 0, lambda t, _: list(t.encode()), lambda i: bytes([i]))


def tiktoken_tokenizer(name: str, make: Callable[[], Any] | None = None) -> Tokenizer:
    """Return a tiktoken encoding, by name or by the function that makes it.

    GPT-2's files are not read before text needs them.
    """

    @functools.cache
    def encoding() -> Any:
        import tiktoken

        try:
            return make() if make else tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:
            raise UserError(
                f"no tiktoken encoding {name!r} ({type(error).__name__}): with no network, "
                "set TIKTOKEN_CACHE_DIR to a folder with (for gpt2) vocab.bpe named "
                "6d1cbeee0f20b3d9449abfede4726ed8212e3aee and encoder.json named "
                "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"
            ) from error

    def encode(text: str, special: bool) -> list[int]:
        allowed = {"<|endoftext|>"} if special else set()
        return encoding().encode(text, allowed_special=allowed, disallowed_special=())

    def token_bytes(token: int) -> bytes:
        try:
            return encoding().decode_single_token_bytes(token)
        except KeyError:  # some encodings leave ids unused
            return b""

    ids = (50257, 50256) if name == "gpt2" else (encoding().n_vocab, encoding().eot_token)
    return Tokenizer({"kind": "tiktoken", "name": name}, *ids, encode, token_bytes)


def from_json(spec: Any) -> Tokenizer:
    """Return the tokenizer of to_json's values; UserError for any others."""
    match spec:
        case {"kind": "char", "symbols": str() | list() as its} if its:  # no surrogate and no ""
            if len({x for x in its if type(x) is str and x.encode(errors="ignore")}) == len(its):
                return char_tokenizer(its)
        case {"kind": "byte"}:
            return byte_tokenizer()
        case {"kind": "huggingface"} | {"kind": "tiktoken", "merges": _}:
            from gpt_jax.interop.tokenizers import from_files  # which is made of this module

            return from_files(spec)
        case {"kind": "tiktoken", "name": str() as name} if len(name) < 60:
            return tiktoken_tokenizer(name)
    raise UserError(f"no tokenizer of kind char, byte, tiktoken or huggingface: {spec!r:.60}")


def stream_decoder(tokenizer: Tokenizer) -> Callable[..., str]:
    """Return `text(ids, final=False)`: the next part of the text, in whole characters."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return lambda ids, final=False: decoder.decode(b"".join(map(tokenizer.token_bytes, ids)), final)
