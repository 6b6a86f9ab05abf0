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

from gpt_jax import kernels
from gpt_jax.integrity import is_spike
from gpt_jax.model import GPT
from gpt_jax.sharding import reduced_once, state_sharding, total_loss

LARGEST_SCALE = 2.0**24
SCALE_DOUBLES_AFTER = 2000  # updates without an overflow, as PyTorch's GradScaler
WINDOW = 128  # updates that a spike stands out from, at most


class TrainState(struct.PyTreeNode):
    """All that an update reads and writes; dropout's keys follow from ``key`` and ``step``."""

    params: Any
    opt_state: Any
    step: Array  # int32 (): updates tried so far, and so the index of the next
    key: Array
    loss_scale: Array  # float32 (): used with float16 only, where small gradients would vanish
    good_steps: Array  # int32 (): updates since the scale last moved
    skipped: Array  # int32 (2,): updates left out in all, and the last ones in a row
    recent: Array  # float32 (2, WINDOW): losses and gradient norms of late; -1: none yet


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
        skipped=jnp.zeros(2, jnp.int32),
        recent=jnp.full((2, WINDOW), -1, jnp.float32),
    )


def make_train_step(
    model: GPT, tx: optax.GradientTransformation, mesh: Mesh | None = None,
    spike_zscore: float = 0.0, measure: Callable[[Any], dict[str, Array]] = lambda grads: {},
) -> Callable[[TrainState, Array, Array], tuple[TrainState, dict[str, Array]]]:  # fmt: skip
    """Return the jitted update ``step(state, tokens, targets) -> (state, metrics)``.

    tokens and targets are int32 (A, B, T): A micro-batches, whose mean gradient, kept in float32,
    makes one update. metrics are scalars: "loss", the mean over all A in nats/token, "grad_norm",
    the global norm before clipping (both float32), and how many updates were left out, "skipped" in
    all and "skipped_in_a_row" up to this one. What ``measure`` makes of that gradient is added to
    them. The state passed in is donated: do not use it again.

    An update is left out, parameters and optimizer as they were, where its loss or gradient is not
    finite (AdamW makes a finite update of a finite gradient), and, with a ``spike_zscore``, where
    the loss or the gradient's norm is so many standard deviations above the last WINDOW (as in
    llm.c); it still counts as a step. With float16 an overflow also halves the loss scale
    (Micikevicius et al. 2018, "Mixed Precision Training"). On a ``mesh`` the state comes laid out
    by sharding.py, and stays so.
    """
    half = model.config.dtype == "float16"
    deterministic = model.config.dropout == 0

    @partial(jax.jit, donate_argnums=0, compiler_options=kernels.compiler_options(model.config))
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
        loss, grads = loss / A, jax.tree.map(lambda g: g / (A * scale), grads)
        grad_norm = optax.tree.norm(grads)
        opt_state = at_step(state.opt_state, state.step)
        updates, opt_state = tx.update(grads, opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        good, recent = finite, state.recent
        if spike_zscore:
            good &= ~is_spike(recent, loss, grad_norm, spike_zscore)
            newer = jnp.stack([loss, grad_norm])[:, None]
            recent = jnp.where(good, jnp.concatenate([recent[:, 1:], newer], 1), recent)
        # with float16 an overflow of the gradient alone is how the loss scale is found
        counted = ~jnp.isfinite(loss) | (scale <= 1) | finite
        in_all, in_a_row = state.skipped + jnp.stack([~good, ~good & counted])
        new, old = (params, opt_state), (state.params, state.opt_state)
        params, opt_state = jax.tree.map(lambda x, before: jnp.where(good, x, before), new, old)
        new = state.replace(  # pyright: ignore
            params=params,
            opt_state=opt_state,
            step=state.step + 1,
            skipped=jnp.stack([in_all, jnp.where(good, 0, in_a_row)]),
            recent=recent,
        )
        if half:
            new = rescale(new, finite)
        if mesh is not None:
            new = jax.lax.with_sharding_constraint(new, state_sharding(mesh, new))
        metrics = {"skipped": new.skipped[0], "skipped_in_a_row": new.skipped[1]}
        return new, {"loss": loss, "grad_norm": grad_norm, **metrics, **measure(grads)}

    return train_step


def at_step(opt_state: Any, step: Array) -> Any:
    """Return an optimizer's state whose schedules stand at ``step``, updates left out or not.

    The learning rate follows the iteration, as nanoGPT's.
    """

    def is_schedule(x: Any) -> bool:
        return isinstance(x, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda x: optax.ScaleByScheduleState(step) if is_schedule(x) else x,
        opt_state,
        is_leaf=is_schedule,
    )


def rescale(state: TrainState, finite: Array) -> TrainState:
    """Return the state with the loss scale halved after an overflow, doubled after many without."""
    grown = state.good_steps + 1 >= SCALE_DOUBLES_AFTER
    up = jnp.minimum(jnp.where(grown, 2.0, 1.0) * state.loss_scale, LARGEST_SCALE)
    return state.replace(  # pyright: ignore
        loss_scale=jnp.where(finite, up, jnp.maximum(state.loss_scale / 2, 1.0)),
        good_steps=jnp.where(finite & ~grown, state.good_steps + 1, 0),
    )
