"""Exact GELU, plain for float32; for 16-bit arrays its slope costs one exponential."""

import math

import jax
import jax.numpy as jnp
from jax import Array


def gelu(x: Array, approximate: bool = False) -> Array:
    """Return x Phi(x) in x's dtype, as nanoGPT has it, or its approximation by tanh, GPT-2's.

    Hendrycks & Gimpel 2016, "Gaussian Error Linear Units". The exact form is written with erf:
    jax.nn.gelu uses erfc, which costs twice as much on a CPU.
    """
    if approximate:
        return jax.nn.gelu(x, approximate=True)
    return plain(x) if x.dtype == jnp.float32 else fused(x)


def plain(x: Array) -> Array:
    """Return exact GELU, computed in float32, which JAX can differentiate."""
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


@jax.custom_vjp
def fused(x: Array) -> Array:
    """Return plain's value; of x alone, in one kernel, its slope is made in the backward pass."""
    return plain(x)


def forward(x: Array) -> tuple[Array, Array]:
    """Return the value, and x for the backward pass."""
    return plain(x), x


def backward(x: Array, gradient: Array) -> tuple[Array]:
    """Return the gradient times the slope Phi(x) + x phi(x).

    Phi comes from the exponential of phi by Abramowitz & Stegun's 7.1.26, within 2e-7: an erf of
    its own would have the kernel wait for arithmetic and not for memory. (In the forward pass,
    where there is no phi, erf is the faster of the two.)
    """
    y = x.astype(jnp.float32)
    z = jnp.abs(y) * math.sqrt(0.5)
    bell = jnp.exp(-z * z)
    t = 1 / (1 + 0.3275911 * z)
    tail = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
    tail = 0.5 * bell * t * (0.254829592 + t * (-0.284496736 + t * tail))
    slope = jnp.where(y < 0, tail, 1 - tail) + y * bell / math.sqrt(2 * math.pi)
    return ((slope * gradient.astype(jnp.float32)).astype(x.dtype),)


fused.defvjp(forward, backward)
