"""What dropout drops, as a function of a key and of a place: made where it is used, and not kept.

A forward and a backward pass find the same, and so do a kernel and its reference.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

GOLDEN = 0x9E3779B9  # 2**32 over the golden ratio, made odd


def seed_of(key: Any) -> Array:
    """Return two words of a key, uint32 (2,): all of Threefry's; another's second half will do."""
    # keys that were counted, not derived, shall differ in many bits too
    return jax.random.key_data(key)[-2:] * jnp.uint32(0x85EBCA6B)


def kept(key: Any, shape: tuple[int, ...], rate: float) -> Array:
    """Return a mask of ``shape``, (..., T, C), false with probability ``rate``.

    Two elements drop independently of each other, whatever their places or keys.
    """
    outer = shape[:-2]
    first, second = seed_of(key)
    place = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    part = jax.lax.iota(jnp.uint32, math.prod(outer)).reshape(*outer, 1, 1)
    return stays(first + place * jnp.uint32(GOLDEN), second + part * jnp.uint32(GOLDEN), rate)


def stays(counter: Array, word: Array, rate: float) -> Array:
    """Return whether what these uint32 stand for is kept; a rate is exact to 2**-32.

    It is dropped where a hash of the counter is less than ``rate``'s share of 2**32: C. Wellons's
    lowbias32 without its last step, which leaves the bits that decide as they are, and with a word
    in its middle: where counters come again, as after 2**32 places, words differ.
    """
    x = (counter ^ counter >> 16) * jnp.uint32(0x7FEB352D)
    x = (x ^ x >> 15 ^ word) * jnp.uint32(0x846CA68B)
    return x >= jnp.uint32(int(rate * 2**32))
