"""The real train step, compiled for devices that need not be there, and what it takes of them."""

import math
import re
import time
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gpt_jax.config import GPTConfig, TrainConfig
from gpt_jax.model import GPT, count_params
from gpt_jax.optimizer import make_optimizer
from gpt_jax.plan.hlo import collectives, totals
from gpt_jax.plan.topology import Target, as_if_there
from gpt_jax.sharding import batch_sharding, micro_batches, placed
from gpt_jax.train_step import TrainState, init_state, make_train_step

# A TPU's compiler spends minutes on speed, which nobody here will see. Without that, GPT-2 124M on
# 16 v5e takes 14 s instead of 57, and its temporaries come out as 9.18 GiB instead of 9.33 (20.56
# and 20.50 where it is refused); collectives stay in their loops.
QUICKLY = {"tpu": {"exec_time_optimization_effort": -1.0}}
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
AMOUNT = r"([\d.]+)([KMGT]?)i?B?"


@dataclass(frozen=True)
class Program:
    """What one device needs for a step; bytes, and collectives by kind as hlo.totals gives them."""

    arguments: float
    outputs: float
    aliased: float  # outputs that lie where an argument, donated, lay
    temporaries: float
    code: float
    refused: bool  # the compiler gave up: temporaries are what it asked for
    available: float | None  # bytes that the compiler said there are, where it refused
    collectives: dict[str, dict[str, float]]
    seconds: float  # that compiling took

    @property
    def peak(self) -> float:
        """Bytes that a device holds at most: XLA's donated outputs count once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def state_shapes(config: TrainConfig, model: GPTConfig, mesh: Mesh) -> TrainState:
    """Return the shapes and the layout of the state that train.py would make."""
    network = GPT(replace(model, attention="reference"))  # no kernel changes the parameters

    def first() -> TrainState:
        params = network.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        return init_state(params, make_optimizer(config), jax.random.key(0))

    return placed(mesh, jax.eval_shape(first))


def bytes_by_part(config: TrainConfig, model: GPTConfig, mesh: Mesh) -> dict[str, float]:
    """Return the bytes that a device holds of parameters, moments and batch: the arguments."""
    state = state_shapes(config, model, mesh)
    A, B = micro_batches(config, mesh)
    batch = jax.ShapeDtypeStruct(
        (A, B, config.block_size), jnp.int32, sharding=batch_sharding(mesh, 3)
    )
    return {
        "parameters": local_bytes(state.params),
        "moments": local_bytes(state.opt_state),
        "batch": 2 * local_bytes(batch),
    }


def local_bytes(tree: Any) -> float:
    """Return the bytes that one device holds of a tree of shapes with their layouts."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def n_params(config: TrainConfig, model: GPTConfig, mesh: Mesh) -> tuple[int, int]:
    """Return the number of parameters: all, and as nanoGPT counts, without wpe."""
    params = state_shapes(config, model, mesh).params
    return count_params(params, non_embedding=False), count_params(params)


def compiled_step(config: TrainConfig, model: GPTConfig, target: Target, mesh: Mesh) -> Program:
    """Return what a step takes, by XLA's own account."""
    A, B = micro_batches(config, mesh)
    shape = (A, B, config.block_size)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh, 3))
    state = state_shapes(config, model, mesh)
    began = time.monotonic()
    try:
        with as_if_there(target):
            step: Any = make_train_step(GPT(model), make_optimizer(config), mesh)
            traced = step.trace(state, tokens, tokens)
            lowered = traced.lower(lowering_platforms=(target.platform,))
            compiled = lowered.compile(compiler_options=QUICKLY.get(target.platform))
    except jax.errors.JaxRuntimeError as error:
        arguments = local_bytes((state, tokens, tokens))
        refusal = out_of_memory(str(error), arguments)
        if refusal is None:
            raise
        seconds = time.monotonic() - began
        temporaries, available = refusal
        return Program(
            arguments, arguments, arguments, temporaries, 0, True, available, {}, seconds
        )
    sizes: Any = compiled.memory_analysis()
    return Program(
        sizes.argument_size_in_bytes,
        sizes.output_size_in_bytes,
        sizes.alias_size_in_bytes,
        sizes.temp_size_in_bytes,
        sizes.generated_code_size_in_bytes,
        False,
        None,
        totals(collectives(compiled.as_text())),
        time.monotonic() - began,
    )


def out_of_memory(message: str, arguments: float) -> tuple[float, float] | None:
    """Return (temporaries, available), in bytes, of a compiler's refusal; None for other errors.

    Older compilers tell the total, arguments included.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    if match := re.search(rf"\({AMOUNT}\) exceeds available \w+ \({AMOUNT}\)", message):
        return amount(*match.groups()[:2]), amount(*match.groups()[2:])
    if match := re.search(rf"Used {AMOUNT} of {AMOUNT} hbm", message):
        return amount(*match.groups()[:2]) - arguments, amount(*match.groups()[2:])
    return None


def amount(number: str, unit: str) -> float:
    """Return the bytes of XLA's "20.50G"."""
    return float(number) * UNITS[unit]
