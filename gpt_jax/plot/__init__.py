"""The command ``python -m gpt_jax.plot``: the losses of a run as a picture, or of several."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path

from gpt_jax.commandline import keys
from gpt_jax.config import Checked, key, parse
from gpt_jax.errors import UserError, exit_code
from gpt_jax.plot.figure import SUFFIXES, save
from gpt_jax.plot.log import Log
from gpt_jax.plot.losses import comparison_picture, differing, run_picture

USAGE = "usage: python -m gpt_jax.plot RUN [RUN ...] [PICTURE] [--x=step|tokens|time]"


@dataclass(frozen=True)
class PlotConfig(Checked):
    """Draw the losses of a run, or compare those of several.

    RUN is the out_dir of a run or its metrics.jsonl. PICTURE, or --out, ends in
    .png, .svg or .pdf; without one it is RUN/loss.png, or comparison.png of
    several.
    """

    command = "python -m gpt_jax.plot"
    x: str = key("step", "what to draw the losses over", "Picture", choices="step|tokens|time")
    out: str = key("", "the picture's file; '': RUN/loss.png or comparison.png")


@exit_code
def main(argv: list[str]) -> None:
    """Draw the picture and say where it is."""
    if {"-h", "--help"} & set(argv):
        print("\n".join([USAGE, "", cleandoc(PlotConfig.__doc__ or ""), *keys(PlotConfig)]))
        return
    flags = [item for item in argv if item.startswith("--")]
    config = parse(flags, PlotConfig)
    runs = [item for item in argv if item not in flags]
    if len(runs) > 1 and Path(runs[-1]).suffix.lower() in SUFFIXES and not config.out:
        *runs, out = runs
    else:
        out = config.out
    if not runs:
        raise UserError(f"no run is named; {USAGE}")
    logs = read([Path(run) for run in runs])
    print(plot(logs, Path(out) if out else None, config.x))
    if len(logs) < len(runs):
        print("note: a run that is named twice is drawn once", file=sys.stderr)
    if differ := [f"{what} differ ({', '.join(its)})" for what, its in differing(logs).items()]:
        print(f"note: {', '.join(differ)}: their losses cannot be compared", file=sys.stderr)


def read(runs: Sequence[Path]) -> list[Log]:
    """Return the metrics of these runs, out_dirs or metrics.jsonl, each once.

    Raises UserError where there is no run, and where it cannot be read.
    """
    paths = [run if run.is_file() else run / "metrics.jsonl" for run in runs]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is not there: name the out_dir of a run, or its metrics.jsonl")
    try:
        return [Log(path).read() for path in {path.resolve(): path for path in paths}.values()]
    except OSError as error:
        raise UserError(f"the metrics cannot be read: {error}") from None


def plot(logs: Sequence[Log], destination: Path | None = None, x: str = "step") -> Path:
    """Write the picture of these runs, and return its path: ``destination`` or the usual one.

    ``x`` is "step", "tokens" or "time". Raises UserError where a run does not know it, and where
    nothing can be written.
    """
    if len(logs) > 1:
        return save(comparison_picture(logs, x), destination or Path("comparison.png"))
    return save(run_picture(logs[0], x), destination or logs[0].path.parent / "loss.png")
