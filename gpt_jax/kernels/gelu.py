"""GELU: plain, and for 16-bit arrays so that neither pass waits for arithmetic."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from gpt_jax.kernels import exp2, fma, launch, reciprocal, triton, use

BLOCK = 2048  # elements of a program: 16 a thread
# log2(Phi(x) / Phi(-x)) / x in powers of x^2, lowest first, up to |x| = 5. Fitted so that Phi is
# off by at most 1e-4 of itself on either side of 0, where float16 rounds by 5e-4
LOGIT = (
    2.30175822, 1.05524411e-1, -3.93825579e-4, -1.04127812e-4, 6.51375713e-6, -1.75521664e-7,
    1.84230397e-9,
)  # fmt: skip
FARTHEST = 25.0  # x^2 beyond which the polynomial stays as it is; Phi(-5) is 3e-7


def gelu(x: Array, approximate: bool = False, kernels: str = "reference") -> Array:
    """Return x Phi(x) in x's dtype, as nanoGPT has it, or its approximation by tanh, GPT-2's.

    ``kernels`` is a config's. Hendrycks & Gimpel 2016, "Gaussian Error Linear Units". The exact
    form is written with erf: jax.nn.gelu uses erfc, which costs twice as much on a CPU.
    """
    if approximate:
        return jax.nn.gelu(x, approximate=True)
    if x.dtype == jnp.float32:
        return plain(x)
    # places in a kernel are of 32 bits
    return in_kernels(x) if use(kernels, x.dtype) and x.size < 2**31 else fused(x)


def plain(x: Array) -> Array:
    """Return exact GELU, computed in float32, which JAX can differentiate."""
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


@jax.custom_vjp
def fused(x: Array) -> Array:
    """Return plain's value; of x alone, in one kernel of XLA's, its slope is made backwards."""
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


@jax.custom_vjp
def in_kernels(x: Array) -> Array:
    """Return plain's value, from half as many instructions as XLA's erf."""
    return elementwise(lambda y: y * phi(y)[0], "gelu", x)


def slope_times(y: Array, gradient: Array) -> Array:
    """Return the gradient times the slope Phi(y) + y phi(y)."""
    share, square = phi(y)
    bell = exp2(square * (-0.5 * math.log2(math.e)))
    return fma(y * (1 / math.sqrt(2 * math.pi)), bell, share) * gradient


in_kernels.defvjp(
    lambda x: (in_kernels(x), x),
    lambda x, gradient: (elementwise(slope_times, "gelu_backward", x, gradient),),
)


def phi(y: Array) -> tuple[Array, Array]:
    """Return the normal distribution's Phi, and y^2."""
    square = y * y
    u = jnp.minimum(square, FARTHEST)
    logit = jnp.full_like(u, LOGIT[-1])
    for coefficient in LOGIT[-2::-1]:
        logit = fma(logit, u, coefficient)
    return reciprocal(1 + exp2(-y * logit)), square


def elementwise(function, name: str, *arrays: Array) -> Array:
    """Return a function of float32 numbers, of arrays of one shape and 16 bits, in their dtype."""
    n = arrays[0].size
    kernel = partial(elementwise_kernel, function=function, whole=n % BLOCK == 0)
    out = launch(
        kernel,
        grid=(pl.cdiv(n, BLOCK),),
        out_shape=jax.ShapeDtypeStruct((n,), arrays[0].dtype),
        warps=4,
        name=name,
    )(*(x.reshape(n) for x in arrays))
    return out.reshape(arrays[0].shape)


def elementwise_kernel(*refs, function, whole):
    """Compute the BLOCK elements of one program."""
    *given, out = refs
    places = pl.program_id(0) * BLOCK + jnp.arange(BLOCK)
    there = None if whole else places < out.shape[0]  # a mask would have each element read alone
    other = None if whole else 0
    values = [triton.load(ref.at[places], mask=there, other=other) for ref in given]
    result = function(*(x.astype(jnp.float32) for x in values))
    triton.store(out.at[places], result.astype(out.dtype), mask=there)
