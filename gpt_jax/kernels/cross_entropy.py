"""The loss of the output projection, whose gradients are made while the logits are at hand."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from gpt_jax.kernels import exp2, fma, launch, power_of_2, triton

BLOCK = 8192  # logits that a program reads at once
PER_WARP = 512  # of them
LOG2E = 1.4426950408889634


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def loss_of_projection(x: Array, weight: Array, targets: Array, dtype: str, chunk: int) -> Array:
    """Return the summed loss in nats, float32, of the logits x weight^T, made ``chunk`` at a time.

    x is (N, C), weight (V, C), targets int32 (N,), of which -1 is left out. The products are made
    in ``dtype``. Where a gradient is asked for, it is made in the forward pass, piece by piece: no
    logits are kept and none made twice. (As in Liger Kernel, Hsu et al. 2024.)
    """
    table = weight.astype(dtype)
    each = [losses(logits_of(x[p], table), targets[p]).sum() for p in pieces(x, weight, chunk)]
    return jnp.stack(each).sum()


def forward(x: Array, weight: Array, targets: Array, dtype: str, chunk: int) -> Any:
    """Return the summed loss, and its gradients by x and weight for the backward pass to scale."""
    table = weight.astype(dtype)
    total, dxs, dw = jnp.float32(0), [], jnp.zeros(weight.shape, jnp.float32)
    for p in pieces(x, weight, chunk):
        # one after the other, or XLA would have the logits of several pieces alive
        rows, dw = jax.lax.optimization_barrier((x[p].astype(dtype), dw))
        loss, dlogits = losses_and_gradient(logits_of(rows, table), targets[p])
        total += loss.sum()
        dxs.append(jnp.dot(dlogits, table))
        dw += jnp.dot(dlogits.T, rows, preferred_element_type=jnp.float32)
    return total, (jnp.concatenate(dxs), dw, jnp.zeros(0, x.dtype), jnp.zeros(0, weight.dtype))


def backward(dtype: str, chunk: int, kept: Any, gradient: Array) -> Any:
    """Return the gradients of the forward pass times that of its sum."""
    dx, dw, x, weight = kept
    return (dx * gradient).astype(x.dtype), (dw * gradient).astype(weight.dtype), None


loss_of_projection.defvjp(forward, backward)


def pieces(x: Array, weight: Array, chunk: int) -> list[slice]:
    """Return the rows of each piece: even ones, of at most ``chunk`` logits."""
    n = max(1, -(-len(x) * len(weight) // chunk))
    rows = -(-len(x) // n)
    return [slice(first, first + rows) for first in range(0, len(x), rows)]


def logits_of(x: Array, table: Array) -> Array:
    """Return the logits (N, V) in the table's dtype."""
    return jnp.dot(x.astype(table.dtype), table.T)


def losses(logits: Array, targets: Array) -> Array:
    """Return the loss of each row in nats, float32 (N,), of logits (N, V) and targets int32 (N,).

    A target of -1 has a loss of 0.
    """
    return over_rows(logits, targets, gradient=False)[0]


def losses_and_gradient(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Return the losses, and in the memory of the logits the gradient of their sum (N, V)."""
    loss, gradient = over_rows(logits, targets, gradient=True)
    return loss, gradient


def over_rows(logits: Array, targets: Array, gradient: bool) -> Any:
    """Read each row once to sum up its exponentials, and again to replace it by its gradient."""
    N, V = logits.shape
    block = min(BLOCK, power_of_2(V))
    blocks = pl.cdiv(V, block)

    def kernel(logits_ref, targets_ref, loss_ref, *gradient_ref):
        row = pl.program_id(0)
        target = targets_ref[row]
        counted = target >= 0
        unknown = target >= V  # its loss is no number, as the reference's
        # read first: the sums' barriers stand between it and what replaces it
        picked = logits_ref[row, jnp.clip(target, 0, V - 1)].astype(jnp.float32)

        def load(i, policy):
            column = i * block + jnp.arange(block)
            x = triton.load(
                logits_ref.at[row, column],
                mask=column < V,
                other=-jnp.inf,
                eviction_policy=policy,
            )
            return column, x.astype(jnp.float32)

        def add(i, carry):
            most, total = carry
            _, x = load(i, "evict_last")
            more = jnp.maximum(most, x.max() * LOG2E)
            return more, total * jnp.exp2(most - more) + exp2(fma(x, LOG2E, -more)).sum()

        most, total = jax.lax.fori_loop(0, blocks, add, (jnp.float32(-1e30), jnp.float32(0)))
        log_sum = most + jnp.log2(total)
        loss = jnp.where(unknown, jnp.nan, log_sum / LOG2E - picked)
        loss_ref[row] = jnp.where(counted, loss, 0)
        if gradient:
            [out_ref] = gradient_ref

            def replace(i, _):
                column, x = load(i, "evict_first")
                p = exp2(fma(x, LOG2E, -log_sum)) - jnp.where(column == target, 1.0, 0.0)
                p = jnp.where(counted, p, 0)
                triton.store(out_ref.at[row, column], p.astype(out_ref.dtype), mask=column < V)

            jax.lax.fori_loop(0, blocks, replace, None)

    shapes = [jax.ShapeDtypeStruct((N,), jnp.float32)]
    return launch(
        kernel,
        warps=max(1, block // PER_WARP),
        grid=N,
        out_shape=shapes + [jax.ShapeDtypeStruct((N, V), logits.dtype)] * gradient,
        input_output_aliases={0: 1} if gradient else {},
        name="cross_entropy",
    )(logits, targets)
