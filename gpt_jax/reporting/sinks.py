"""Where a run's numbers go: metrics.jsonl always, TensorBoard and Weights & Biases on request.

All take the same entries, names to numbers: of an update that is logged (it has "loss") or of an
evaluation (it has "train_loss" and "val_loss"). docs/metrics.md says what each name means.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gpt_jax.config import TrainConfig
from gpt_jax.errors import UserError
from gpt_jax.integrity import in_a_line, written
from gpt_jax.runtime import is_first

NANOGPTS = {"train_loss": "train/loss", "val_loss": "val/loss"}  # its names of them


class Jsonl:
    """A file of one JSON object a line, each there to be read at once.

    The first line of a run that goes on from ``iteration`` has it under "resumed", for a picture.
    """

    def __init__(self, path: Path, iteration: int):
        self.path, self.mark = path, {"resumed": iteration} if iteration else {}
        with written(path):
            self.file = path.open("a", encoding="utf-8")

    def write(self, entry: dict[str, Any]) -> None:
        """Add an entry; RunError where the disk takes no more."""
        with written(self.path):
            if not self.path.exists():  # removed under the run
                self.close()
                self.file = self.path.open("a", encoding="utf-8")
            self.file.write(json.dumps(entry | self.mark) + "\n")
            self.file.flush()
        self.mark = {}

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # of a line that could not be written, and has been told of
            self.file.close()


class TensorBoard:
    """Event files in a folder, of a run that goes on from ``iteration``."""

    def __init__(self, folder: Path, iteration: int):
        # tensorboardX, not the tensorboard package: that imports TensorFlow where it is installed,
        # which on a TPU takes the chips from JAX. Its plain writer, not its SummaryWriter: a
        # thread's buffer is lost with a killed process, and that a disk is full is lost in a thread
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        pb: Any = event_pb2  # made at run time, without types
        self.path, self.event = folder, pb.Event
        with written(folder):
            folder.mkdir(exist_ok=True)
            # readers take the files by name, which holds seconds: a restart may be as fast
            self.writer = EventsWriter(str(folder / "events"), f".{iteration:09}")
            # a reader then drops what was told of iterations from here on
            restart = pb.SessionLog(status=pb.SessionLog.START)
            self.writer.write_event(self.event(step=iteration, session_log=restart))
            self.writer.flush()

    def write(self, entry: dict[str, Any]) -> None:
        """Add an entry's numbers; of an evaluation the losses: the rest are its iteration's."""
        numbers = renamed(entry)
        if "val_loss" in entry:
            numbers = {name: numbers[name] for name in NANOGPTS.values()}
        event = self.event(step=entry["iter"], wall_time=time.time())
        for name, number in numbers.items():
            if name != "iter":
                event.summary.value.add(tag=name, simple_value=number)
        with written(self.path):
            self.writer.write_event(event)
            self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):
            self.writer.close()


class Wandb:
    """A Weights & Biases run that is under way; where it fails, training goes on without it."""

    def __init__(self, run: Any):
        self.run, self.id, self.mfu = run, run.id, 0.0
        run.define_metric("iter")
        run.define_metric("*", step_metric="iter")  # the x axis of every chart

    def write(self, entry: dict[str, Any]) -> None:
        """Add an entry as a row; an evaluation's has nanoGPT's keys, mfu 0 where not known."""
        row = renamed(entry)
        self.mfu = row.get("mfu", self.mfu)
        if "val_loss" in entry:
            row["mfu"] = self.mfu
        # its own count of rows has an evaluation before the update of that iteration, and is the
        # same in a resumed run: what was told already is told once
        step = 2 * entry["iter"] + ("val_loss" not in entry)
        self.attempt(lambda run: run.log(row, step=step, commit=True) if step >= run.step else None)

    def close(self) -> None:
        """End the run, as failed where an exception ends it, once all is sent."""
        self.attempt(lambda run: run.finish(exit_code=int(sys.exc_info()[0] is not None)))

    def attempt(self, act: Callable[[Any], None]) -> None:
        """Do something with the run; if that fails say so, and leave the run alone from then on."""
        try:
            if self.run:
                act(self.run)
        except Exception as error:  # whatever its service, its files or the network meet with
            self.run = None
            problem = in_a_line(error).rstrip(": ")
            print(f"Weights & Biases takes no more ({problem}): going on without", file=sys.stderr)


def renamed(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry with the losses under nanoGPT's names, and mfu in percent as nanoGPT's."""
    numbers = {NANOGPTS.get(name, name): number for name, number in entry.items()}
    return numbers | ({"mfu": 100 * numbers["mfu"]} if "mfu" in numbers else {})


@contextmanager
def needed(key: str, name: str) -> Iterator[None]:
    """Turn an import that fails into a UserError that names the extra: a context."""
    try:
        yield
    except ImportError:
        extra = key.removesuffix("_log")
        remedy = f"pip install 'gpt_jax[{extra}]', or --{key}=False"
        raise UserError(f"{key}=True needs {name}: {remedy}") from None


def check_installed(config: TrainConfig) -> None:
    """Raise UserError where a package is not installed that the run will report to."""
    if not is_first() or config.eval_only:
        return
    if config.wandb_log:
        with needed("wandb_log", "Weights & Biases"):  # its folder of runs alone has no init
            from wandb import init  # noqa: F401  # pyright: ignore[reportMissingImports]
    if config.tensorboard:
        with needed("tensorboard", "TensorBoard"):
            import tensorboardX  # noqa: F401


def start_wandb(config: TrainConfig, run_id: str | None) -> Wandb | None:
    """Start a Weights & Biases run, or go on with the one of ``run_id``; None if not asked for.

    Raises UserError where it cannot be started.
    """
    if not (config.wandb_log and is_first()):
        return None
    import wandb  # pyright: ignore[reportMissingImports]

    try:
        return Wandb(wandb.init(
            project=config.wandb_project, name=config.wandb_run_name, config=vars(config),
            id=run_id, resume="allow" if run_id else None,
        ))  # fmt: skip
    except Exception as error:
        raise UserError(
            f"Weights & Biases cannot be started: {in_a_line(error)}: run `wandb login`, set "
            "WANDB_MODE=offline to send it later, or give --wandb_log=False"
        ) from None
