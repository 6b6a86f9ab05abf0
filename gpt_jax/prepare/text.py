"""A text of your own: one file, or the .txt and .md files of a folder."""

import re
from collections.abc import Iterator
from pathlib import Path

from gpt_jax.errors import UserError
from gpt_jax.prepare.files import MAX_TOKENS, Corpus, cut, read_text
from gpt_jax.tokenizer import byte_tokenizer, char_tokenizer, tiktoken_tokenizer

TOKENIZERS = ("char", "byte", "gpt2")
SUFFIXES = (".txt", ".md")
CHUNK = 1 << 20  # characters encoded at a time, so that the ids of a large text are never one list
# A line that starts with a word starts a GPT-2 pre-token too, when the line before is not blank:
# encoding up to here and from here gives the ids of the whole.
LINE = re.compile(r"(?<=\S\n)(?=\S)")


def corpus(input: Path | None, kind: str) -> Corpus:
    """Return the text of a file or folder, 90 % of its characters for training."""
    if kind not in TOKENIZERS:
        raise UserError(f"tokenizer={kind!r} is not one of {', '.join(TOKENIZERS)}")
    documents = _documents(input)
    if kind == "char":
        symbols = sorted(set().union(*documents))
        if len(symbols) > MAX_TOKENS:
            raise UserError(
                f"{input} has {len(symbols):,} different characters, and a token file holds "
                f"{MAX_TOKENS:,}: use --tokenizer=byte or --tokenizer=gpt2"
            )
        tokenizer = char_tokenizer(symbols)
    else:
        tokenizer = byte_tokenizer() if kind == "byte" else tiktoken_tokenizer("gpt2")
        tokenizer.token_bytes(0)  # with no files for tiktoken, say so before any work
    end = [] if len(documents) == 1 or tokenizer.end_of_text is None else [tokenizer.end_of_text]

    def pieces() -> Iterator[tuple[str, list[int]]]:
        left = cut(sum(map(len, documents)))  # characters still to go to train
        for document in documents:
            for split, text in (("train", document[:left]), ("val", document[left:])):
                for chunk in chunks(text):
                    yield split, tokenizer.encode_ordinary(chunk)
            yield ("train" if len(document) <= left else "val"), end
            left = max(0, left - len(document))

    return Corpus(str(input), tokenizer, pieces())


def chunks(text: str, size: int = CHUNK) -> Iterator[str]:
    """Cut text into parts of about size characters whose GPT-2 ids join to those of the whole."""
    start = 0
    while start < len(text):
        found = LINE.search(text, start + size)
        end = found.start() if found else len(text)
        yield text[start:end]
        start = end


def _documents(input: Path | None) -> list[str]:
    if input is None:
        raise UserError("text needs --input=FILE, or a folder of .txt and .md files")
    if not input.is_dir():
        text = read_text(input)
        if not text:
            raise UserError(f"{input} is empty: give a file of text")
        return [text]
    found = [path for path in input.rglob("*") if path.suffix.lower() in SUFFIXES]
    paths = sorted((path for path in found if path.is_file()), key=lambda path: path.as_posix())
    documents = [text for text in map(read_text, paths) if text]
    if not documents:
        raise UserError(f"{input} has no text: {len(paths)} .txt and .md files, none with a word")
    return documents
