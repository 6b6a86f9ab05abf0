"""The tokenizer that a data set is made with, as `--tokenizer=` names it."""

import difflib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from gpt_jax.errors import UserError
from gpt_jax.interop.tokenizer_files import gpt2_json, read, read_json
from gpt_jax.interop.tokenizers import (
    ALPHABET,
    END_OF_TEXT,
    MOST_TOKENS,
    huggingface_tokenizer,
    in_a_line,
)
from gpt_jax.tokenizer import Tokenizer, byte_tokenizer, char_tokenizer, tiktoken_tokenizer

SAMPLE = 2**25  # characters that a BPE is trained on, the first ones: memory grows with their words
PIECE = 2**12  # characters in which words are counted, so that none is longer: time grows with that
FORMS = (
    "char, byte, gpt2 (the default) or another of tiktoken's (cl100k_base, o200k_base, ...), "
    "bpe:8192 (so many ids, trained on the text), or the path of a tokenizer.json or of a folder "
    "with one or with GPT-2's files"
)


def choose(spec: str, sample: Callable[[], Iterator[str]] | None = None) -> Tokenizer:
    """Return the tokenizer that `spec` names, ready to encode; UserError if it cannot be had.

    `spec` is "char", "byte", a tiktoken encoding's name, "bpe:N", or the path of a tokenizer.json
    or of a folder with one or with GPT-2's files (`./gpt2` where a name says something else).
    `sample()` yields text in parts: for "char" all there is; for "bpe:N" that of training, of which
    the first SAMPLE characters are used. The others need none.
    """
    name, colon, size = spec.partition(":")
    if spec == "byte":
        return byte_tokenizer()
    if spec == "char" and sample:
        return char_tokenizer(sorted(set().union(*map(set, sample()))))
    if name == "bpe" and colon and sample:
        if not size.isdecimal() or not 257 <= int(size[:9]) <= MOST_TOKENS:
            raise UserError(
                f"tokenizer={spec!r:.40} has no size from 257 (the bytes and the end of text) to "
                f"{MOST_TOKENS:,}: write bpe:8192"
            )
        return train(int(size), sample())
    if spec in (names := _tiktoken_names()):
        try:
            tokenizer = tiktoken_tokenizer(spec)
        except KeyError:
            raise UserError(f"tiktoken's {spec} has no {END_OF_TEXT}: take another") from None
    elif (path := Path(spec)).exists():
        tokenizer = read(path) if path.is_dir() else read_json(path)
    else:
        near = difflib.get_close_matches(spec, ["char", "byte", "bpe:8192", *names], 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {FORMS}"
        raise UserError(f"tokenizer={spec!r:.80} is no tokenizer and no such path is there: {hint}")
    tokenizer.encode_ordinary("a")  # what is missing is said before any work
    return tokenizer


def _tiktoken_names() -> list[str]:
    import tiktoken

    return tiktoken.list_encoding_names()


def train(n_tokens: int, texts: Iterator[str]) -> Tokenizer:
    """Return a byte-level BPE of `n_tokens` ids, trained on the first SAMPLE characters of texts.

    As GPT-2's: its pre-tokenizer, all 256 bytes, then merges, and `<|endoftext|>` last. The same
    text gives the same tokenizer. Raises UserError where the text has too little to merge. Method:
    Sennrich et al. 2016 (arXiv:1508.07909), over bytes as in Radford et al. 2019.
    """
    try:
        from tokenizers import (  # pyright: ignore[reportMissingImports]
            Tokenizer as Library,
        )
        from tokenizers import models, pre_tokenizers, trainers  # pyright: ignore
    except ImportError:
        raise UserError(
            f"bpe:{n_tokens} needs the package tokenizers: pip install 'gpt_jax[tokenizers]'"
        ) from None
    with in_a_line(f"bpe:{n_tokens}"):
        library = Library(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=n_tokens - 1, initial_alphabet=[*ALPHABET.values()], show_progress=False
        )
        library.train_from_iterator(_pieces(texts), trainer)
        model = json.loads(library.to_str())["model"]
    if (found := len(model["vocab"]) + 1) < n_tokens:
        raise UserError(
            f"bpe:{n_tokens}: the text gives only {found:,} tokens, it repeats nothing more: use "
            f"bpe:{found} or less, or give more text"
        )
    vocab = {**model["vocab"], END_OF_TEXT: n_tokens - 1}
    data = gpt2_json(vocab, model["merges"])
    return huggingface_tokenizer(json.dumps(data), END_OF_TEXT, f"bpe:{n_tokens}")


def _pieces(texts: Iterator[str]) -> Iterator[str]:
    """Cut the first SAMPLE characters into pieces, before a space where there is one."""
    left = SAMPLE
    for text in texts:
        text, start = text[:left], 0
        while start < len(text):
            end = start + PIECE
            if end < len(text) and (space := text.rfind(" ", start + 1, end)) > 0:
                end = space
            yield text[start:end]
            start = end
        left -= len(text)
        if not left:
            return
