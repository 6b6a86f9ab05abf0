"""What a run tells of itself: log lines, metrics.jsonl, Weights & Biases, a terminal's foot."""

import functools
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gpt_jax.checkpoint import Checkpoints
from gpt_jax.config import TrainConfig
from gpt_jax.errors import UserError
from gpt_jax.integrity import replace_file, written
from gpt_jax.kernels import why_not
from gpt_jax.metrics import flops_per_token
from gpt_jax.model import GPT, count_params
from gpt_jax.optimizer import decayed
from gpt_jax.reporting.memory import memory
from gpt_jax.reporting.peak import peak_flops
from gpt_jax.reporting.progress import Progress
from gpt_jax.reporting.terminal import Foot, compiling, evaluating, is_live, waiting
from gpt_jax.runtime import is_first

__all__ = ["Report", "evaluating"]


class Report:
    """Tells of a run that goes on from ``meta``: of its losses, its speed, and mfu."""

    def __init__(
        self, config: TrainConfig, mesh: Mesh, model: GPT, params: Any, tokens_per_iter: int,
        meta: dict[str, Any],
    ):  # fmt: skip
        self.config, self.tokens_per_iter = config, tokens_per_iter
        self.flops = flops_per_token(model.config, count_params(params)) * tokens_per_iter
        peak = config.peak_flops or peak_flops(mesh.devices.flat[0])
        self.peak = peak * mesh.size if peak else None
        self.path = Path(config.out_dir) / "metrics.jsonl"
        self.file = None  # of process 0 alone
        self.skipped = None  # updates left out in all, as last heard
        if is_first():
            with written(self.path):
                keep_before(self.path, meta["iter"])
                self.file = self.path.open("a", encoding="utf-8")
        self.progress = Progress(
            config, meta, tokens_per_iter, self.flops, self.peak, functools.partial(memory, mesh)
        )
        self.first_step = ExitStack()  # what is said until it is done
        self.steps, self.speed = 0, 0.0
        logs = config.wandb_log and is_first()
        self.wandb = start_wandb(config, meta.get("wandb_id")) if logs else None
        self.wandb_id = self.wandb.id if self.wandb else None
        self.since = time.perf_counter()

    def step(self, iteration: int, metrics: dict[str, Any], lr: float) -> int:
        """Tell of an update, once its metrics, scalars on the device, have been computed.

        Returns how many updates were left out in a row, this one included.
        """
        values = jax.device_get(metrics)  # waits for the device
        metrics = {name: float(value) for name, value in values.items()}
        skipped, in_a_row = int(values["skipped"]), int(values["skipped_in_a_row"])
        self.steps += 1
        # with float16 an update left out need not count as one in a row
        if in_a_row or (self.skipped is not None and skipped > self.skipped):
            numbers = f"loss {metrics['loss']:.4f}, gradient norm {metrics['grad_norm']:.4f}"
            self.say(f"iter {iteration}: update left out: {numbers} ({skipped} so far)")
        self.skipped = skipped
        self.first_step.close()
        self.progress.stepped(iteration, metrics["loss"])
        if iteration % self.config.log_interval == 0:
            self.speak(iteration, metrics, lr)
        return in_a_row

    def speak(self, iteration: int, metrics: dict[str, float], lr: float) -> None:
        """Give the log line of an iteration, and its line in metrics.jsonl."""
        now = time.perf_counter()
        seconds = (now - self.since) / self.steps
        rate = self.tokens_per_iter / seconds
        mfu = self.flops / seconds / self.peak if self.peak else None
        share = "n/a" if mfu is None else f"{100 * mfu:.2f}%"
        line = f"loss {metrics['loss']:.4f}, time {1000 * seconds:.2f}ms, mfu {share}"
        self.say(f"iter {iteration}: {line}")
        self.write({"iter": iteration, "loss": metrics["loss"], "lr": lr,
                    "grad_norm": metrics["grad_norm"], "skipped": self.skipped,
                    "tokens_per_second": round(rate, 1),
                    **({} if mfu is None else {"mfu": round(mfu, 5)})})  # fmt: skip
        self.steps, self.since = 0, now
        self.speed = rate

    def evaluation(self, iteration: int, train_loss: float, val_loss: float, lr: float) -> None:
        """Tell of an evaluation, losses in nats/token."""
        self.say(f"step {iteration}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
        self.progress.evaluated(iteration, val_loss)
        self.write({"iter": iteration, "train_loss": train_loss, "val_loss": val_loss})
        if self.wandb:
            mfu = self.flops / self.tokens_per_iter * self.speed / self.peak if self.peak else 0
            self.wandb.log({"iter": iteration, "train/loss": train_loss, "val/loss": val_loss,
                            "lr": lr, "mfu": 100 * mfu})  # fmt: skip

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

    def write(self, entry: dict[str, Any]) -> None:
        """Add an object to metrics.jsonl, there to be read at once."""
        if self.file:
            with written(self.path):
                self.file.write(json.dumps(entry) + "\n")
                self.file.flush()

    def resume_clock(self) -> None:
        """Leave what has passed since the last step, an evaluation or a save, out of the speed."""
        self.since, self.steps = time.perf_counter(), 0
        self.progress.resumed()
        self.await_first_step()

    def close(self) -> None:
        """End the files."""
        if self.file:
            with suppress(OSError):  # of a line that could not be written, and has been told of
                self.file.close()
        if self.wandb:
            self.wandb.finish()


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


def start_wandb(config: TrainConfig, run_id: str | None) -> Any:
    """Return a Weights & Biases run, the one of ``run_id`` if it is given."""
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "wandb_log=True needs Weights & Biases: pip install 'gpt_jax[wandb]', "
            "or --wandb_log=False"
        ) from None
    return wandb.init(
        project=config.wandb_project, name=config.wandb_run_name, config=vars(config),
        id=run_id, resume="allow" if run_id else None,
    )  # fmt: skip
