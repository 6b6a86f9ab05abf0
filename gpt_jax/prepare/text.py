"""A text of your own: one file, or the .txt and .md files of a folder."""

import functools
import re
from collections.abc import Iterator
from pathlib import Path

from gpt_jax.errors import UserError
from gpt_jax.prepare.files import Corpus, cut, read_text
from gpt_jax.prepare.tokenizers import choose

SUFFIXES = (".txt", ".md")
CHUNK = 1 << 20  # characters encoded at a time, so that the ids of a large text are never one list
# A line that starts with a word starts a GPT-2 pre-token too, and one of later encodings, when the
# line before is not blank: encoding up to here and from here gives the ids of the whole.
LINE = re.compile(r"(?<=\S\n)(?=\S)")


def corpus(input: Path | None, kind: str) -> Corpus:
    """Return the text of a file or folder, 90 % of its characters for training.

    `kind` is what prepare.tokenizers.choose takes; a "bpe:N" is trained on the training part.
    """
    if input is None:
        raise UserError("text needs --input=FILE, or a folder of .txt and .md files")

    @functools.cache
    def read() -> list[str]:
        return _documents(input)

    def sample() -> Iterator[str]:
        left = cut(sum(map(len, read())))
        for document in read():
            yield document if kind == "char" else document[:left]
            left = max(0, left - len(document))

    tokenizer, documents = choose(kind, sample), read()
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


def _documents(input: Path) -> list[str]:
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
