"""The nearest settings that fit, where those asked for do not; the global batch stays the same."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from jax.sharding import Mesh

from gpt_jax.config import GPTConfig, TrainConfig
from gpt_jax.errors import UserError
from gpt_jax.plan.program import Program, bytes_by_part
from gpt_jax.sharding import make_mesh, micro_batches, row_shards

# temporaries of a row, over those without recomputation; measured for GPT-2 124M on 16 TPU v5e
KEPT = {"none": 1.0, "dots": 0.55, "full": 0.3}
SHOWN = 3
ROOM = 0.97  # of the memory: an estimate nearer to the bound is no promise


class Remedy(NamedTuple):
    """Settings that should fit: the keys to change, what a device then needs, who says so."""

    changes: dict[str, Any]
    peak: float  # bytes
    compiled: bool  # by the compiler's account, else by the estimate below


def shared_rows(config: TrainConfig, shards: int) -> dict[str, int]:
    """Return keys whose rows the devices can share, nearest to those asked for; {} if they can.

    No device gets more rows at a time than ``batch_size``.
    """
    rows = config.batch_size * config.gradient_accumulation_steps
    if rows % shards == 0:
        return {}
    each = max(1, math.floor(rows / shards + 0.5))
    steps = next(n for n in divisors(each) if each // n <= config.batch_size)
    return {"batch_size": each // steps, "gradient_accumulation_steps": steps * shards}


def divisors(n: int) -> list[int]:
    """Return the whole numbers that divide n, 1 first."""
    return [d for d in range(1, n + 1) if n % d == 0]


def split(config: TrainConfig, mesh: Mesh, pieces: int) -> dict[str, int]:
    """Return keys for micro-batches of ``pieces`` times fewer rows, and as many more of them."""
    A, B = micro_batches(config, mesh)
    if pieces == 1:
        return {}
    shards = row_shards(mesh)
    return {
        "batch_size": B // shards // pieces,
        "gradient_accumulation_steps": A * pieces * shards,
    }


def candidates(config: TrainConfig, mesh: Mesh) -> Iterator[dict[str, Any]]:
    """Yield changes, the cheapest first: smaller micro-batches, recomputation, more fsdp."""
    _, B = micro_batches(config, mesh)
    remats = list(KEPT)[list(KEPT).index(config.remat) :]
    sharing = mesh.shape["data"] * mesh.shape["fsdp"]
    for fsdp in divisors(sharing):
        if fsdp % mesh.shape["fsdp"]:
            continue
        wider = {"fsdp": fsdp, "data": -1} if fsdp != mesh.shape["fsdp"] else {}
        for remat in remats:
            again = {"remat": remat} if remat != config.remat else {}
            for pieces in divisors(B // row_shards(mesh)):
                yield {**wider, **again, **split(config, mesh, pieces)}


def estimated_peak(
    program: Program, asked: tuple[TrainConfig, Mesh], other: tuple[TrainConfig, Mesh],
    model: GPTConfig,
) -> float:  # fmt: skip
    """Return the peak of other settings, in bytes, by that of those asked for.

    Gradients and their sum take as much as the parameters twice; a cut table is also gathered, and
    its gradient. All else grows with the rows that a device works on at a time.
    """

    def parts(config: TrainConfig, mesh: Mesh) -> tuple[float, float, float]:
        parts = bytes_by_part(config, model, mesh)
        tables = 4 * model.n_embd * (model.vocab_size + model.block_size) / mesh.shape["tensor"]
        fixed = 2 * parts["parameters"] + (2 * tables if mesh.shape["fsdp"] > 1 else 0)
        rows = micro_batches(config, mesh)[1] / row_shards(mesh)
        return sum(parts.values()), fixed, rows * KEPT[config.remat]

    _, fixed, rows = parts(*asked)
    moving = max(program.temporaries - fixed, 0.3 * program.temporaries)
    arguments, other_fixed, other_rows = parts(*other)
    return arguments + other_fixed + moving * other_rows / rows + program.code


def remedies(
    program: Program, config: TrainConfig, mesh: Mesh, model: GPTConfig, devices: Any, memory: float
) -> list[Remedy]:
    """Return up to SHOWN settings that should fit, by estimate, the cheapest first."""
    found: list[Remedy] = []
    kinds = set()
    for changes in candidates(config, mesh):
        kind = tuple((name, changes.get(name)) for name in ("fsdp", "remat"))
        if kind in kinds or len(found) == SHOWN:  # the largest micro-batch that fits is enough
            continue
        try:
            other = replace(config, **changes)
            new = make_mesh("auto", other.data, other.fsdp, other.tensor, devices=devices)
            peak = estimated_peak(program, (config, mesh), (other, new), model)
        except UserError:  # a size that does not divide
            continue
        if peak <= ROOM * memory:
            kinds.add(kind)
            found.append(Remedy(changes, peak, False))
    return found
