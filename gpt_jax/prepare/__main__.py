"""`python -m gpt_jax.prepare NAME`: make a data set."""

import difflib
import shlex
import sys
from pathlib import Path

from gpt_jax.errors import UserError, exit_code
from gpt_jax.prepare import SETS, prepare
from gpt_jax.prepare.sources import KNOWN
from gpt_jax.prepare.tokenizers import FORMS
from gpt_jax.scripts import as_typed

FLAGS = {
    "input": "files, folders, 'patterns*', with commas between, or hf:owner/name; may be repeated",
    "tokenizer": FORMS,
    "val_share": "for validation; 0.1, of the hub 0.0005",
    "column": "of .jsonl, .parquet and the hub: text",
    "split": "of the hub: train",
    "config": "of the hub, where a data set has several",
    "workers": "threads that encode: as many as there are cores",
    "data_dir": "where data sets live: data",
    "name": "the folder under data_dir: by default the set's name",
    "help": "this page",
}
HELP = "\n".join(
    [
        "usage: python -m gpt_jax.prepare NAME [--flag=value ...]",
        "       python -m gpt_jax.prepare text FILE_OR_FOLDER ... [--flag=value ...]",
        "",
        "Writes train.bin, val.bin and meta.json into data_dir/NAME. The sets:",
        *(f"  {name:17} {what}" for name, what in SETS.items()),
        "",
        "The flags:",
        *(f"  --{flag:15} {what}" for flag, what in FLAGS.items()),
        "",
        f"Files: {KNOWN}.",
        "One file of text is one document. Else each file of text and each row is one, and end of",
        "text follows it. Of text files alone the last val_share of all characters is for",
        "validation; where there are rows (.jsonl, .parquet, the hub) each document is by a chance",
        "that its number decides, the same every time.",
        "Interrupted and run again, openwebtext, fineweb_edu and text go on where they were.",
    ]
)

# the sets that a preset is made for; another gets the quickstart's model and a folder of its own
TRAINED_BY = {
    "pystdlib": "",
    "shakespeare_char": " train_shakespeare_char",
    "shakespeare": " finetune_shakespeare",
    "openwebtext": " train_gpt2",
    "fineweb_edu": " train_gpt2 --dataset=fineweb_edu",
}


def _near(word: str, known: dict[str, str], prefix: str = "") -> str:
    near = difflib.get_close_matches(word, known, 1)
    if near:
        return f"did you mean {prefix + near[0]!r}?"
    return f"there are {', '.join(prefix + name for name in known)}"


def _number(flag: str, value: str, kind: type[int] | type[float]) -> int | float:
    try:
        return kind(value)
    except ValueError:
        example = "4" if kind is int else "0.01"
        raise UserError(f"--{flag}={value} is no number: write --{flag}={example}") from None


def main(argv: list[str]) -> None:
    """Parse argv strictly and prepare one data set."""
    names, values, inputs = [], {}, []
    for argument in argv:
        flag, equals, value = argument.removeprefix("--").partition("=")
        if argument in ("--help", "-h"):
            print(HELP)
            return
        if not argument.startswith("-"):
            names.append(argument)
        elif not argument.startswith("--") or flag not in FLAGS:
            raise UserError(
                f"unknown flag {argument.partition('=')[0]!r}, {_near(flag, FLAGS, '--')}"
            )
        elif not equals or not value:
            raise UserError(f"{argument!r} has no value: write --{flag}=VALUE")
        elif flag == "input":
            inputs.append(value)
        else:
            values[flag] = value
    if names[:1] == ["text"]:  # as a shell expands a pattern
        names, inputs = ["text"], [*inputs, *names[1:]]
    name = names[0] if names else ""
    if name and name not in SETS:
        raise UserError(f"unknown data set {name!r}, {_near(name, SETS)}")
    if len(names) != 1:
        files = "; files go to text, or behind --input=" * bool(name)
        known = ", ".join(SETS)
        raise UserError(f"name one data set, not {len(names)}: {known}{files} (see --help)")
    data_dir, dataset = values.pop("data_dir", "data"), values.pop("name", name)
    if Path(dataset).name != dataset or dataset == ".." or set(dataset) & set(":,"):
        raise UserError(
            f"--name={dataset!r} is not a plain folder name: use --data_dir= for a path, and no "
            "':' or ',', which --dataset= mixes data sets by"
        )
    for flag, kind in (("val_share", float), ("workers", int)):
        if flag in values:
            values[flag] = _number(flag, values[flag], kind)
    prepare(name, Path(data_dir, dataset), input=inputs, live=sys.stdout.isatty(), **values)
    where = "" if data_dir == "data" else f" --data_dir={shlex.quote(data_dir)}"
    quoted = shlex.quote(dataset)
    what = TRAINED_BY.get(dataset, f" --dataset={quoted} --out_dir=out-{quoted}")
    print(as_typed(f"next: python train.py{what}{where}"))


if __name__ == "__main__":
    sys.exit(exit_code(main)())
