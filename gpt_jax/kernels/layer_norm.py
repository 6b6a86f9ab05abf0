"""LayerNorm and the residual addition before it: written out, and in one pass over memory."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from gpt_jax.kernels import launch, power_of_2, triton

EPSILON = 1e-5
TILE = 4096  # elements that a program works on at once
ROWS = 32  # rows of a program in the backward pass, whose share of the weight's gradient it sums


def reference(
    x: Array, y: Array | None, weight: Array, bias: Array | None, uses: int = 1
) -> tuple[Array, ...]:
    """Return x + y, and its LayerNorm over the last axis, once for each of its ``uses``.

    x and y are (..., C), weight and bias (C,) float32. The sum has x's dtype; the rest is float32,
    the variance in two passes and with an eps of 1e-5, as PyTorch does it.
    Ba, Kiros & Hinton 2016, "Layer Normalization".
    """
    x = x if y is None else x + y
    normed = x.astype(jnp.float32)
    normed -= normed.mean(-1, keepdims=True)
    normed *= jax.lax.rsqrt(jnp.square(normed).mean(-1, keepdims=True) + EPSILON)
    normed *= jnp.expand_dims(weight, range(x.ndim - 1))
    normed = normed if bias is None else normed + jnp.expand_dims(bias, range(x.ndim - 1))
    return x, *[normed] * uses


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def fused(
    x: Array, y: Array | None, weight: Array, bias: Array | None, uses: int = 1
) -> tuple[Array, ...]:
    """Return reference's result, the normed rows in y's dtype, or in x's without a y.

    The gradients of all uses, and what comes down the residual stream, are added in one kernel, not
    one by one in memory.
    """
    return forward(x, y, weight, bias, uses)[0]


def forward(x: Array, y: Array | None, weight: Array, bias: Array | None, uses: int) -> Any:
    """Return the results, and what the backward pass needs: the sum, its mean and deviation."""
    C = x.shape[-1]
    N = x.size // C
    width = power_of_2(C)
    rows = max(1, TILE // width)

    def kernel(*refs):
        x_ref, *refs = refs
        y_ref = refs.pop(0) if y is not None else None
        w_ref, *refs = refs
        b_ref = refs.pop(0) if bias is not None else None
        sum_ref = refs.pop(0) if y is not None else None
        normed_ref, mean_ref, rstd_ref = refs
        row = pl.program_id(0) * rows + jnp.arange(rows)
        column = jnp.arange(width)
        here = (row < N)[:, None] & (column < C)[None]
        at = (row[:, None], column[None])
        total = triton.load(x_ref.at[at], mask=here, other=0).astype(jnp.float32)
        if y_ref is not None and sum_ref is not None:
            total += triton.load(y_ref.at[at], mask=here, other=0).astype(jnp.float32)
            total = total.astype(sum_ref.dtype)
            triton.store(sum_ref.at[at], total, mask=here)
            total = total.astype(jnp.float32)  # what is normed is what is kept
        mean = total.sum(1) / C
        centred = jnp.where(here, total - mean[:, None], 0)
        rstd = jax.lax.rsqrt((centred * centred).sum(1) / C + EPSILON)
        w = triton.load(w_ref.at[column], mask=column < C, other=0)
        normed = centred * rstd[:, None] * w[None]
        if b_ref is not None:
            normed += triton.load(b_ref.at[column], mask=column < C, other=0)[None]
        triton.store(normed_ref.at[at], normed.astype(normed_ref.dtype), mask=here)
        triton.store(mean_ref.at[row], mean, mask=row < N)
        triton.store(rstd_ref.at[row], rstd, mask=row < N)

    flat = [None if a is None else a.reshape(N, C) for a in (x, y)]
    normed = jax.ShapeDtypeStruct((N, C), x.dtype if y is None else y.dtype)
    statistic = jax.ShapeDtypeStruct((N,), jnp.float32)
    kept = [] if y is None else [jax.ShapeDtypeStruct((N, C), x.dtype)]
    out = launch(
        kernel,
        warps=4,
        grid=pl.cdiv(N, rows),
        out_shape=[*kept, normed, statistic, statistic],
        name="layer_norm",
    )(*(a for a in (*flat, weight, bias) if a is not None))
    total = x if y is None else out[0].reshape(x.shape)
    normed, mean, rstd = out[-3:]
    return (total, *[normed.reshape(x.shape)] * uses), (
        total,
        mean,
        rstd,
        weight,
        bias,
        y is not None,
    )


def backward(uses: int, kept: Any, gradients: Any) -> Any:
    """Return the gradients of x and y, one array, and of weight and bias."""
    x, mean, rstd, weight, bias, two = kept
    C = x.shape[-1]
    N = x.size // C
    width = power_of_2(C)
    at_once = min(ROWS, max(1, TILE // 2 // width))
    programs = pl.cdiv(N, ROWS)

    def kernel(x_ref, mean_ref, rstd_ref, w_ref, down_ref, *refs):
        normed_refs, dx_ref, refs = refs[:uses], refs[uses], refs[uses + 1 :]
        program = pl.program_id(0)
        column = jnp.arange(width)
        w = triton.load(w_ref.at[column], mask=column < C, other=0)[None]

        def step(i, sums):
            row = program * ROWS + i * at_once + jnp.arange(at_once)
            here = (row < N)[:, None] & (column < C)[None]
            at = (row[:, None], column[None])
            x = triton.load(x_ref.at[at], mask=here, other=0).astype(jnp.float32)
            g = sum(
                triton.load(ref.at[at], mask=here, other=0).astype(jnp.float32)
                for ref in normed_refs
            )
            down = triton.load(down_ref.at[at], mask=here, other=0).astype(jnp.float32)
            mean = triton.load(mean_ref.at[row], mask=row < N, other=0)[:, None]
            rstd = triton.load(rstd_ref.at[row], mask=row < N, other=0)[:, None]
            hat = jnp.where(here, (x - mean) * rstd, 0)
            wg = w * g
            dx = wg - (wg.sum(1) / C)[:, None] - hat * ((wg * hat).sum(1) / C)[:, None]
            dx = down + rstd * dx
            triton.store(dx_ref.at[at], dx.astype(dx_ref.dtype), mask=here)
            return [s + more for s, more in zip(sums, (g * hat, g), strict=False)]

        sums = [jnp.zeros((at_once, width), jnp.float32)] * len(refs)
        sums = jax.lax.fori_loop(0, ROWS // at_once, step, sums)
        for ref, total in zip(refs, sums, strict=True):
            at = (program, column)
            triton.store(ref.at[at], total.sum(0), mask=column < C)

    down, *normed = (g.reshape(N, C) for g in gradients)
    share = jax.ShapeDtypeStruct((programs, C), jnp.float32)
    dx, *shares = launch(
        kernel,
        warps=4,
        grid=programs,
        out_shape=[jax.ShapeDtypeStruct((N, C), x.dtype)] + [share] * (1 if bias is None else 2),
        name="layer_norm_backward",
    )(x.reshape(N, C), mean, rstd, weight, down, *normed)
    dx = dx.reshape(x.shape)
    dw, *db = (s.sum(0).astype(weight.dtype) for s in shares)
    return dx, dx.astype(normed[0].dtype) if two else None, dw, db[0] if db else None


fused.defvjp(forward, backward)
