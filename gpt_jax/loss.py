"""Cross-entropy, fused with the output projection so that the logits need not all exist at once."""

import jax
import jax.numpy as jnp
from jax import Array

from gpt_jax import kernels
from gpt_jax.kernels.cross_entropy import loss_of_projection

# float32 logits alive at once, in elements; beyond it the sequence is worked through in pieces
CHUNK = 2**30


def project(x: Array, weight: Array, dtype: str) -> Array:
    """Return the logits, float32 (B, T, V), of x (B, T, C) and the embedding table (V, C).

    The product is made in ``dtype``, as every other product of the network.
    """
    exact = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    x, weight = x.astype(dtype), weight.astype(dtype)
    return jnp.einsum("btc,vc->btv", x, weight, precision=exact).astype(jnp.float32)


def cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Return the summed loss in nats, float32, and the count of targets that are not -1.

    logits are float32 (B, T, V); targets int32 (B, T).
    """
    counted = targets >= 0
    picked = jnp.take_along_axis(logits, jnp.where(counted, targets, 0)[..., None], -1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.where(counted, losses, 0).sum(), counted.sum()


def cross_entropy_of_projection(
    x: Array, weight: Array, targets: Array, dtype: str, chunk: int = CHUNK, devices: int = 1,
    backend: str = "reference",
) -> tuple[Array, Array]:  # fmt: skip
    """Return ``cross_entropy(project(x, weight), targets)`` with at most ``chunk`` logits alive.

    x is (B, T, C), weight (V, C), targets (B, T). The logits are shared by ``devices``, on each of
    which ``chunk`` may be alive. The pieces run along T, so that B can stay sharded; each piece's
    logits are made again in the backward pass instead of kept. ``backend`` is a config's
    ``kernels``: where it means ours, each piece's gradients are made beside its loss instead.
    """
    B, T, C = x.shape
    if kernels.use(backend, dtype):
        # of 16 bits: twice as many
        total = loss_of_projection(x.reshape(-1, C), weight, targets.reshape(-1), dtype, 2 * chunk)
        return total, (targets >= 0).sum()  # pyright: ignore
    pieces = min(T, -(-B * T * weight.shape[0] // (chunk * devices)))
    if pieces == 1:
        return cross_entropy(project(x, weight, dtype), targets)
    t = -(-T // pieces)
    pad = pieces * t - T
    x = jnp.pad(x, ((0, 0), (0, pad), (0, 0))).reshape(B, pieces, t, C).swapaxes(0, 1)
    targets = jnp.pad(targets, ((0, 0), (0, pad)), constant_values=-1)
    targets = targets.reshape(B, pieces, t).swapaxes(0, 1)

    @jax.checkpoint
    def piece(sums, inputs):
        total, count = cross_entropy(project(inputs[0], weight, dtype), inputs[1])
        return (sums[0] + total, sums[1] + count), None

    zeros = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))
    return jax.lax.scan(piece, zeros, (x, targets))[0]
