"""Tiny Shakespeare, by character or by GPT-2's encoding: the bytes that nanoGPT writes."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from gpt_jax.errors import UserError
from gpt_jax.prepare.download import download
from gpt_jax.prepare.files import Corpus, cut, read_text
from gpt_jax.tokenizer import char_tokenizer, tiktoken_tokenizer

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def corpus(name: str, folder: Path, input: Path | None, log: Callable[[str], None]) -> Corpus:
    """Return `shakespeare_char` or `shakespeare`, from input, folder/input.txt or the network."""
    path = input or folder / "input.txt"
    if input is None and not path.exists():
        remedy = f"or get the text by other means: python -m gpt_jax.prepare {name} --input=FILE"
        download(URL, path, SHA256, remedy, log)
    text = read_text(path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        log(f"{path} is not the published tiny Shakespeare (its SHA-256 differs): losses will too")
    if not text:
        raise UserError(f"{path} is empty: give a file of text")
    char = name == "shakespeare_char"
    tokenizer = char_tokenizer(sorted(set(text))) if char else tiktoken_tokenizer("gpt2")
    at = cut(len(text))
    pieces = [
        ("train", tokenizer.encode_ordinary(text[:at])),
        ("val", tokenizer.encode_ordinary(text[at:])),
    ]
    return Corpus(str(path), tokenizer, pieces)
