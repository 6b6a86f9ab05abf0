"""Causal attention: a plain reference, and the dispatch to faster backends held equal to it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gpt_jax.errors import UserError
from gpt_jax.kernels import attention as ours
from gpt_jax.kernels import cudnn_can, dropout


def attention(
    q: Array, k: Array, v: Array, *, backend="auto", kernels="auto", dropout=0.0, key: Any = None
) -> Array:
    """Return softmax(q k^T / sqrt(D), causal) v; q, k, v and the result are (B, T, H, D).

    ``dropout`` is the rate on the probabilities and needs a ``key``. Raises UserError where a
    backend cannot do what is asked: none may quietly do something else.
    Vaswani et al. 2017, "Attention Is All You Need".
    """
    if backend == "auto" and dropout and ours.can(q, kernels):
        return ours.attention(q, k, v, dropout, key)
    if backend == "auto":
        backend = "cudnn" if cudnn_can(q, dropout) else "reference"
    if backend == "reference":
        return reference(q, k, v, causal_mask(q.shape[1]), dropout, key)
    if dropout:
        raise UserError(f"attention={backend} has no dropout={dropout}: use --attention=auto")
    if backend == "cudnn" and not cudnn_can(q, dropout):
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

    Srivastava et al. 2014, "Dropout".
    """
    return jnp.where(dropout.kept(key, x.shape, rate), x / (1 - rate), 0)


def cached_attention(q: Array, k: Array, v: Array, positions: Array) -> Array:
    """Return attention of q (B, T, H, D) at ``positions`` (B, T) over a cache k, v (B, S, H, D).

    A query sees the slots up to its own position; what lies in later slots is not looked at.
    """
    mask = jnp.arange(k.shape[1])[None, None, None, :] <= positions[:, None, :, None]
    return reference(q, k, v, mask)


def causal_mask(T: int) -> Array:
    """Return the (1, 1, T, T) mask in which a query sees itself and what came before."""
    return jnp.tril(jnp.ones((T, T), bool))[None, None]
