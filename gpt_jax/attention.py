"""Causal attention: a plain reference, and the dispatch to faster backends held equal to it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gpt_jax import kernels
from gpt_jax.errors import UserError


def attention(
    q: Array, k: Array, v: Array, *, backend: str = "auto", dropout: float = 0.0, key: Any = None
) -> Array:
    """Return softmax(q k^T / sqrt(D), causal) v; q, k, v and the result are (B, T, H, D).

    ``dropout`` is the rate on the probabilities and needs a ``key``. Raises UserError where a
    backend cannot do what is asked: none may quietly do something else.
    Vaswani et al. 2017, "Attention Is All You Need".
    """
    if backend == "auto":
        backend = "cudnn" if kernels.cudnn_can(q, dropout) else "reference"
    if backend == "reference":
        return reference(q, k, v, causal_mask(q.shape[1]), dropout, key)
    if dropout:
        raise UserError(
            f"attention={backend} has no dropout (dropout={dropout}): "
            "use --attention=auto or --dropout=0"
        )
    if backend == "cudnn" and not kernels.cudnn_can(q, dropout):
        raise UserError(
            "attention=cudnn needs an NVIDIA GPU, bfloat16 or float16 and a head size that is a "
            f"multiple of 8 up to 128, not {jax.default_backend()}, {q.dtype}, {q.shape[-1]}: "
            "use --attention=auto"
        )
    # jax's `implementation=None` means XLA, never cuDNN: it has to be asked for by name
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=backend)  # pyright: ignore


def reference(
    q: Array, k: Array, v: Array, mask: Array, dropout: float = 0.0, key: Any = None
) -> Array:
    """Return attention written out: q (B, T, H, D), k and v (B, S, H, D), mask to (B, H, T, S)."""
    exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    q = q * (1 / math.sqrt(q.shape[-1]))
    scores = jnp.einsum("bthd,bshd->bhts", q, k, precision=exact).astype(jnp.float32)
    probs = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1).astype(q.dtype)
    probs = drop(probs, dropout, key) if dropout else probs
    return jnp.einsum("bhts,bshd->bthd", probs, v, precision=exact)


def drop(x: Array, rate: float, key: Any) -> Array:
    """Return x (..., T, C), 0 with probability ``rate``, the rest scaled up so that the mean stays.

    Srivastava et al. 2014, "Dropout". To make random bits is most of the work, so four rows share
    a word, and each reads it from another byte on: a rate is exact to 2**-32, and of two elements
    that share a word only one in 256 is decided by a byte that the other has too.
    """
    *outer, T, C = x.shape
    parts = (*outer, 4, -(-T // 4), C)  # XLA fuses what splits T better than what splits C
    # the barrier keeps XLA from making each word four times over
    words = jax.lax.optimization_barrier(jax.random.bits(key, (*outer, 1, *parts[-2:])))
    first = 8 * jax.lax.broadcasted_iota(jnp.uint32, parts, x.ndim - 2)
    numbers = (words << first | words >> 32 - first).reshape(*outer, -1, C)[..., :T, :]
    return jnp.where(numbers < jnp.uint32(int(rate * 2**32)), 0, x / (1 - rate))


def cached_attention(q: Array, k: Array, v: Array, positions: Array) -> Array:
    """Return attention of q (B, T, H, D) at ``positions`` (B, T) over a cache k, v (B, S, H, D).

    A query sees the slots up to its own position; what lies in later slots is not looked at.
    """
    mask = jnp.arange(k.shape[1])[None, None, None, :] <= positions[:, None, :, None]
    return reference(q, k, v, mask)


def causal_mask(T: int) -> Array:
    """Return the (1, 1, T, T) mask in which a query sees itself and what came before."""
    return jnp.tril(jnp.ones((T, T), bool))[None, None]
