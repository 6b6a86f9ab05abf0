"""``bench train``: the training step on one batch of random tokens."""

import itertools
from typing import Any

from gpt_jax.bench.config import TrainBench
from gpt_jax.bench.measure import (
    WARMUP,
    about,
    memory_told,
    peak_memory,
    queued,
    rate,
    spread,
    training,
)
from gpt_jax.bench.profiling import profiled

TRACED = 3  # steps of a profile


def train(config: TrainBench) -> list[dict[str, Any]]:
    """Return the record of the training step, and that of its profile if it is asked for."""
    t = training(config)
    batches = itertools.repeat(t.batch)
    state, seconds = t.state, []
    with memory_told(config):
        _, state, first = queued(t.step, state, batches, WARMUP)
        for _ in range(config.repeats):
            second, state, metrics = queued(t.step, state, batches, config.steps)
            seconds.append(second)
    t = t._replace(state=state)
    record = about("train", config, t.model, t.mesh) | {
        "micro_batches": t.shape[0],
        "steps": config.steps,
        "repeats": config.repeats,
        **spread(seconds),
        **rate(config, t, spread(seconds)["ms"] / 1000),
        **peak_memory(t.mesh, t.compiled),
        "compile_seconds": t.compile_seconds,
        "compile_cached": t.cached,
        # a step that computes nonsense may be fast: random tokens start at ln(V), and are learned
        "loss_first": float(first["loss"]),
        "loss": float(metrics["loss"]),
        "skipped": int(metrics["skipped"]),
    }
    records = [record]
    if config.profile:

        def steps() -> None:
            nonlocal state
            _, state, _ = queued(t.step, state, batches, TRACED)

        records.append(profiled(config, steps, TRACED, "step", record))
    return records
