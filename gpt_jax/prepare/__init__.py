"""Data sets: text from somewhere -> train.bin, val.bin and meta.json in one folder.

The .bin files are nanoGPT's: token ids as little-endian uint16, no header. meta.json names the
tokenizer and the vocabulary size, in place of nanoGPT's meta.pkl.
"""

from collections.abc import Callable
from pathlib import Path

from gpt_jax.errors import UserError
from gpt_jax.prepare import openwebtext, pystdlib, shakespeare, text
from gpt_jax.prepare.files import write

SETS = {
    "pystdlib": "Python's own library, found on this machine: byte level, no download",
    "shakespeare_char": "Shakespeare by character: 1.1 MB to download",
    "shakespeare": "Shakespeare by GPT-2's byte-pair encoding: the same 1.1 MB",
    "openwebtext": "GPT-2's training text as rebuilt by others: hours, 18 GB on disk",
    "text": "a text file of yours, or a folder of .txt and .md files: --input=",
}
SMALL = frozenset({"pystdlib", "shakespeare_char", "shakespeare"})  # made when first trained on


def prepare(
    name: str,
    folder: Path,
    *,
    input: Path | None = None,
    tokenizer: str | None = None,
    log: Callable[[str], None] = print,
) -> None:
    """Write the data set called name into folder.

    input is the text of shakespeare, shakespeare_char and text; tokenizer (char, byte or gpt2) is
    for text alone. The files appear under their names when all of them are complete. UserError
    for what cannot be used or had.
    """
    if name not in SETS:
        raise UserError(f"no data set {name!r}: the sets are {', '.join(SETS)}")
    if input is not None and name in ("pystdlib", "openwebtext"):
        raise UserError(f"{name} takes no input={str(input)!r}: for text of your own, prepare text")
    if tokenizer is not None and name != "text":
        raise UserError(f"{name} takes no tokenizer={tokenizer!r}: for a choice, prepare text")
    if name == "pystdlib":
        corpus = pystdlib.corpus()
    elif name == "openwebtext":
        corpus = openwebtext.corpus(log)
    elif name == "text":
        corpus = text.corpus(input, tokenizer or "gpt2")
    else:
        corpus = shakespeare.corpus(name, folder, input, log)
    write(folder, corpus, log)


def prepare_on_first_use(name: str, folder: Path, log: Callable[[str], None] = print) -> None:
    """Make a small named data set where there is none yet; for any other say which command does."""
    if (folder / "val.bin").exists():  # written last
        return
    if name in SMALL:
        prepare(name, folder, log=log)
    elif not folder.is_dir() or name in SETS:
        command = (
            f"python -m gpt_jax.prepare {name}"
            if name in SETS
            else ("python -m gpt_jax.prepare text --input=FILE --name=" + name)
        )
        raise UserError(f"there is no data set in {folder}: `{command}` makes one")
