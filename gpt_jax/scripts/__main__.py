"""The command ``gpt-jax``: one name for all there is."""

import runpy
import sys

from gpt_jax import __version__
from gpt_jax.commandline.files import suggest
from gpt_jax.errors import UserError, exit_code

COMMANDS = {
    "train": "train a GPT, finetune or go on with one",
    "sample": "write text with a trained GPT",
    "prepare": "make a data set: text -> token files",
    "evaluate": "measure the loss of whole splits",
    "plot": "draw the losses of runs",
    "export": "write a GPT for transformers, safetensors or nanoGPT",
    "plan": "say what a run needs on devices that are not here",
    "bench": "measure speed and memory on those that are",
}
HELP = "\n".join(
    [
        "usage: gpt-jax COMMAND [...]",
        "",
        *(f"  {name:9} {what}" for name, what in COMMANDS.items()),
        "",
        "gpt-jax train: the quickstart. gpt-jax COMMAND --help: all its keys.",
        "gpt-jax --version: the version. python -m gpt_jax.COMMAND: the same command.",
    ]
)


@exit_code
def main(argv: list[str]) -> None:
    """Run the command that the first word names, with the rest as its command line."""
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print(HELP)
    elif name in ("-V", "--version"):
        print(f"gpt_jax {__version__}")
    elif name not in COMMANDS:
        listed = ", ".join(COMMANDS)
        raise UserError(f"unknown command {suggest(name, COMMANDS)} (the commands are {listed})")
    else:
        sys.argv = [f"gpt-jax {name}", *rest]
        runpy.run_module(f"gpt_jax.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.exit(main())
