"""Attention with dropout, interpreted, against what is written out with the same mask."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_kernels import close, normal
from test_loss import shapes_in

from gpt_jax.attention import attention, causal_mask, reference
from gpt_jax.config import GPTConfig
from gpt_jax.kernels import attention as ours
from gpt_jax.kernels import dropout
from gpt_jax.model import GPT

KEY = jax.random.key(3)


@partial(jax.jit, static_argnums=(0, 5))
def value_and_gradients(f, q, k, v, down, rate):
    y, back = jax.vjp(lambda q, k, v: f(q, k, v, rate, KEY), q, k, v)
    return y, back(down)


def written_out(q, k, v, rate, key):
    """The reference in float32, so that the error is the kernels' alone."""
    dtype, (q, k, v) = q.dtype, (x.astype(jnp.float32) for x in (q, k, v))
    return reference(q, k, v, causal_mask(q.shape[1]), rate, key).astype(dtype)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize(
    ("shape", "dtype", "bound"),
    [((2, 130, 2, 16), "float32", 1e-6), ((1, 64, 3, 32), "bfloat16", 8e-3),
     ((2, 5, 1, 64), "float16", 2e-3)],
    ids=str,
)  # fmt: skip
def test_attention_and_its_gradients_are_the_reference_s(shape, dtype, bound, rate):  # M4, M6
    """Over several blocks, of which T does not fill the last, in one, and with T below a block."""
    inputs = [normal(*shape, dtype=dtype) for _ in range(4)]
    found = value_and_gradients(ours.attention, *inputs, rate)
    assert {x.dtype.name for x in jax.tree.leaves(found)} == {dtype}
    close(found, value_and_gradients(written_out, *inputs, rate), bound)


def test_large_scores_do_not_overflow():
    q, k, v, down = (normal(1, 70, 1, 16) for _ in range(4))
    found = value_and_gradients(ours.attention, 300 * q, k, v, down, 0.3)
    close(found, value_and_gradients(written_out, 300 * q, k, v, down, 0.3), 1e-4)


def test_nothing_of_t_by_t_elements_is_made_forward_or_backward():
    T = 200
    x = normal(1, T, 2, 16)
    jaxpr = jax.make_jaxpr(partial(value_and_gradients, ours.attention), static_argnums=4)
    shapes = shapes_in(jaxpr(x, x, x, x, 0.3).jaxpr)
    assert (ours.BLOCK, ours.BLOCK) in shapes  # it looks into the kernels
    assert max(np.prod(shape, initial=1) for shape in shapes) < T * T


def takes_kernels(d=16, dtype="bfloat16", **how):
    x = jnp.zeros((1, 4, 2, d), dtype)
    return "pallas" in str(jax.make_jaxpr(lambda x: attention(x, x, x, key=KEY, **how))(x))


def test_they_are_used_for_dropout_where_kernels_are():
    how = {"dropout": 0.1, "kernels": "pallas"}
    assert all(takes_kernels(d, **how) for d in (16, 32, 64, 128))
    assert not any(takes_kernels(d, **how) for d in (8, 48, 256))
    for other in ({"dropout": 0.0}, {"kernels": "auto"}, {"backend": "reference"}):
        assert not takes_kernels(**{**how, **other})


def test_a_model_on_kernels_drops_what_one_without_drops():
    sizes = {"block_size": 16, "vocab_size": 65, "n_layer": 2, "n_head": 2, "n_embd": 32}
    config = GPTConfig(**sizes, dropout=0.3, kernels="reference")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 65, (3, 16)), jnp.int32)
    params = GPT(config).init(jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda x: x + 0.1 * normal(*x.shape), params)

    def run(kernels):
        model = GPT(replace(config, kernels=kernels))

        def loss(params):
            rngs = {"dropout": KEY}
            return model.apply({"params": params}, tokens, tokens, False, rngs=rngs, method="loss")

        return jax.jit(jax.value_and_grad(loss))(params)

    close(run("pallas"), run("reference"), 2e-6)


# --- what drops


def drops(key, shape, rate):
    """Return what drops, as numbers of mean 0 and variance 1."""
    dropped = 1 - np.float64(jax.jit(dropout.kept, static_argnums=(1, 2))(key, shape, rate))
    return (dropped - rate) / np.sqrt(rate * (1 - rate))


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.2, 0.5, 0.9])
def test_a_share_of_rate_drops(rate):
    x = drops(KEY, (48, 256, 256), rate)
    assert abs(x.mean()) * np.sqrt(x.size) < 4
    # and in each head, row and column
    for axes in [(1, 2), (0, 2), (0, 1)]:
        n = np.prod([x.shape[axis] for axis in axes])
        assert np.abs(x.mean(axes)).max() * np.sqrt(n) < 5 + 3 * (rate < 0.01)  # few and skewed


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_no_two_places_of_a_head_drop_together(rate):
    """Of all pairs at one distance, the correlation is as small as chance, or 1/500."""
    x = drops(KEY, (48, 256, 256), rate)
    power = (np.abs(np.fft.fft2(x)) ** 2).sum(0)
    correlation = np.fft.ifft2(power).real / x.size
    assert correlation[0, 0] == pytest.approx(1, abs=0.01)
    correlation[0, 0] = 0
    assert np.abs(correlation).max() < 1 / 500 + 6 / np.sqrt(x.size)


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_no_two_heads_and_no_two_keys_drop_together(rate):
    first = jax.random.wrap_key_data(jnp.uint32([1, 0]))  # other keys differ in the second word
    keys = [jax.random.key(0), jax.random.key(1), first, *jax.random.split(KEY, 3)]
    x = np.concatenate([drops(key, (24, 128, 128), rate).reshape(24, -1) for key in keys])
    correlation = x @ x.T / x.shape[1] - np.eye(len(x))
    assert np.abs(correlation).max() < 6 / np.sqrt(x.shape[1])


def test_places_with_the_same_counter_in_other_heads_drop_apart():
    """As after 2**32 places: the counter comes again, with another word beside it.

    Some two of 32 heads agree by a few percent more than chance has it.
    """
    counter = jnp.arange(2**18, dtype=jnp.uint32) * jnp.uint32(dropout.GOLDEN)
    words = jnp.arange(32, dtype=jnp.uint32) * jnp.uint32(dropout.GOLDEN)
    x = 2 * np.float64(jax.vmap(lambda word: dropout.stays(counter, word, 0.5))(words)) - 1
    correlation = x @ x.T / x.shape[1] - np.eye(len(x))
    assert np.abs(correlation).max() < 1 / 10


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_a_mask_follows_from_a_key_of_any_kind(kind):
    key = jax.random.key(0, impl=kind)
    masks = [dropout.kept(k, (8, 64, 64), 0.5) for k in (key, key, *jax.random.split(key, 2))]
    assert (masks[0] == masks[1]).all()
    for mask in masks[2:]:
        assert abs((mask == masks[0]).mean() - 0.5) < 0.02
