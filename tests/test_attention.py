"""Attention: the reference against its formula, and everything else against the reference."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gpt_jax.attention import attention, cached_attention, causal_mask, drop, reference
from gpt_jax.config import GPTConfig
from gpt_jax.errors import UserError
from gpt_jax.sharding import make_mesh

B, T, H, D = 2, 7, 3, 8


@pytest.fixture(autouse=True, scope="module")
def compiled_in_haste():
    jax.config.update("jax_disable_most_optimizations", True)  # half the time, the same sums
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def made_up(*shape, seed=0, count=3):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(0, 1, shape), jnp.float32) for _ in range(count)]


Q, K, V = made_up(B, T, H, D)


def by_hand(q, k, v):
    """Return causal attention (B, T, H, D), one query at a time, in float64."""
    q, k, v = (np.float64(x) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(q.shape[:3]):
        scores = k[b, : t + 1, h] @ q[b, t, h] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ v[b, : t + 1, h]
    return out


@pytest.mark.parametrize("scale", [1.0, 300.0])  # large scores must not overflow
def test_reference_is_causal_softmax_attention(scale):  # M4
    ours = attention(scale * Q, K, V, backend="reference")
    np.testing.assert_allclose(ours, by_hand(scale * Q, K, V), rtol=1e-5, atol=1e-5)


def test_the_causal_mask_lets_a_query_see_itself_and_the_past():
    np.testing.assert_array_equal(
        causal_mask(3)[0, 0], [[True, False, False], [True, True, False], [True, True, True]]
    )


def test_reference_takes_one_query_over_many_keys():
    mask = jnp.ones((1, 1, 1, T), bool)
    last = jax.jit(reference)(Q[:, -1:], K, V, mask)
    np.testing.assert_allclose(last, by_hand(Q, K, V)[:, -1:], rtol=1e-5, atol=1e-5)


def test_auto_is_the_reference_where_there_is_no_gpu():
    ours = attention(Q, K, V)
    np.testing.assert_array_equal(ours, attention(Q, K, V, backend="reference"))


def test_xla_is_the_reference_forward_and_backward():
    weights = made_up(B, T, H, D, seed=1, count=1)[0]

    def value_and_gradients(backend):
        def value(q, k, v):
            y = attention(q, k, v, backend=backend)
            return (y * weights).sum(), y

        return jax.jit(jax.grad(value, (0, 1, 2), has_aux=True))(Q, K, V)

    theirs, ours = value_and_gradients("reference"), value_and_gradients("xla")
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", "bfloat16"), ("reference", "float16"), ("xla", "bfloat16")],  # xla: no float16
)
def test_half_precision_stays_and_is_close(backend, dtype):
    fast = jax.jit(partial(attention, backend=backend))
    y = fast(*(x.astype(dtype) for x in (Q, K, V)))
    assert y.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(np.float32(y), by_hand(Q, K, V), atol=5e-2)


def test_softmax_of_half_precision_is_made_in_float32():
    # 300 equal keys: their probabilities, summed in bfloat16, would stop growing at 256
    q, k = jnp.zeros((1, 300, 1, 8), jnp.bfloat16), jnp.zeros((1, 300, 1, 8), jnp.bfloat16)
    v = jnp.ones_like(k)
    y = np.float32(attention(q, k, v, backend="reference"))
    np.testing.assert_allclose(y, 1, atol=5e-3)


def test_dropout_drops_probabilities_and_keeps_their_mean():  # M6
    key, rate = jax.random.key(3), 0.25
    q = jnp.zeros((64, T, H, D))
    v = jnp.ones_like(q)
    plain = attention(q, q, v, backend="reference")
    np.testing.assert_allclose(plain, 1, rtol=1e-6)
    y = np.asarray(attention(q, q, v, dropout=rate, key=key))
    # the first query has one key: dropped, or scaled up
    first = y[:, 0]
    assert np.isclose(first, 0).sum() + np.isclose(first, 1 / (1 - rate)).sum() == first.size
    drops = (first == 0).all(-1)  # a probability is dropped for all of D
    assert abs(drops.mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / drops.size)
    # the last query's mean over T keys is 1, with a standard error of sqrt(r / (1-r) / T)
    last = y[:, -1, :, 0]
    assert abs(last.mean() - 1) < 5 * np.sqrt(rate / (1 - rate) / T / last.size)
    again = attention(q, q, v, dropout=rate, key=key)
    np.testing.assert_array_equal(y, again)
    assert (y != attention(q, q, v, dropout=rate, key=jax.random.key(4))).any()


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_dropout_keeps_its_rate_and_its_scale(rate):
    x = jnp.full((3, 333, 512), 2.0)
    y = np.asarray(drop(x, rate, jax.random.key(0)))
    kept = y != 0
    np.testing.assert_allclose(y[kept], 2 / (1 - rate), rtol=1e-6)
    assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / y.size)


@pytest.mark.parametrize("shape", [(1, 8), (2, 3, 7, 5), (4, 64, 6)])
def test_dropout_takes_any_shape_and_follows_from_its_key(shape):
    x = jnp.ones(shape, jnp.bfloat16)
    y = drop(x, 0.5, jax.random.key(1))
    assert (y.shape, y.dtype) == (shape, x.dtype)
    np.testing.assert_array_equal(y, jax.jit(drop, static_argnums=1)(x, 0.5, jax.random.key(1)))
    if x.size > 100:
        assert (y != drop(x, 0.5, jax.random.key(2))).any()


def test_dropout_is_the_same_wherever_the_rows_lie():
    x, key = jnp.ones((8, 4, 6, 10)), jax.random.key(4)
    rows = NamedSharding(make_mesh(), PartitionSpec(("data", "fsdp")))
    apart = jax.jit(drop, static_argnums=1)(jax.device_put(x, rows), 0.5, key)
    np.testing.assert_array_equal(apart, drop(x, 0.5, key))


def test_a_gradient_passes_where_a_value_did():
    x, key = jnp.ones((16, 32)), jax.random.key(5)
    y, back = jax.vjp(lambda x: drop(x, 0.25, key), x)
    np.testing.assert_array_equal(back(jnp.ones_like(y))[0], y)


@pytest.mark.parametrize("backend", ["xla", "cudnn"])
def test_a_backend_without_dropout_refuses_it(backend):
    with pytest.raises(UserError, match=f"attention={backend} has no dropout=0.1"):
        attention(Q, K, V, backend=backend, dropout=0.1, key=jax.random.key(0))


def test_cudnn_is_refused_without_a_gpu():
    q, k, v = (x.astype(jnp.bfloat16) for x in (Q, K, V))
    with pytest.raises(UserError, match=r"needs an NVIDIA GPU.*not cpu, bfloat16, 8.*=auto"):
        attention(q, k, v, backend="cudnn")


def test_an_unknown_backend_is_refused():
    with pytest.raises(UserError, match=r"attention='flash' is not one of auto\|reference\|xla"):
        GPTConfig(attention="flash")
    with pytest.raises(ValueError, match="flash"):
        attention(Q, K, V, backend="flash")


def test_cached_attention_is_full_attention():
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    ours = cached_attention(Q, K, V, positions)
    np.testing.assert_allclose(ours, by_hand(Q, K, V), rtol=1e-5, atol=1e-5)


def test_cached_attention_sees_up_to_its_own_position_and_no_later_slot():
    # each row has its own place, and what a longer text left behind comes after it
    positions = jnp.array([[2], [5]])
    junk = jnp.full((B, 4, H, D), 1e4)
    k, v = (jnp.concatenate([x, junk], 1) for x in (K, V))
    for row, t in enumerate((2, 5)):
        late = jnp.arange(T + 4)[None, :, None, None] > t
        k = k.at[row].set(jnp.where(late, 1e4, k)[row])
    q = jnp.stack([Q[0, 2:3], Q[1, 5:6]])
    ours = jax.jit(cached_attention)(q, k, v, positions)
    full = by_hand(Q, K, V)
    expected = np.stack([full[0, 2:3], full[1, 5:6]])
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
