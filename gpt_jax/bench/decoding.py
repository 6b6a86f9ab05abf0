"""``bench decode``: generate() from prompts of random tokens."""

import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.bench.config import DecodeBench
from gpt_jax.bench.measure import about, memory_told, network, peak_memory, spread
from gpt_jax.bench.profiling import profiled
from gpt_jax.model import GPT
from gpt_jax.sampling import generate
from gpt_jax.sharding import make_mesh, state_sharding


def decode(config: DecodeBench) -> list[dict[str, Any]]:
    """Return the record of text generation, prompt and the way back to the host included."""
    mesh = make_mesh(config.device, config.data, config.fsdp, config.tensor)
    model = GPT(replace(network(config).config, matmul_dtype="auto"))  # float8 is for training
    B, N = config.batch_size, config.max_new_tokens
    shape = (B, config.prompt_tokens)
    prompts = np.random.default_rng(config.seed).integers(config.vocab_size, size=shape).tolist()

    # the same values; unrolled, 48 layers' compile for minutes
    rolled = model.clone(config=replace(model.config, scan_layers=True))

    def init() -> Any:
        return rolled.init(jax.random.key(config.seed), jnp.zeros((1, 1), jnp.int32))["params"]

    def write(seed: int) -> float:
        began = time.perf_counter()
        rows = generate(
            model, params, prompts, key=jax.random.key(seed), max_new_tokens=N,
            temperature=config.temperature, top_k=config.top_k,
        )  # fmt: skip
        assert [len(row) for row in rows] == [config.prompt_tokens + N] * B
        return time.perf_counter() - began

    with memory_told(config):
        params = jax.jit(init, out_shardings=state_sharding(mesh, jax.eval_shape(init)))()
        jax.block_until_ready(params)
        first = write(0)  # compiles
        write(1)
        seconds = [write(2 + i) for i in range(config.repeats)]
    median = spread(seconds)["ms"] / 1000
    record = about("decode", config, model, mesh) | {
        "prompt_tokens": config.prompt_tokens,
        "max_new_tokens": N,
        "temperature": config.temperature,
        "top_k": config.top_k,
        "repeats": config.repeats,
        **spread(seconds),
        "ms_per_token": 1000 * median / N,
        "tokens_per_second": B * N / median,
        "mfu": None,
        **peak_memory(mesh, None),
        "compile_seconds": first - median,
    }
    if not config.profile:
        return [record]
    shown = profiled(config, lambda: write(0), N, "token", record)
    return [record, shown]
