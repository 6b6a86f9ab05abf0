"""Products of 8-bit floats, forward and backward: twice as fast as bfloat16's on Hopper and later.

Operands are e4m3 (three bits of mantissa), gradients e5m2 (two, and a wider range), sums float32:
Micikevicius et al. 2022, "FP8 Formats for Deep Learning". Each tensor is multiplied by a power of
two that brings it into the range, and its product by the inverse: exact, in bfloat16 too, so that
only the operands are rounded. Nothing is remembered from step to step.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gpt_jax.errors import UserError

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
MULTIPLE = 16  # of sizes that cuBLASLt takes
SMALLEST = 2.0**-100  # a tensor of nothing larger counts as zeros


class Scaling(NamedTuple):
    """How a kind of tensor is brought into the range of its dtype."""

    dtype: Any
    top: int  # the largest element seen comes to lie between half of 2**top and 2**top
    stride: int  # every so many rows are looked at


# Weights are looked at whole. Of tokens every 7th is: a pass over a (16384, 6400) tensor costs 3 %
# of its product, and 7 divides no usual length, so that all positions have their turn. What is not
# seen may be 7 times as large as what is (of a gradient 800 times), and is cut beyond.
WEIGHT = Scaling(E4M3, 8, 1)
INPUT = Scaling(E4M3, 6, 7)
GRADIENT = Scaling(E5M2, 6, 7)


class Scaled(NamedTuple):
    """Matrices in 8 bits, side by side, lying both ways round: what is summed over must be last."""

    rows: Array  # (M, K)
    columns: Array  # (K, M)
    unit: Array  # float32 (), a power of two: what a one in it stands for


def scaled(parts: Sequence[Array], how: Scaling) -> Scaled:
    """Return parts (M, N), ... side by side, (M, K), in 8 bits.

    What is not finite stays so, or becomes nan: it must not go unnoticed.
    """
    seen = [jnp.abs(x[:: how.stride]).max(initial=SMALLEST) for x in parts]
    largest = jnp.stack(seen).max().astype(jnp.float32)
    # in float32's exponent, from bit 23 on, where 127 stands for 0
    exponent = jax.lax.bitcast_convert_type(largest, jnp.int32) & (255 << 23)
    above = exponent - ((126 + how.top) << 23)
    unit = jax.lax.bitcast_convert_type((127 << 23) + above, jnp.float32)
    scale = jax.lax.bitcast_convert_type((127 << 23) - above, jnp.float32)
    limit = float(jnp.finfo(how.dtype).max)

    def in_8_bits(x: Array) -> Array:
        x = x.astype(jnp.float32) * scale
        if how.stride > 1:
            x = jnp.where(jnp.isfinite(x), jnp.clip(x, -limit, limit), x)
        return x.astype(how.dtype)

    parts = [in_8_bits(x) for x in parts]
    return Scaled(jnp.concatenate(parts, 1), jnp.concatenate([x.T for x in parts]), unit)


def multiply(a: Array, b: Array, unit: Array) -> Array:
    """Return a (M, K) times the transpose of b (N, K), in units, as bfloat16 (M, N)."""
    last = (((1,), (1,)), ((), ()))
    y = jax.lax.dot_general(a, b, last, preferred_element_type=jnp.bfloat16)
    return y * unit.astype(jnp.bfloat16)


@jax.custom_vjp
def products(x: Array, weight: Array) -> list[Array]:
    """Return x (M, K) times each weight[:, i] of (K, P, N), multiplied in 8 bits; all bfloat16.

    So are the gradients made; that of the weight is summed in float32 and then bfloat16, as the
    plain product's. Raises UserError for sizes that are not multiples of 16, for another dtype, and
    on hardware that has no such products; a CPU computes them slowly, for tests.
    """
    return forward(x, weight)[0]


def forward(x: Array, weight: Array) -> tuple[list[Array], tuple]:
    """Return the products, and what their gradients need, in 8 bits."""
    check(x, weight)
    x8, w8 = scaled([x], INPUT), scaled([weight.reshape(len(weight), -1)], WEIGHT)
    ys = []
    for w in jnp.split(w8.columns, weight.shape[1]):
        # or XLA merges two of q, k and v into one product, and copies them apart again
        ys.append(multiply(*jax.lax.optimization_barrier((x8.rows, w, x8.unit * w8.unit))))
    return ys, (x8.columns, x8.unit, w8.rows, w8.unit)


def backward(kept: tuple, dys: list[Array]) -> tuple[Array, Array]:
    """Return the gradients of x and of the weight."""
    x_columns, x_unit, w_rows, w_unit = kept
    dy8 = scaled(dys, GRADIENT)
    dx = multiply(dy8.rows, w_rows, dy8.unit * w_unit)
    dw = multiply(x_columns, dy8.columns, dy8.unit * x_unit)
    return dx, dw.reshape(len(dw), len(dys), -1)


products.defvjp(forward, backward)


def check(x: Array, weight: Array) -> None:
    """Refuse what 8-bit products cannot do."""
    off = "or leave --matmul_dtype=auto"
    if x.dtype != jnp.bfloat16 or weight.dtype != jnp.bfloat16:
        raise UserError(
            f"matmul_dtype=float8 goes with bfloat16, not {x.dtype}: use --dtype=bfloat16, {off}"
        )
    sizes = {"batch_size * block_size": x.shape[0], "inputs": x.shape[1], "outputs": weight[0].size}
    for name, size in sizes.items():
        if size % MULTIPLE:
            raise UserError(
                f"matmul_dtype=float8 needs multiples of {MULTIPLE}, but a product has {name}="
                f"{size}: choose batch_size, block_size and n_embd so, {off}"
            )
    if jax.default_backend() != "cpu":
        device = jax.devices()[0]
        capability = str(getattr(device, "compute_capability", "0"))  # AMD's: "gfx90a"
        if not capability.replace(".", "").isdecimal() or float(capability) < 8.9:
            raise UserError(
                "matmul_dtype=float8 needs an NVIDIA GPU of compute capability 8.9 or more, not "
                f"{device.device_kind}: leave --matmul_dtype=auto"
            )
