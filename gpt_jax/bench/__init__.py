"""The command ``python -m gpt_jax.bench``: how fast it is here, and beside nanoGPT."""

from typing import Any

from gpt_jax.bench.compiling import start_up
from gpt_jax.bench.config import (
    MODELS,
    BesideBench,
    CompileBench,
    DecodeBench,
    LoaderBench,
    TrainBench,
    configured,
)
from gpt_jax.bench.decoding import decode
from gpt_jax.bench.loading import loader
from gpt_jax.bench.nanogpt import in_turns
from gpt_jax.bench.report import check_places, put_out
from gpt_jax.bench.training import train
from gpt_jax.commandline.files import suggest
from gpt_jax.errors import UserError, exit_code
from gpt_jax.runtime import use_platform

VERBS = {"train": TrainBench, "decode": DecodeBench, "loader": LoaderBench, "compile": CompileBench}
HELP = "\n".join(
    [
        "usage: python -m gpt_jax.bench VERB [CONFIG ...] [--key=value ...]",
        "",
        *(f"  {verb:9}{kind.__doc__}" for verb, kind in VERBS.items()),
        "",
        f"--model=NAME is one of {', '.join(MODELS)}; a CONFIG's network is measured too.",
        "Each prints a table and a JSON line a result; python -m gpt_jax.bench VERB --help lists",
        "its keys.",
    ]
)


@exit_code
def main(argv: list[str]) -> None:
    """Measure what the first word says."""
    verb, *rest = argv or ["--help"]
    if verb in ("-h", "--help"):
        print(HELP)
        return
    if verb not in VERBS:
        raise UserError(f"unknown bench {suggest(verb, VERBS)} (there are {', '.join(VERBS)})")
    config = configured(rest, VERBS[verb])
    check_places(config.json, getattr(config, "profile", ""))
    put_out(measured(verb, config, rest), config.json)


def measured(verb: str, config: Any, argv: list[str]) -> list[dict[str, Any]]:
    """Return the records of a bench.

    Where other processes do the measuring, this one leaves the device, and its memory, to them.
    """
    if isinstance(config, CompileBench):
        return start_up(config, argv)
    if isinstance(config, BesideBench) and config.nanogpt:
        return in_turns(verb, config, argv)
    use_platform(config.device, config.deterministic)
    return {"train": train, "decode": decode, "loader": loader}[verb](config)
