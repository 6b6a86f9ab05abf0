"""`python -m gpt_jax.prepare NAME`: make a data set."""

import difflib
import shlex
import sys
from pathlib import Path

from gpt_jax.errors import UserError, exit_code
from gpt_jax.prepare import SETS, prepare

FLAGS = {
    "input": "a text file (shakespeare, shakespeare_char, text) or a folder (text)",
    "data_dir": "where data sets live: data",
    "tokenizer": "for text: char, byte or gpt2 (the default)",
    "name": "the folder under data_dir: by default the set's name",
    "help": "this page",
}
HELP = "\n".join(
    [
        "usage: python -m gpt_jax.prepare NAME [--flag=value ...]",
        "",
        "Writes train.bin, val.bin and meta.json into data_dir/NAME. The sets:",
        *(f"  {name:17} {what}" for name, what in SETS.items()),
        "",
        "The flags:",
        *(f"  --{flag:15} {what}" for flag, what in FLAGS.items()),
    ]
)

# the sets that a preset is made for; another gets the quickstart's model and a folder of its own
TRAINED_BY = {
    "pystdlib": "",
    "shakespeare_char": " train_shakespeare_char",
    "shakespeare": " finetune_shakespeare",
    "openwebtext": " train_gpt2",
}


def _near(word: str, known: dict[str, str], prefix: str = "") -> str:
    near = difflib.get_close_matches(word, known, 1)
    if near:
        return f"did you mean {prefix + near[0]!r}?"
    return f"there are {', '.join(prefix + name for name in known)}"


def main(argv: list[str]) -> None:
    """Parse argv strictly and prepare one data set."""
    names, values = [], {}
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
        else:
            values[flag] = value
    if len(names) != 1:
        raise UserError(f"name one data set, not {len(names)}: {', '.join(SETS)} (see --help)")
    (name,) = names
    if name not in SETS:
        raise UserError(f"unknown data set {name!r}, {_near(name, SETS)}")
    data_dir, dataset = values.get("data_dir", "data"), values.get("name", name)
    if Path(dataset).name != dataset or dataset == ".." or set(dataset) & set(":,"):
        raise UserError(
            f"--name={dataset!r} is not a plain folder name: use --data_dir= for a path, and no "
            "':' or ',', which --dataset= mixes data sets by"
        )
    input = Path(values["input"]) if "input" in values else None
    prepare(name, Path(data_dir, dataset), input=input, tokenizer=values.get("tokenizer"))
    where = "" if data_dir == "data" else f" --data_dir={shlex.quote(data_dir)}"
    quoted = shlex.quote(dataset)
    what = TRAINED_BY.get(dataset, f" --dataset={quoted} --out_dir=out-{quoted}")
    print(f"next: python train.py{what}{where}")


if __name__ == "__main__":
    sys.exit(exit_code(main)())
