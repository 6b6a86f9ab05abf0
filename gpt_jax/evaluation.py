"""Loss over fixed windows of a split: the same number every time, whatever else has happened."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from gpt_jax.data import Split, place
from gpt_jax.errors import Stopped, UserError
from gpt_jax.model import GPT
from gpt_jax.sharding import batch_sharding, reduced_once, row_shards, total_loss
from gpt_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats/token over ``tokens`` targets, and the same in bits per byte of text."""

    loss: float
    tokens: int
    bits_per_byte: float | None = None


def make_eval_step(
    model: GPT, mesh: Mesh | None = None
) -> Callable[[Any, Array, Array], tuple[Array, Array]]:
    """Return a jitted ``f(params, tokens, targets) -> (summed nats, counted targets)``.

    tokens and targets are int32 (B, T); a target of -1 is left out. No dropout, and no products in
    8 bits: those are for training.
    """
    model = model.clone(config=replace(model.config, matmul_dtype="auto"))

    def sums_of(params, tokens, targets, _):
        return total_loss(mesh, model, params, tokens[0], targets[0])

    @jax.jit
    def eval_step(params: Any, tokens: Array, targets: Array) -> Any:
        return reduced_once(mesh, sums_of)(params, tokens[None], targets[None])

    return eval_step


def evaluate(
    eval_step: Callable, params: Any, split: Split, starts: np.ndarray, batch_size: int, mesh: Mesh,
    tokenizer: Tokenizer | None = None, stop: Callable[[], bool] = lambda: False,
) -> Evaluation:  # fmt: skip
    """Return the loss over the windows at ``starts``, batch by batch.

    With a ``tokenizer`` the bytes of the targets are counted too. Sums are taken in float64. Raises
    Stopped as soon as ``stop()``.
    """
    rows = min(batch_size, len(starts))
    rows += -rows % row_shards(mesh)
    lengths = None if tokenizer is None else text_bytes(tokenizer)
    sums, n_bytes = [], 0
    for first in range(0, len(starts), rows):
        if stop():
            raise Stopped
        part = starts[first : first + rows]
        missing = rows - len(part)
        x, y = place(split, np.pad(part, (0, missing), mode="edge"), batch_sharding(mesh, 2))
        if missing:  # rows that only fill the batch up do not count
            y = y.at[-missing:].set(-1)
        sums.append(eval_step(params, x, y))
        # no more than two at once: many programs with collectives starve each other on a CPU
        jax.block_until_ready(sums[-2:-1])
        if lengths is not None:
            ids = split.windows(part, shift=1)
            n_bytes += int(lengths[np.minimum(ids, len(lengths) - 1)].sum())
    nats, tokens = np.asarray(jax.device_get(sums), np.float64).sum(0)
    bits = nats / math.log(2) / n_bytes if n_bytes else None
    return Evaluation(nats / tokens, int(tokens), bits)


def text_bytes(tokenizer: Tokenizer) -> np.ndarray | None:
    """Return the bytes of text behind each id, int64 (n_tokens,); None if its files are not here.

    An end of text is no text: it counts none.
    """
    try:
        lengths = tokenizer.byte_lengths()
    except UserError:
        return None
    if tokenizer.end_of_text is not None:
        lengths[tokenizer.end_of_text] = 0
    return lengths
