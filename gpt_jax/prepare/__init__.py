"""Data sets: text from somewhere -> train.bin, val.bin and meta.json in one folder.

The .bin files are nanoGPT's: token ids as little-endian uint16, no header; uint32 for vocabularies
over 65,535. meta.json holds the tokenizer and the vocabulary size, in place of nanoGPT's meta.pkl.
"""

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from gpt_jax.errors import UserError
from gpt_jax.prepare import pystdlib, shakespeare, text
from gpt_jax.prepare.files import Corpus, Stream, write
from gpt_jax.prepare.shards import named as token_files
from gpt_jax.tokenizer import from_json

SETS = {
    "pystdlib": "Python's own library, found on this machine: byte level, no download",
    "shakespeare_char": "Shakespeare by character: 1.1 MB to download",
    "shakespeare": "Shakespeare by GPT-2's byte-pair encoding: the same 1.1 MB",
    "openwebtext": "GPT-2's training text as rebuilt by others: 9 billion tokens, 18 GB on disk",
    "fineweb_edu": "FineWeb-Edu's sample of 10 billion tokens: 20 GB on disk",
    "text": "text of yours, or any data set of the Hugging Face hub: --input=",
}
SMALL = frozenset({"pystdlib", "shakespeare_char", "shakespeare"})  # made when first trained on
LARGE = frozenset({"openwebtext", "fineweb_edu", "text"})  # streamed


def prepare(
    name: str,
    folder: Path,
    *,
    input: str | Path | Sequence[str | Path] | None = None,
    tokenizer: str | None = None,
    config: str | None = None,
    split: str | None = None,
    column: str | None = None,
    val_share: float | None = None,
    workers: int | None = None,
    live: bool = False,
    log: Callable[[str], None] = print,
) -> None:
    """Write the data set called name into folder.

    input is the text of shakespeare, shakespeare_char (one file) and text: files, folders, glob
    patterns, or hf:owner/name of the hub, whose config, split ("train") and column ("text", also of
    .jsonl and .parquet) can be told. tokenizer, val_share and workers are for the sets that are
    streamed: openwebtext, fineweb_edu and text. live rewrites one line of progress on stdout.

    The files appear under their names when all of them are complete, however this ends. Run again
    after an interruption, a streamed set goes on, another starts again; the files are the same.
    UserError for what cannot be used or had, where folder has a set from another source or of
    another kind of tokenizer, or while another process prepares the same folder.
    """
    inputs = [input] if isinstance(input, str | Path) else list(input or [])
    told = {"tokenizer": tokenizer, "val_share": val_share, "workers": workers}
    told |= {"config": config, "split": split, "column": column}
    _refuse_what_it_does_not_take(name, inputs, told)
    if name not in LARGE:
        small = _small(name, folder, Path(inputs[0]) if inputs else None, log)
        if folder.name != name:  # where one of its own name is, it is made anew
            _refuse_another(folder, small)
        write(folder, small, log)
        return
    if name == "text":
        sources = text.sources_of(inputs, config, split, column)
        called = ", ".join(map(str, inputs))
    else:
        sources = [text.named(name)]
        called = sources[0].name
    corpus = text.stream(sources, called, tokenizer or "gpt2", val_share, workers, log, live)
    _refuse_another(folder, corpus)
    write(folder, corpus, log)


def _refuse_what_it_does_not_take(
    name: str, inputs: Sequence[str | Path], told: dict[str, object]
) -> None:
    if name not in SETS:
        raise UserError(f"no data set {name!r}: the sets are {', '.join(SETS)}")
    if inputs and name in ("pystdlib", "openwebtext", "fineweb_edu"):
        what = ", ".join(map(str, inputs))
        raise UserError(f"{name} takes no input={what!r}: for text of your own, prepare text")
    if len(inputs) > 1 and name != "text":
        raise UserError(f"{name} takes one input, not {len(inputs)}: for more, prepare text")
    streamed = ("tokenizer", "val_share", "workers") if name in LARGE else ()
    takes = tuple(told) if name == "text" else streamed
    for flag, value in told.items():
        if value is not None and flag not in takes:
            raise UserError(f"{name} takes no {flag}={value!r}: for a choice, prepare text")


def _small(name: str, folder: Path, input: Path | None, log: Callable[[str], None]) -> Corpus:
    if name == "pystdlib":
        return pystdlib.corpus()
    return shakespeare.corpus(name, folder, input, log)


def _refuse_another(folder: Path, corpus: Corpus | Stream) -> None:
    """Raise UserError where the folder has a data set that this one would not be the same as."""
    if not token_files(folder, "val"):
        return
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        its, ours = meta["tokenizer"], corpus.tokenizer.spec
        # the symbols or merges of a text that was edited may be others: the same set, made anew
        kinds = [(spec["kind"], spec.get("name")) for spec in (its, ours)]
        sized = its["kind"] != "huggingface" or (
            from_json(its).n_tokens == corpus.tokenizer.n_tokens
        )
        same = meta["source"] == corpus.source and kinds[0] == kinds[1] and sized
        of = f"of {meta['source']}, {its['kind']} tokenizer"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        same, of = False, "that another program made"
    if not same:
        raise UserError(
            f"{folder} has a data set {of}: give this one another --name=, or remove that"
        )


def command_for(name: str) -> str:
    """Return the command that makes the data set in the folder of this name."""
    made_of = name if name in SETS else f"text --input=FILE --name={shlex.quote(name)}"
    return f"python -m gpt_jax.prepare {made_of}"


def prepare_on_first_use(name: str, folder: Path, log: Callable[[str], None] = print) -> None:
    """Make a small named data set where there is none yet; for any other say which command does."""
    if token_files(folder, "val"):  # written last
        return
    if name in SMALL:
        write(folder, _small(name, folder, None, log), log, first_use=True)
    elif not folder.is_dir() or name in SETS:
        raise UserError(f"there is no data set in {folder}: `{command_for(name)}` makes one")
