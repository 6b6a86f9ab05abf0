"""The Python standard library as a corpus: several MB of good text that every machine has."""

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from gpt_jax.errors import UserError
from gpt_jax.prepare.files import Corpus
from gpt_jax.tokenizer import byte_tokenizer

LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
VAL_EVERY = 20  # the last file of each twenty is for validation


def sources(root: Path) -> list[str]:
    """Return the texts of the .py files under root, in the order of their POSIX paths."""
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    texts = []
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except (UnicodeDecodeError, OSError):  # another encoding, or a link to nowhere
            continue
        if text:
            texts.append(text if text.endswith("\n") else text + "\n")
    return texts


def corpus(root: Path | None = None) -> Corpus:
    """Return the library of the running Python, or the .py files under root, by bytes.

    Each file ends with byte 0, the tokenizer's end of text. UserError with no sources.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    texts, tokenizer = sources(root), byte_tokenizer()
    if len(texts) < VAL_EVERY:
        raise UserError(
            f"{len(texts)} Python sources under {root}, at least {VAL_EVERY} are needed (is this "
            "Python zipped or stripped?): use --dataset=shakespeare_char, or text of your own by "
            "`python -m gpt_jax.prepare text --input=FILE`"
        )

    def pieces() -> Iterator[tuple[str, list[int]]]:
        for i, text in enumerate(texts):
            split = "val" if i % VAL_EVERY == VAL_EVERY - 1 else "train"
            yield split, tokenizer.encode_ordinary(text + "\0")

    return Corpus(f"{len(texts):,} files of Python's library", tokenizer, pieces())
