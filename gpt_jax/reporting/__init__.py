"""What a run tells of itself: log lines, metrics.jsonl, Weights & Biases, a progress line."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from gpt_jax.config import TrainConfig
from gpt_jax.errors import UserError
from gpt_jax.runtime import is_first


class Report:
    """Tells of a run whose steps take ``flops`` FLOPs, on hardware of ``peak`` FLOP/s or None."""

    def __init__(
        self, config: TrainConfig, first: int, tokens_per_iter: int, flops: float,
        peak: float | None, wandb_id: str | None = None,
    ):  # fmt: skip
        self.config, self.tokens_per_iter = config, tokens_per_iter
        self.flops, self.peak = flops, peak
        self.path = Path(config.out_dir) / "metrics.jsonl" if is_first() else Path(os.devnull)
        keep_before(self.path, first)
        self.file = self.path.open("a", encoding="utf-8")
        self.live = sys.stdout.isatty()
        self.steps, self.speed = 0, 0.0
        self.wandb = start_wandb(config, wandb_id) if config.wandb_log and is_first() else None
        self.wandb_id = self.wandb.id if self.wandb else None
        self.since = time.perf_counter()

    def step(self, iteration: int, metrics: dict[str, Any], lr: float) -> None:
        """Tell of an update, once its metrics, scalars on the device, have been computed."""
        metrics = {name: float(value) for name, value in metrics.items()}  # waits for the device
        self.steps += 1
        if iteration % self.config.log_interval and not self.live:
            return
        now = time.perf_counter()
        seconds = (now - self.since) / self.steps
        rate = self.tokens_per_iter / seconds
        mfu = self.flops / seconds / self.peak if self.peak else None
        if iteration % self.config.log_interval == 0:
            share = "n/a" if mfu is None else f"{100 * mfu:.2f}%"
            line = f"loss {metrics['loss']:.4f}, time {1000 * seconds:.2f}ms, mfu {share}"
            self.say(f"iter {iteration}: {line}")
            self.write({"iter": iteration, "loss": metrics["loss"], "lr": lr,
                        "grad_norm": metrics["grad_norm"], "tokens_per_second": round(rate, 1),
                        **({} if mfu is None else {"mfu": round(mfu, 5)})})  # fmt: skip
            self.steps, self.since = 0, now
            self.speed = rate
        if self.live and self.speed:
            left = (self.config.max_iters - iteration - 1) * self.tokens_per_iter / self.speed
            done = (iteration + 1) / self.config.max_iters
            text = f"{done:4.0%}  {self.speed:,.0f} tokens/s  {duration(left)} left"
            print(f"\r\033[K{text}\r", end="", flush=True)

    def evaluation(self, iteration: int, train_loss: float, val_loss: float, lr: float) -> None:
        """Tell of an evaluation, losses in nats/token."""
        self.say(f"step {iteration}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
        self.write({"iter": iteration, "train_loss": train_loss, "val_loss": val_loss})
        if self.wandb:
            mfu = self.flops / self.tokens_per_iter * self.speed / self.peak if self.peak else 0
            self.wandb.log({"iter": iteration, "train/loss": train_loss, "val/loss": val_loss,
                            "lr": lr, "mfu": 100 * mfu})  # fmt: skip

    def say(self, line: str) -> None:
        """Print a line, over the progress line if there is one."""
        print(f"\r\033[K{line}" if self.live else line, flush=True)

    def write(self, entry: dict[str, Any]) -> None:
        """Add an object to metrics.jsonl, there to be read at once."""
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()

    def resume_clock(self) -> None:
        """Leave what has passed since the last step, an evaluation or a save, out of the speed."""
        self.since, self.steps = time.perf_counter(), 0

    def close(self) -> None:
        """End the progress line and the files."""
        self.file.close()
        if self.live:
            print("\r\033[K", end="", flush=True)
        if self.wandb:
            self.wandb.finish()


def describe(mesh: Mesh) -> str:
    """Return what a mesh is made of: "8 x TPU v5 lite (data 4, fsdp 2)"."""
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    return f"{devices} ({sizes})" if sizes else devices


def duration(seconds: float) -> str:
    """Return seconds as people say them: 42s, 3m 20s, 5h 12m."""
    minutes, hours = int(seconds / 60), int(seconds / 3600)
    if hours:
        return f"{hours}h {minutes % 60:02}m"
    return f"{minutes}m {int(seconds % 60):02}s" if minutes else f"{seconds:.0f}s"


def keep_before(path: Path, iteration: int) -> None:
    """Drop from metrics.jsonl what a resumed run will say again, and a line cut off by a crash."""
    kept = [line for line, entry in entries(path) if entry["iter"] < iteration]
    if path.exists():
        path.write_text("".join(f"{line}\n" for line in kept), "utf-8")


def entries(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the lines of a metrics.jsonl that are whole, each with the object it holds."""
    result = []
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("iter"), int):
            result.append((line, entry))
    return result


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
