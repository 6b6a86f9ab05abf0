"""What a run tells of itself: log lines, a terminal's foot, the numbers that sinks.py keeps."""

import functools
import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gpt_jax.checkpoint import Checkpoints
from gpt_jax.commandline import save_config
from gpt_jax.config import TrainConfig
from gpt_jax.integrity import replace_file, written
from gpt_jax.kernels import why_not
from gpt_jax.metrics import flops_per_token
from gpt_jax.model import GPT, count_params
from gpt_jax.optimizer import decayed
from gpt_jax.reporting.memory import memory
from gpt_jax.reporting.norms import as_floats, parameter_norms
from gpt_jax.reporting.peak import peak_flops
from gpt_jax.reporting.progress import Progress
from gpt_jax.reporting.sinks import Jsonl, TensorBoard, Wandb
from gpt_jax.reporting.terminal import Foot, compiling, evaluating, is_live, waiting
from gpt_jax.runtime import is_first

__all__ = ["Report", "evaluating"]

# what makes the tokens of an iteration
BATCH = ("gradient_accumulation_steps", "batch_size", "block_size")


class Report:
    """Tells of a run that goes on from ``meta``: of its losses, its speed, and mfu."""

    def __init__(
        self, config: TrainConfig, mesh: Mesh, model: GPT, params: Any, tokens_per_iter: int,
        meta: dict[str, Any], wandb: Wandb | None = None,
    ):  # fmt: skip
        self.config, self.mesh, self.tokens_per_iter = config, mesh, tokens_per_iter
        self.flops = flops_per_token(model.config, count_params(params)) * tokens_per_iter
        peak = config.peak_flops or peak_flops(mesh.devices.flat[0])
        self.peak = peak * mesh.size if peak else None
        self.sinks: list[Any] = []  # of process 0 alone
        self.picture = None  # of process 0 too
        self.first, self.tokens, self.seconds = meta["iter"], 0, 0.0  # before the first iteration
        self.skipped = None  # updates left out in all, as last heard
        self.wandb_id = wandb.id if wandb else None
        if is_first():
            from gpt_jax.plot.background import LossPicture  # above: it knows is_entry

            self.picture = LossPicture(config.out_dir)
            path = Path(config.out_dir) / "metrics.jsonl"
            self.saved = path.with_name("config.json")
            self.kept = self.saved.exists()  # not where a run only evaluates
            with written(path):
                self.tokens, self.seconds = so_far(path, meta, tokens_per_iter)
                keep_before(path, self.first)
            self.sinks = [Jsonl(path, self.first), *([wandb] if wandb else [])]
            if config.tensorboard:
                self.sinks.append(TensorBoard(path.with_name("tensorboard"), self.first))
        self.progress = Progress(
            config, meta, tokens_per_iter, self.flops, self.peak, functools.partial(memory, mesh)
        )
        self.first_step = ExitStack()  # what is said until it is done
        self.steps = self.heard = 0  # updates since the last line, and of this process
        self.norms_of = parameter_norms(config, mesh)
        self.since = self.counted = time.perf_counter()

    def norms(self, iteration: int, params: Any) -> dict[str, Any]:
        """Return norms of the parameters that an iteration has made, if it is to be logged.

        They are scalars on the device, still to be computed. Every process must ask for them.
        """
        return {} if iteration % self.config.log_interval else self.norms_of(params)

    def step(self, iteration: int, metrics: dict[str, Any], lr: float) -> int:
        """Tell of an update, once its metrics, scalars on the device, have been computed.

        Returns how many updates of this process were left out in a row, this one included.
        """
        values = jax.device_get(metrics)  # waits for the device
        metrics = as_floats(values)
        now = time.perf_counter()
        self.seconds, self.counted = self.seconds + now - self.counted, now
        skipped, in_a_row = int(values["skipped"]), int(values["skipped_in_a_row"])
        self.steps, self.heard = self.steps + 1, self.heard + 1
        # with float16 an update left out need not count as one in a row
        if in_a_row or (self.skipped is not None and skipped > self.skipped):
            numbers = f"loss {metrics['loss']:.4f}, gradient norm {metrics['grad_norm']:.4f}"
            self.say(f"iter {iteration}: update left out: {numbers} ({skipped} so far)")
        self.skipped = skipped
        self.first_step.close()
        self.progress.stepped(iteration, metrics["loss"])
        if iteration % self.config.log_interval == 0:
            self.speak(iteration, metrics, lr)
        return min(in_a_row, self.heard)  # a run that goes on from among them has as many tries

    def speak(self, iteration: int, metrics: dict[str, float], lr: float) -> None:
        """Give the log line of an iteration, and its line in metrics.jsonl."""
        now = time.perf_counter()
        seconds = (now - self.since) / self.steps
        rate = self.tokens_per_iter / seconds
        mfu = self.flops / seconds / self.peak if self.peak else None
        share = "n/a" if mfu is None else f"{100 * mfu:.2f}%"
        line = f"loss {metrics['loss']:.4f}, time {1000 * seconds:.2f}ms, mfu {share}"
        self.say(f"iter {iteration}: {line}")
        self.write({
            "iter": iteration, "loss": metrics["loss"], "lr": lr,
            **{name: x for name, x in metrics.items() if "_norm" in name},
            "skipped": self.skipped, **self.place(iteration + 1),
            "tokens_per_second": round(rate, 1),
            **({} if mfu is None else {"mfu": round(mfu, 5)}), **memory(self.mesh),
        })  # fmt: skip
        self.steps, self.since = 0, now

    def evaluation(self, iteration: int, train_loss: float, val_loss: float, lr: float) -> None:
        """Tell of an evaluation, losses in nats/token."""
        self.say(f"step {iteration}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
        self.progress.evaluated(iteration, val_loss)
        self.write({"iter": iteration, "train_loss": train_loss, "val_loss": val_loss, "lr": lr,
                    **self.place(iteration)})  # fmt: skip
        if self.picture:
            self.picture.draw()
            self.complain()

    def place(self, iteration: int) -> dict[str, Any]:
        """Return how far training has come before an iteration: in tokens, and in seconds."""
        tokens = self.tokens + (iteration - self.first) * self.tokens_per_iter
        return {"tokens": tokens, "time": round(self.seconds, 3)}

    def saving(self, iteration: int) -> None:
        """Tell of a checkpoint that is about to be saved."""
        self.say(f"saving checkpoint to {self.config.out_dir}")
        self.progress.saving(iteration)

    @contextmanager
    def watching(self, checkpoints: Checkpoints) -> Iterator[None]:
        """Show at the foot of a terminal how far a run is, until its checkpoints are whole."""
        self.progress.checkpoints = checkpoints
        with ExitStack() as shown:
            if is_live():
                shown.enter_context(Foot(self.progress.lines))
            shown.callback(self.first_step.close)
            if self.progress.done % self.config.eval_interval:
                self.await_first_step()
            try:
                yield
            finally:
                self.first_step.close()
                if checkpoints.saving:
                    shown.enter_context(waiting("writing the checkpoint"))
                checkpoints.close()

    def await_first_step(self) -> None:
        """Say what is waited for until the first step is told of, if there will be one."""
        if self.progress.done < self.config.max_iters:
            self.first_step.enter_context(compiling("training"))

    def say(self, line: str) -> None:
        """Print a line at once."""
        print(line, flush=True)

    def complain(self) -> None:
        """Say why there is no picture, if there is none and it has not been said."""
        if self.picture and (line := self.picture.complaint()):
            self.say(line)

    def write(self, entry: dict[str, Any]) -> None:
        """Give an entry, names to numbers, to every sink."""
        if self.sinks and self.kept and not self.saved.exists():
            self.put_back()
        for sink in self.sinks:
            sink.write(entry)

    def put_back(self) -> None:
        """Write the config again, which was removed under the run: a resume reads it."""
        with written(self.saved):
            self.saved.parent.mkdir(parents=True, exist_ok=True)
            save_config(self.config)
        self.say(f"{self.saved} was removed under this run: it is written again")

    def resume_clock(self) -> None:
        """Leave what has passed since the last step, an evaluation and a save, out of the speed."""
        now = time.perf_counter()
        self.since, self.counted = self.since + now - self.counted, now
        self.progress.resumed()
        self.await_first_step()

    def close(self) -> None:
        """End the picture and the files."""
        if self.picture:
            self.picture.close()
            self.complain()
        for sink in self.sinks:
            sink.close()


def decay_groups(params: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (tensors, parameters) with weight decay, and without, counted a layer at a time."""
    groups = {True: [0, 0], False: [0, 0]}
    layers = params["h"]["ln_1"]["weight"].shape[0]

    def count(path, leaf, decays):
        groups[decays][0] += layers if path[0].key == "h" else 1
        groups[decays][1] += leaf.size

    jax.tree_util.tree_map_with_path(count, params, decayed(params))
    return (groups[True][0], groups[True][1]), (groups[False][0], groups[False][1])


def describe_params(params: Any) -> str:
    """Return nanoGPT's three lines on a model's size and on what weight decay pulls at."""
    (pulled, n_pulled), (others, n_others) = decay_groups(params)
    return (
        f"number of parameters: {count_params(params) / 1e6:.2f}M\n"
        f"num decayed parameter tensors: {pulled}, with {n_pulled:,} parameters\n"
        f"num non-decayed parameter tensors: {others}, with {n_others:,} parameters"
    )


def describe(mesh: Mesh) -> str:
    """Return what a mesh is made of: "8 x TPU v5 lite (data 4, fsdp 2)"."""
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    return f"{devices} ({sizes})" if sizes else devices


def kernels(config: TrainConfig, mesh: Mesh, dtype: str) -> str:
    """Return a line on why a GPU goes without the kernels that it was left to choose, or ""."""
    reason = why_not(dtype)
    if mesh.size > mesh.shape["data"]:
        reason = "XLA cannot cut them along fsdp and tensor"
    chosen = config.kernels == "auto" and mesh.devices.flat[0].platform == "gpu"
    return (
        f"\nwithout the kernels for LayerNorm and the loss: {reason}" if chosen and reason else ""
    )


def so_far(path: Path, meta: dict[str, Any], tokens_per_iter: int) -> tuple[int, float]:
    """Return the tokens and the seconds of training before a run goes on from ``meta``.

    What metrics.jsonl last says of them, and of the iterations after that the tokens that the saved
    config gives each (``tokens_per_iter`` if there is none) at the speed last logged.
    """
    sizes = [meta.get("config", {}).get(name) for name in BATCH]
    if all(type(size) is int and 0 < size < 2**31 for size in sizes):
        tokens_per_iter = math.prod(sizes)
    tokens, seconds, done, speed = 0, 0.0, 0, math.inf
    for _, entry in entries(path):
        told = entry["iter"] + ("loss" in entry)  # iterations that it counts
        values = [entry.get(name, -1) for name in ("tokens", "time", "tokens_per_second")]
        if done <= told <= meta["iter"] and usable(values[0], int) and usable(values[1], float):
            tokens, seconds, done = values[0], values[1], told
            speed = values[2] if usable(values[2], float) else speed
    missing = (meta["iter"] - done) * tokens_per_iter
    return tokens + missing, seconds + missing / max(speed, 1e-3)


def usable(number: Any, kind: type) -> bool:
    """Return whether a number of a file is one to reckon with."""
    return type(number) is kind and 0 <= number < 2**63


def keep_before(path: Path, iteration: int) -> None:
    """Drop from metrics.jsonl what a resumed run will say again, and a line cut off by a crash."""
    kept = [line for line, entry in entries(path) if entry["iter"] < iteration]
    if path.exists():
        replace_file(path, "".join(f"{line}\n" for line in kept))


def entries(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the lines of a metrics.jsonl that are whole, each with the object it holds."""
    result = []
    lines = path.read_text("utf-8", "replace").splitlines() if path.is_file() else []
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and is_entry(entry):
            result.append((line, entry))
    return result


def is_entry(entry: dict[str, Any]) -> bool:
    """Return whether an object is one that Report writes, of a step or of an evaluation."""
    names = [{"loss"}, {"train_loss", "val_loss"}]
    losses = next((entry.keys() & kind for kind in names if kind <= entry.keys()), set())
    numbers = all(isinstance(entry[name], float) for name in losses)
    iteration = entry.get("iter")
    return bool(losses) and numbers and type(iteration) is int and 0 <= iteration < 2**31
