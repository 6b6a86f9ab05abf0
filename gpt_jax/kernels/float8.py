"""Products of 8-bit floats, forward and backward: twice as fast as bfloat16's on Hopper and later.

Micikevicius et al. 2022, "FP8 Formats for Deep Learning": operands in e4m3 (three bits of mantissa),
gradients in e5m2 (two, and a wider range), sums in float32. Each tensor is multiplied by one power
of two that brings it into the range, which its product is divided by: powers of two are exact, in
bfloat16 too, so that only the operands are rounded, and nothing is remembered from step to step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gpt_jax.errors import UserError

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
# The largest element is brought to between half of 2**this and 2**this. Weights are looked at
# whole. Of others only every STRIDE-th row is: a pass over all of a (16384, 6400) tensor costs 3 %
# of its product. What is not seen may be 7 times larger (gradients: 800 times), and is cut beyond.
TOP = {"weight": 8, "input": 6, "gradient": 6}
STRIDE = 7  # no divisor of a sequence's usual lengths, so that every position is seen
MULTIPLE = 16  # of sizes that cuBLASLt takes


class Scaled(NamedTuple):
    """A matrix in 8 bits, lying both ways round, and what one in it stands for."""

    rows: Array  # (M, K)
    columns: Array  # (K, M), the transpose: cuBLASLt sums over what lies next to each other only
    unit: Array  # float32 (), a power of two


def scaled(x: Array, dtype: type, top: int, stride: int = 1) -> Scaled:
    """Return x (M, K) in 8 bits, its largest element, of every stride-th row, just below 2**top.

    What is larger is cut; what is not finite becomes nan or inf, so that it is noticed.
    """
    largest = jnp.abs(x[::stride]).max().astype(jnp.float32)
    exponent = jnp.clip(top - jnp.frexp(largest)[1], -126, 126)
    x = x.astype(jnp.float32) * power_of_two(exponent)
    limit = LARGEST[dtype]
    x8 = jnp.where(jnp.isfinite(x), jnp.clip(x, -limit, limit), x).astype(dtype)
    return Scaled(x8, x8.T, power_of_two(-exponent))


def power_of_two(exponent: Array) -> Array:
    """Return 2**exponent, exactly: float32 of int32 from -126 to 127."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def summed_over_last(a: Array, b: Array, unit: Array) -> Array:
    """Return a (M, K) times the transpose of b (N, K), times the unit, as bfloat16 (M, N)."""
    last = (((1,), (1,)), ((), ()))
    y = jax.lax.dot_general(a, b, last, preferred_element_type=jnp.bfloat16)
    return y * unit.astype(jnp.bfloat16)


@jax.custom_vjp
def product(x: Array, weight: Array) -> Array:
    """Return x (M, K) times weight (K, N), all bfloat16, multiplied in 8 bits, as its gradients are.

    The gradients are bfloat16 too: that of a weight sums over all rows in float32 before. Raises
    UserError where sizes are not multiples of 16, for another dtype, and on devices without 8 bits.
    """
    return forward(x, weight)[0]


def forward(x: Array, weight: Array) -> tuple[Array, tuple]:
    """Return the product, and of the operands in 8 bits what the gradients need."""
    check(x, weight)
    x8 = scaled(x, E4M3, TOP["input"], STRIDE)
    w8 = scaled(weight, E4M3, TOP["weight"])
    y = summed_over_last(x8.rows, w8.columns, x8.unit * w8.unit)
    return y, (x8.columns, x8.unit, w8.rows, w8.unit)


def backward(kept: tuple, dy: Array) -> tuple[Array, Array]:
    """Return the gradients of x and of the weight."""
    x_columns, x_unit, w_rows, w_unit = kept
    dy8 = scaled(dy, E5M2, TOP["gradient"], STRIDE)
    dx = summed_over_last(dy8.rows, w_rows, dy8.unit * w_unit)
    dw = summed_over_last(x_columns, dy8.columns, x_unit * dy8.unit)
    return dx, dw


product.defvjp(forward, backward)


def check(x: Array, weight: Array) -> None:
    """Refuse what 8-bit products cannot do; a CPU computes them slowly, for tests."""
    off = "or leave --matmul_dtype=auto"
    if x.dtype != jnp.bfloat16 or weight.dtype != jnp.bfloat16:
        raise UserError(
            f"matmul_dtype=float8 goes with bfloat16, not {x.dtype}: use --dtype=bfloat16, {off}"
        )
    if any(size % MULTIPLE for size in (*x.shape, *weight.shape)):
        raise UserError(
            f"matmul_dtype=float8: a product of {x.shape} and {weight.shape} has a size that is no "
            f"multiple of {MULTIPLE}: choose batch_size * block_size and n_embd so, {off}"
        )
    if jax.default_backend() != "cpu":
        device = jax.devices()[0]
        capability = str(getattr(device, "compute_capability", "0"))  # AMD's: "gfx90a"
        if not capability.replace(".", "").isdecimal() or float(capability) < 8.9:
            raise UserError(
                "matmul_dtype=float8 needs an NVIDIA GPU of compute capability 8.9 or more, not "
                f"{device.device_kind}: leave --matmul_dtype=auto"
            )
