"""The last lines of a run."""

import math
import shlex
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpt_jax.config import TrainConfig
from gpt_jax.evaluation import Evaluation
from gpt_jax.model import GPT
from gpt_jax.reporting import Report, entries
from gpt_jax.reporting.progress import duration
from gpt_jax.reporting.terminal import is_live, waiting
from gpt_jax.runtime import is_first
from gpt_jax.sampling import generate
from gpt_jax.scripts import as_typed
from gpt_jax.tokenizer import Tokenizer


def summary(report: Report, val: Evaluation, model: GPT, params: Any, tokenizer: Tokenizer) -> None:
    """Say how a run ended: its losses and its cost, a sample if one is asked for, and what next."""
    config = report.config
    bits = "" if val.bits_per_byte is None else f", {val.bits_per_byte:.4f} bits/byte"
    loss = f"{val.loss:.4f} nats/token{bits}"
    if not is_live():
        print(f"\nval loss {loss}")
    if is_first():
        show(facts(report), loss)
    start = "def " if config.dataset == "pystdlib" else "\n"
    if config.sample_tokens:
        with waiting(f"drawing a sample of {config.sample_tokens} tokens"):
            ids = generate(
                GPT(replace(model.config, matmul_dtype="auto")),  # float8 is for training
                params,
                tokenizer.encode(start),
                key=jax.random.key(config.seed),
                max_new_tokens=config.sample_tokens,
                temperature=0.8,
            )
        print(f"a sample:\n---------------\n{tokenizer.decode(ids).strip()}\n---------------")
    if not is_first():
        return
    print("next:")
    prompt = f' --start="{start}"' if start.strip() else ""
    print(as_typed(f"  python sample.py{out_dir_flag(config)}{prompt} --num_samples=3"))
    print(f"  {resuming(config)} --max_iters={2 * max(config.max_iters, report.progress.done)}")


def resuming(config: TrainConfig) -> str:
    """Return the command that goes on with a run."""
    return as_typed(f"python train.py --init_from=resume{out_dir_flag(config)}")


def out_dir_flag(config: TrainConfig) -> str:
    """Return the flag that names a run's folder to a shell, "" where it is the default."""
    return "" if config.out_dir == "out" else f" --out_dir={shlex.quote(config.out_dir)}"


def facts(report: Report) -> dict[str, str]:
    """Return what a run has come to, of all its starts and of this one, and where it lies."""
    out, progress = Path(report.config.out_dir), report.progress
    losses = {
        e["iter"]: e["val_loss"] for _, e in entries(out / "metrics.jsonl") if "val_loss" in e
    }
    best = min(losses, key=lambda n: (math.isnan(losses[n]), losses[n]), default=0)
    since = f" (since iteration {progress.first:,})" if progress.first else ""
    found = {
        "best val loss": f"{losses.get(best, math.nan):.4f} at iteration {best:,}",
        "tokens seen": f"{report.place(progress.done)['tokens']:,}",
        "wall time": f"{duration(progress.lasted())}{since}",
    }
    if progress.seconds:
        speed = report.tokens_per_iter / statistics.median(progress.seconds)
        found["speed"] = f"{speed:,.0f} tokens/s (median)"
    for which, size in progress.peak_memory():
        found["peak memory"] = f"{size} ({which})"
    files = {"checkpoints": "checkpoints", "metrics": "metrics.jsonl", "picture": "loss.png"}
    return found | {what: str(out / name) for what, name in files.items() if (out / name).exists()}


def show(facts: dict[str, str], loss: str) -> None:
    """Print facts, one a line; on a terminal as a table, with the last loss at its head."""
    if not is_live():
        width = max(map(len, facts)) + 1
        print(*(f"{f'{name}:':{width}} {fact}" for name, fact in facts.items()), sep="\n")
        return
    table = Table(box=box.HORIZONTALS, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, fact in {"val loss": loss, **facts}.items():
        table.add_row(name, Text(fact))
    Console(file=sys.stdout, highlight=False).print(table)
