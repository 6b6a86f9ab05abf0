"""Why a run ended whose updates were left out: which data, and where the numbers go wrong."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gpt_jax.config import TrainConfig
from gpt_jax.data import Split, batch_starts, locate, place
from gpt_jax.model import GPT
from gpt_jax.sharding import batch_sharding, total_loss
from gpt_jax.train_step import TrainState

SHOWN = 6  # lines of each kind


def why(
    config: TrainConfig, model: GPT, mesh: Mesh, state: TrainState, split: Split,
    shape: tuple[int, int], iteration: int,
) -> str:  # fmt: skip
    """Return a report on the update of ``iteration``, the last of too many that were left out.

    ``shape`` is (A, B). The parameters are still those of before, so its losses and gradients are
    computed again, a micro-batch at a time.
    """
    reasons = {"parameters": not_finite(state.params), "loss": [], "gradient": []}
    starts = batch_starts(split, shape, config.seed, iteration)
    for index, micro_batch in enumerate(starts):
        loss, gradients = examine(model, mesh, state, split, micro_batch, iteration, index)
        if not np.isfinite(loss):
            for row in bad_rows(model, mesh, state, split, micro_batch):
                file, first = locate(micro_batch[row], split.lengths)
                path = split.files[int(file)].path
                tokens = f"tokens {first} to {first + split.block_size} of {path}"
                reasons["loss"].append(f"micro-batch {index}, row {row}: {tokens}")
        reasons["gradient"] += [f"micro-batch {index}, {place}" for place in gradients]
        if max(map(len, reasons.values())) >= SHOWN:
            break
    lines = []
    for kind, places in reasons.items():
        lines += [f"  not finite in {kind}: {place}" for place in places[:SHOWN]]
        lines += [f"    and at least {len(places) - SHOWN} more"] if len(places) > SHOWN else []
    again = (
        "computed again, loss and gradients are finite: a spike, a learning rate that overflows, "
        "or hardware that errs"
    )
    return "\n".join([
        f"{config.max_skipped} updates in a row were left out, the last of iteration {iteration}: "
        "their loss or gradient was nan, inf or a spike",
        *(lines or [f"  {again}"]),
        f"The checkpoints in {config.out_dir} are from before. --init_from=resume goes on from the "
        "last of them, or, if that is moved away, from the one before; try a lower "
        "--learning_rate, or a higher --max_skipped to pass by bad data",
    ])  # fmt: skip


def not_finite(tree: Any) -> list[str]:
    """Return the names of the arrays that hold nan or inf, with the layer of stacked ones."""
    found = []
    for path, flags in jax.tree_util.tree_leaves_with_path(jax.device_get(finite_flags(tree))):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        layers = np.flatnonzero(~flags) if flags.ndim else []
        found += [f"{name}, layer {layer}" for layer in layers]
        found += [name] if flags.ndim == 0 and not flags else []
    return found


@jax.jit
def finite_flags(tree: Any) -> Any:
    """Return whether each array is finite; of stacked layers, each layer's part."""

    def flags(path, x):
        layers = x.shape[:1] if path[0].key == "h" else ()
        return jnp.isfinite(x).all(tuple(range(len(layers), x.ndim)))

    return jax.tree_util.tree_map_with_path(flags, tree)


def examine(
    model: GPT, mesh: Mesh, state: TrainState, split: Split, starts: np.ndarray,
    iteration: int, index: int,
) -> tuple[float, list[str]]:  # fmt: skip
    """Return a micro-batch's loss in nats/token, and where its gradient is not finite."""
    deterministic = model.config.dropout == 0
    key = jax.random.fold_in(jax.random.fold_in(state.key, iteration), index)

    def loss_of(params, tokens, targets):
        rngs = None if deterministic else {"dropout": key}
        nats, n = total_loss(mesh, model, params, tokens, targets, deterministic, rngs=rngs)
        return nats / jnp.maximum(n, 1)

    batch = place(split, starts, batch_sharding(mesh, 2))
    loss, gradients = jax.jit(jax.value_and_grad(loss_of))(state.params, *batch)
    return float(loss), not_finite(gradients)


def bad_rows(
    model: GPT, mesh: Mesh, state: TrainState, split: Split, starts: np.ndarray
) -> list[int]:
    """Return the rows of a micro-batch whose own loss, without dropout, is not finite."""
    tokens, targets = place(split, starts, batch_sharding(mesh, 2))

    @jax.jit
    def loss_of(params, row):
        alone = jnp.where(jnp.arange(len(starts))[:, None] == row, targets, -1)
        return total_loss(mesh, model, params, tokens, alone)[0]

    return [row for row in range(len(starts)) if not np.isfinite(loss_of(state.params, row))]
