"""Data sets: text from somewhere -> train.bin, val.bin and meta.json in one folder.

The .bin files are nanoGPT's: token ids as little-endian uint16, no header. meta.json names the
tokenizer and the vocabulary size, in place of nanoGPT's meta.pkl.
"""

import shlex
from collections.abc import Callable
from pathlib import Path

from gpt_jax.errors import UserError
from gpt_jax.prepare import openwebtext, pystdlib, shakespeare, text
from gpt_jax.prepare.files import Corpus, write
from gpt_jax.prepare.shards import named

SETS = {
    "pystdlib": "Python's own library, found on this machine: byte level, no download",
    "shakespeare_char": "Shakespeare by character: 1.1 MB to download",
    "shakespeare": "Shakespeare by GPT-2's byte-pair encoding: the same 1.1 MB",
    "openwebtext": "GPT-2's training text as rebuilt by others: hours (if interrupted, all again), "
    "18 GB on disk",
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
    for text alone. The files appear under their names when all of them are complete, however this
    ends; run again after an interruption, it starts again and clears what was left. UserError for
    what cannot be used or had, or while another process prepares the same folder.
    """
    write(folder, _corpus(name, folder, input, tokenizer, log), log)


def _corpus(
    name: str,
    folder: Path,
    input: Path | None,
    tokenizer: str | None,
    log: Callable[[str], None],
) -> Corpus:
    if name not in SETS:
        raise UserError(f"no data set {name!r}: the sets are {', '.join(SETS)}")
    if input is not None and name in ("pystdlib", "openwebtext"):
        raise UserError(f"{name} takes no input={str(input)!r}: for text of your own, prepare text")
    if tokenizer is not None and name != "text":
        raise UserError(f"{name} takes no tokenizer={tokenizer!r}: for a choice, prepare text")
    if name == "pystdlib":
        return pystdlib.corpus()
    if name == "openwebtext":
        return openwebtext.corpus(log)
    if name == "text":
        return text.corpus(input, tokenizer or "gpt2")
    return shakespeare.corpus(name, folder, input, log)


def command_for(name: str) -> str:
    """Return the command that makes the data set in the folder of this name."""
    made_of = name if name in SETS else f"text --input=FILE --name={shlex.quote(name)}"
    return f"python -m gpt_jax.prepare {made_of}"


def prepare_on_first_use(name: str, folder: Path, log: Callable[[str], None] = print) -> None:
    """Make a small named data set where there is none yet; for any other say which command does."""
    if named(folder, "val"):  # written last
        return
    if name in SMALL:
        write(folder, _corpus(name, folder, None, None, log), log, first_use=True)
    elif not folder.is_dir() or name in SETS:
        raise UserError(f"there is no data set in {folder}: `{command_for(name)}` makes one")
