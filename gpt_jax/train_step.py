"""One update of the parameters, micro-batches to AdamW, as one jitted function."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array
from jax.sharding import Mesh

from gpt_jax.model import GPT
from gpt_jax.sharding import reduced_once, state_sharding, total_loss

LARGEST_SCALE = 2.0**24
SCALE_DOUBLES_AFTER = 2000  # updates without an overflow, as PyTorch's GradScaler


class TrainState(struct.PyTreeNode):
    """All that an update reads and writes; dropout's keys follow from ``key`` and ``step``."""

    params: Any
    opt_state: Any
    step: Array  # int32 (): updates tried so far, and so the index of the next
    key: Array
    loss_scale: Array  # float32 (): used with float16 only, where small gradients would vanish
    good_steps: Array  # int32 (): updates since the scale last moved


def init_state(
    params: Any, tx: optax.GradientTransformation, key: Array | None = None
) -> TrainState:
    """Return the state before the first update: zero moments, step 0, loss scale 2**16."""
    return TrainState(
        params=params,
        opt_state=tx.init(params),
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key(0) if key is None else key,
        loss_scale=jnp.asarray(2.0**16, jnp.float32),
        good_steps=jnp.zeros((), jnp.int32),
    )


def make_train_step(
    model: GPT, tx: optax.GradientTransformation, mesh: Mesh | None = None
) -> Callable[[TrainState, Array, Array], tuple[TrainState, dict[str, Array]]]:
    """Return the jitted update ``step(state, tokens, targets) -> (state, metrics)``.

    tokens and targets are int32 (A, B, T): A micro-batches, whose mean gradient, kept in float32,
    makes one update. metrics are float32 scalars: "loss", the mean over all A in nats/token, and
    "grad_norm", the global norm before clipping. The state passed in is donated: do not use it
    again. With float16 an update whose gradient overflows is left out and the loss scale halved
    (Micikevicius et al. 2018, "Mixed Precision Training"); it still counts as a step. On a ``mesh``
    the state comes laid out by sharding.py, and stays so.
    """
    half = model.config.dtype == "float16"
    deterministic = model.config.dropout == 0

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, tokens: Array, targets: Array):
        scale = state.loss_scale if half else jnp.float32(1)
        step_key = jax.random.fold_in(state.key, state.step)
        A = tokens.shape[0]
        counts = jnp.maximum((targets >= 0).sum((1, 2)), 1)

        def sums_of(params, tokens, targets, shard):
            def micro_step(sums, batch):
                index, x, y, count = batch
                key = jax.random.fold_in(step_key, index + A * shard[0])

                def scaled_loss(params):
                    rngs = None if deterministic else {"dropout": key}
                    nats, _ = total_loss(mesh, model, params, x, y, deterministic, rngs=rngs)
                    return nats / count * scale, nats / count

                (_, loss), grads = jax.value_and_grad(scaled_loss, has_aux=True)(params)
                return jax.tree.map(jnp.add, sums, (loss, grads)), None

            zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
            return jax.lax.scan(micro_step, zeros, (jnp.arange(A), tokens, targets, counts))[0]

        loss, grads = reduced_once(mesh, sums_of)(state.params, tokens, targets)
        grads = jax.tree.map(lambda g: g / (A * scale), grads)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = state.replace(params=params, opt_state=opt_state)  # pyright: ignore
        if half:
            new = rescale(state, new, jnp.isfinite(grad_norm))
        new = new.replace(step=state.step + 1)
        if mesh is not None:
            new = jax.lax.with_sharding_constraint(new, state_sharding(mesh, new))
        return new, {"loss": loss / A, "grad_norm": grad_norm}

    return train_step


def rescale(old: TrainState, new: TrainState, finite: Array) -> TrainState:
    """Return ``new`` where the gradient was finite, else ``old`` with half the loss scale."""

    def keep(x: Any, before: Any) -> Any:
        # the learning rate follows the iteration, as nanoGPT's, also past an update left out
        is_schedule = isinstance(x, optax.ScaleByScheduleState)
        return x if is_schedule else jnp.where(finite, x, before)

    kept = jax.tree.map(
        keep,
        (new.params, new.opt_state),
        (old.params, old.opt_state),
        is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState),
    )
    grown = old.good_steps + 1 >= SCALE_DOUBLES_AFTER
    up = jnp.minimum(jnp.where(grown, 2.0, 1.0) * old.loss_scale, LARGEST_SCALE)
    return new.replace(  # pyright: ignore
        params=kept[0],
        opt_state=kept[1],
        loss_scale=jnp.where(finite, up, jnp.maximum(old.loss_scale / 2, 1.0)),
        good_steps=jnp.where(finite & ~grown, old.good_steps + 1, 0),
    )
