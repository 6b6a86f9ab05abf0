"""``bench loader``: what the real data loader costs a training step."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from gpt_jax.bench.config import LoaderBench
from gpt_jax.bench.measure import (
    WARMUP,
    about,
    memory_told,
    peak_memory,
    queued,
    random_split,
    rate,
    spread,
    training,
)
from gpt_jax.data import Split, batches
from gpt_jax.integrity.token_file import open_file
from gpt_jax.sharding import batch_sharding

N_TOKENS = 2**26  # of the made-up file: 128 MiB, and never the same window twice in a bench


def loader(config: LoaderBench) -> list[dict[str, Any]]:
    """Return a record of the step on a resident batch, and one of it behind the loader."""
    t = training(config)
    state = t.state
    dtype = "uint16" if config.vocab_size <= 2**16 else "uint32"
    with tempfile.TemporaryDirectory() as folder, memory_told(config):
        path = Path(folder) / "train.bin"
        random_split(config, max(N_TOKENS, 2 * config.block_size)).files[0].tokens.astype(
            dtype
        ).tofile(path)
        split = Split((open_file(path, dtype),), config.vocab_size, config.block_size)
        loaded: Any = batches(split, t.shape, config.seed, 0, batch_sharding(t.mesh, 3))
        sources = {"resident": itertools.repeat(t.batch), "loader": loaded}
        seconds: dict[str, list[float]] = {name: [] for name in sources}
        for source in sources.values():
            _, state, _ = queued(t.step, state, source, WARMUP)
        for _ in range(config.repeats):  # in turns: a clock that sinks slows both
            for name, source in sources.items():
                second, state = told(t.step, state, source, config.steps)
                seconds[name].append(second)
        loaded.close()
    t = t._replace(state=state)
    shared = about("loader", config, t.model, t.mesh) | peak_memory(t.mesh, t.compiled)
    shared |= {"steps": config.steps, "repeats": config.repeats}
    resident, real = (statistics.median(seconds[name]) for name in sources)
    return [
        shared
        | {"batches": name, **spread(seconds[name]), **rate(config, t, median)}
        | {"slower_percent": 100 * (median / resident - 1)}
        | {"compile_seconds": t.compile_seconds, "compile_cached": t.cached}
        for name, median in (("resident", resident), ("loader", real))
    ]


def told(step: Any, state: Any, source: Iterator, steps: int) -> tuple[float, Any]:
    """Return seconds a step and the state after the loop of train.py: metrics are read, late."""
    pending = None
    began = time.perf_counter()
    for _ in range(steps):
        state, metrics = step(state, *next(source))
        if pending is not None:
            jax.device_get(pending)
        pending = metrics
    jax.block_until_ready((state, pending))
    return (time.perf_counter() - began) / steps, state
