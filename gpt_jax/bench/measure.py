"""The measuring itself: the step as train.py builds it, what it is fed, and its figures."""

import datetime
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gpt_jax.bench.config import BenchConfig
from gpt_jax.config import TrainConfig
from gpt_jax.data import Split, place
from gpt_jax.errors import RunError
from gpt_jax.integrity.token_file import TokenFile
from gpt_jax.metrics import flops_per_token
from gpt_jax.model import GPT, count_params
from gpt_jax.optimizer import make_optimizer
from gpt_jax.plan.topology import GIB
from gpt_jax.pretrained import product_dtype
from gpt_jax.reporting.peak import peak_flops
from gpt_jax.sharding import batch_sharding, make_mesh, micro_batches, state_sharding
from gpt_jax.train_step import TrainState, init_state, make_train_step

WARMUP = 5  # steps before the first measurement: clocks rise, allocations settle
# what a record says of the network, and of the devices that share it
NETWORK = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias",
           "activation", "dtype", "matmul_dtype", "attention", "kernels", "remat",
           "scan_layers")  # fmt: skip
AXES = ("data", "fsdp", "tensor")


class Training(NamedTuple):
    """What a step needs, as train.py makes it, and the compiled program that it is."""

    mesh: Mesh
    model: GPT
    shape: tuple[int, int]  # (A, B)
    state: TrainState
    step: Callable
    batch: tuple[jax.Array, jax.Array]  # one that stays on the devices
    compiled: Any
    compile_seconds: float  # trace, lowering and compilation
    cached: bool  # whether the program came from JAX's persistent cache


def training(config: BenchConfig) -> Training:
    """Return the real first state and train step of a config, compiled, and a random batch."""
    mesh = make_mesh(config.device, config.data, config.fsdp, config.tensor)
    model = network(config)
    A, B = micro_batches(config, mesh)

    def first() -> TrainState:
        init_key, dropout_key = jax.random.split(jax.random.key(config.seed))
        params = model.init(init_key, jnp.zeros((1, 1), jnp.int32))["params"]
        return init_state(params, make_optimizer(config), dropout_key)

    with memory_told(config):
        state = jax.jit(first, out_shardings=state_sharding(mesh, jax.eval_shape(first)))()
        batch = random_batch(config, mesh, A, B)
        step: Any = make_train_step(model, make_optimizer(config), mesh, config.spike_zscore)
        jax.block_until_ready((state, batch))
        began = time.perf_counter()
        with cache_hits() as hits:  # step itself takes this program from now on
            compiled = step.lower(state, *batch).compile()
        seconds = time.perf_counter() - began
    return Training(mesh, model, (A, B), state, step, batch, compiled, seconds, bool(hits))


@contextmanager
def cache_hits() -> Iterator[list[str]]:
    """Count the programs that JAX takes from its persistent cache meanwhile."""
    hits: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)


def network(config: BenchConfig) -> GPT:
    """Return the network that train.py would train on the devices at hand."""
    # vocab_size is a key here, where train.py takes it from the data
    train = TrainConfig(**{f.name: getattr(config, f.name) for f in fields(TrainConfig)})
    return GPT(train.model_config(config.vocab_size, product_dtype(config.dtype)))


def random_split(config: BenchConfig, n: int) -> Split:
    """Return n random tokens, as data.py gives those of a file."""
    tokens = np.random.default_rng(config.seed).integers(config.vocab_size, size=n, dtype=np.uint32)
    file = TokenFile(Path("random tokens"), tokens)
    return Split((file,), config.vocab_size, config.block_size)


def random_batch(config: BenchConfig, mesh: Mesh, A: int, B: int) -> tuple[jax.Array, jax.Array]:
    """Return random tokens and targets, each int32 (A, B, block_size), no row like another."""
    T = config.block_size
    starts = (np.arange(A * B) * T).reshape(A, B)
    return place(random_split(config, A * B * T + 1), starts, batch_sharding(mesh, 3))


def queued(step: Callable, state: TrainState, batches: Any, steps: int) -> tuple[float, Any, dict]:
    """Return seconds a step, the state and the metrics after ``steps`` steps sent off in a row."""
    began = time.perf_counter()
    for _ in range(steps):
        state, metrics = step(state, *next(batches))
    jax.block_until_ready((state, metrics))
    return (time.perf_counter() - began) / steps, state, metrics


@contextmanager
def memory_told(config: BenchConfig) -> Iterator[None]:
    """Say in one line that the device's memory does not hold what was asked for."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # the latter is a CPU's word for it
        if not any(text in str(error) for text in ("RESOURCE_EXHAUSTED", "Out of memory")):
            raise
        last = {
            "cpu": "measure a small network by --model=char_cpu",
            "gpu": "give XLA more of it by XLA_PYTHON_CLIENT_MEM_FRACTION=.95",
        }.get(jax.default_backend(), "split the network by --fsdp=N")
        raise RunError(
            f"batch_size={config.batch_size} does not fit the device's memory: make it smaller, "
            f"set --remat=dots, or {last}"
        ) from None


def spread(seconds: list[float]) -> dict[str, float]:
    """Return median, least and most, in milliseconds, by the names that a record has for them."""
    ms = [1000 * second for second in seconds]
    return {"ms": statistics.median(ms), "ms_min": min(ms), "ms_max": max(ms)}


def about(what: str, config: BenchConfig, model: GPT, mesh: Mesh) -> dict[str, Any]:
    """Return what every record says: what was measured, of which network, where and when."""
    return {
        "what": what,
        "program": "gpt_jax",
        "model": config.model or "config",
        "batch_size": config.batch_size,
        **{name: getattr(model.config, name) for name in NETWORK},
        **{name: mesh.shape[name] for name in AXES},
        "platform": mesh.devices.flat[0].platform,
        "device": mesh.devices.flat[0].device_kind,
        "n_devices": mesh.size,
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def rate(config: BenchConfig, t: Training, seconds: float) -> dict[str, float | None]:
    """Return tokens/s and mfu, None where the device's peak is not known."""
    A, B = t.shape
    tokens = A * B * config.block_size / seconds
    peak = config.peak_flops or peak_flops(t.mesh.devices.flat[0])
    flops = flops_per_token(t.model.config, count_params(t.state.params)) * tokens
    return {"tokens_per_second": tokens, "mfu": flops / (peak * t.mesh.size) if peak else None}


def peak_memory(mesh: Mesh, compiled: Any) -> dict[str, Any]:
    """Return the most that a device has held so far in GiB, and whose word that is."""
    stats = [device.memory_stats() or {} for device in mesh.devices.flat]
    counted = [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]
    if counted:
        return {"peak_gib": max(counted) / GIB, "peak_from": "device"}
    if compiled is None:
        return {"peak_gib": None, "peak_from": None}
    m = compiled.memory_analysis()
    size = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return {"peak_gib": (size + m.temp_size_in_bytes) / GIB, "peak_from": "program"}
