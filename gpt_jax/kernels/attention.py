"""Causal attention with dropout: probabilities, and what drops of them, exist in registers alone.

Scores are made a block at a time, forward and again backward, as in FlashAttention (Dao et al.
2022; Dao 2023). Whether a probability is dropped is a function of a seed and of its place, so that
both passes find the same, and nothing of T x T elements is ever in memory.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from gpt_jax.kernels import dropout, launch, power_of_2, triton, use

BLOCK = 64  # queries, and keys, whose scores a program has at once
LOG2E = 1.4426950408889634


def can(q: Array, kernels: str) -> bool:
    """Return whether a config's ``kernels`` means these, for q (B, T, H, D) of this head size."""
    return q.shape[-1] in (16, 32, 64, 128) and use(kernels, q.dtype)


def attention(q: Array, k: Array, v: Array, rate: float, key: Any) -> Array:
    """Return causal attention with dropout; q, k, v and the result are (B, T, H, D).

    It is gpt_jax.attention.reference's, of the same mask, with sums in float32.
    """
    return fused(q, k, v, dropout.seed_of(key), rate)


# ---- the kernels: a program for each block of rows of each head ----


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def fused(q: Array, k: Array, v: Array, seed: Array, rate: float) -> Array:
    """Return causal attention (B, T, H, D) with dropout by a seed, uint32 (2,)."""
    return forward(q, k, v, seed, rate)[0]


def forward(q: Array, k: Array, v: Array, seed: Array, rate: float) -> Any:
    """Return the result, and for the backward pass the base-2 logarithms of softmax's sums."""
    B, T, H, D = q.shape
    block = block_of(T)

    def kernel(q_ref, k_ref, v_ref, seed_ref, out_ref, sums_ref):
        i, h, b = [pl.program_id(axis) for axis in range(3)]
        stays = mask_of(seed_ref, b * H + h, T, rate)
        q = read(q_ref, i, h, b)
        row = rows(i, block)[:, None]

        def add(j, carry):
            out, most, total = carry
            column = rows(j, block)[None]
            scores = dot(q, read(k_ref, j, h, b).T) * (LOG2E / math.sqrt(D))
            scores = jnp.where(row >= column, scores, -jnp.inf)
            more = jnp.maximum(most, scores.max(1))
            p = jnp.exp2(scores - more[:, None])
            shrunk = jnp.exp2(most - more)
            total = total * shrunk + p.sum(1)
            p = jnp.where(stays(row, column), p, 0).astype(q.dtype)
            return out * shrunk[:, None] + dot(p, read(v_ref, j, h, b)), more, total

        zeros = jnp.zeros((block, D), jnp.float32), jnp.zeros(block, jnp.float32)
        start = zeros[0], zeros[1] - jnp.inf, zeros[1]
        out, most, total = jax.lax.fori_loop(0, i + 1, add, start)
        write(out_ref, i, h, b, out * (1 / (total * (1 - rate)))[:, None])
        write(sums_ref, i, h, b, most + jnp.log2(total))

    sums = jax.ShapeDtypeStruct((B, H, T), jnp.float32)
    out, sums = launch(
        kernel,
        **shape_of(D),
        grid=(pl.cdiv(T, block), H, B),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), sums],
        name="attention",
    )(q, k, v, seed)
    return out, (q, k, v, seed, out, sums)


def backward(rate: float, kept: Any, gradient: Array) -> Any:
    """Return the gradients of q, k and v.

    A program makes those of its block of keys, for which it looks at all later queries, and that of
    its block of queries, for which it looks at all earlier keys: all programs have as much to do.
    """
    q, k, v, seed, out, sums = kept
    B, T, H, D = q.shape
    block = block_of(T)
    scale, dtype = 1 / math.sqrt(D), q.dtype
    # of each row, the sum of its probabilities times their gradients
    down = (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2)

    def kernel(q_ref, k_ref, v_ref, seed_ref, g_ref, sums_ref, down_ref, dq_ref, dk_ref, dv_ref):
        i, h, b = [pl.program_id(axis) for axis in range(3)]
        stays = mask_of(seed_ref, b * H + h, T, rate)

        def gradients(scores, dp, sums, down, row, column):
            """Return the probabilities after dropout, and the gradient of the scores."""
            stay = stays(row, column)
            p = jnp.where(row >= column, jnp.exp2(scores * (LOG2E * scale) - sums), 0)
            ds = p * (jnp.where(stay, dp, 0) * (1 / (1 - rate)) - down)
            return jnp.where(stay, p, 0).astype(dtype), ds.astype(dtype)

        zeros = jnp.zeros((block, D), jnp.float32)
        k, v = read(k_ref, i, h, b), read(v_ref, i, h, b)
        column = rows(i, block)[:, None]  # scores lie the other way round here, for the products

        def add_queries(j, carry):
            dk, dv = carry
            q, g = read(q_ref, j, h, b), read(g_ref, j, h, b)
            sums, down = read(sums_ref, j, h, b)[None], read(down_ref, j, h, b)[None]
            row = rows(j, block)[None]
            p, ds = gradients(dot(k, q.T), dot(v, g.T), sums, down, row, column)
            return dk + dot(ds, q), dv + dot(p, g)

        dk, dv = jax.lax.fori_loop(i, pl.cdiv(T, block), add_queries, (zeros, zeros))
        write(dk_ref, i, h, b, dk * scale)
        write(dv_ref, i, h, b, dv * (1 / (1 - rate)))

        q, g = read(q_ref, i, h, b), read(g_ref, i, h, b)
        sums, down = read(sums_ref, i, h, b)[:, None], read(down_ref, i, h, b)[:, None]
        row = rows(i, block)[:, None]

        def add_keys(j, dq):
            k, v = read(k_ref, j, h, b), read(v_ref, j, h, b)
            column = rows(j, block)[None]
            _, ds = gradients(dot(q, k.T), dot(g, v.T), sums, down, row, column)
            return dq + dot(ds, k)

        write(dq_ref, i, h, b, jax.lax.fori_loop(0, i + 1, add_keys, zeros) * scale)

    like = jax.ShapeDtypeStruct(q.shape, q.dtype)
    dq, dk, dv = launch(
        kernel,
        **shape_of(D),
        grid=(pl.cdiv(T, block), H, B),
        out_shape=[like] * 3,
        name="attention_backward",
    )(q, k, v, seed, gradient, sums, down)
    return dq, dk, dv, None


fused.defvjp(forward, backward)


def mask_of(seed_ref: Any, head: Array, T: int, rate: float) -> Any:
    """Return a function of rows and columns: ``dropout.kept``'s mask (B, H, T, T) of one head."""
    golden, head = jnp.uint32(dropout.GOLDEN), head.astype(jnp.uint32)
    first = seed_ref[0] + head * jnp.uint32(T * T * dropout.GOLDEN % 2**32)
    second = seed_ref[1] + head * golden

    def stays(row: Array, column: Array) -> Array:
        row, column = row.astype(jnp.uint32), column.astype(jnp.uint32)
        row = first + row * jnp.uint32(T * dropout.GOLDEN % 2**32)
        return dropout.stays(row + column * golden, second, rate)

    return stays


def block_of(T: int) -> int:
    """Return the rows of a block: those there are, at least 16, which is what a product takes."""
    return max(16, min(BLOCK, power_of_2(T)))


def shape_of(D: int) -> dict[str, int]:
    """Return a program's warps, whose registers hold its sums, and its stages of loads.

    With three stages one block is worked on while the next is loaded. Larger blocks get two: 99 KB
    of shared memory is all that most GPUs have for a program.
    """
    return {"warps": 4, "stages": 3} if D <= 64 else {"warps": 8, "stages": 2}


def rows(i: Array, block: int) -> Array:
    """Return the positions in block i."""
    return i * block + jnp.arange(block)


def read(ref: Any, i: Array, h: Array, b: Array) -> Array:
    """Return block i of a head of (B, T, H, D) or (B, H, T), with zeros for what is beyond T."""
    at, mask = within(ref, i, h, b)
    return triton.load(at, mask=mask, other=None if mask is None else 0)


def write(ref: Any, i: Array, h: Array, b: Array, x: Array) -> None:
    """Write block i of a head, but for what is beyond T."""
    at, mask = within(ref, i, h, b)
    triton.store(at, x.astype(ref.dtype), mask=mask)


def within(ref: Any, i: Array, h: Array, b: Array) -> Any:
    """Return block i of a head, and which of it there is, or None where all is."""
    sums = len(ref.shape) == 3
    T = ref.shape[2 if sums else 1]
    block = block_of(T)
    here = rows(i, block) < T if T % block else None
    if sums:
        return ref.at[b, h, pl.ds(i * block, block)], here
    return ref.at[b, pl.ds(i * block, block), h], None if here is None else here[:, None]


def dot(a: Array, b: Array) -> Array:
    """Return a b, summed in float32."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=exact, preferred_element_type=jnp.float32)
