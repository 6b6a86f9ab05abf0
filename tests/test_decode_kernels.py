"""The decoding kernels, interpreted on CPU, held to the plain network and to lax.top_k."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax import GPT, GPTConfig
from gpt_jax.kernels.decode import (
    Product,
    attend,
    can_decode,
    can_draw,
    joined,
    lay_out,
    linear,
    next_logits,
    noise,
    plain_linear,
    prepare,
    reached_by,
)
from gpt_jax.model import Cache
from gpt_jax.sampling import Rule, decode, next_token, prefill

# C and the head size are no powers of two, and no row count of the grid divides the outputs
CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=96, block_size=300, vocab_size=203, bias=True)


def normal(seed, *shape, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), shape)


def params_of(config, seed=0):
    shapes = jax.eval_shape(GPT(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    leaves, tree = jax.tree.flatten(shapes["params"])
    return tree.unflatten([normal(seed + i, *x.shape, scale=0.3) for i, x in enumerate(leaves)])


def network(config, params):
    return partial(GPT(config).apply, {"params": params}, method="next_logits")


def cache_of(config, B, seed=50):
    shape = (config.n_layer, B, config.block_size, config.n_head, config.n_embd // config.n_head)
    return Cache(*(normal(seed + i, *shape).astype(config.dtype) for i in range(2)))


@pytest.mark.parametrize("B", [1, 3, 6])  # 6: with XLA's products
@pytest.mark.parametrize(("bias", "activation"), [(True, "gelu"), (False, "gelu_tanh")])
def test_a_step_through_the_kernels_is_the_networks_own(B, bias, activation):
    """Logits within 1e-4 in float32; rows at different positions, one in the last slot."""
    config = replace(CONFIG, bias=bias, activation=activation)
    params, cache = params_of(config), cache_of(config, B)
    tokens = jnp.arange(B, dtype=jnp.int32) + 7
    positions = jnp.array([299, 0, 130, 128, 5, 127], jnp.int32)[:B]
    inputs = tokens[:, None], jnp.zeros(B, jnp.int32), positions[:, None]
    weights, layers = prepare(config, params, cache)
    ours, (k, v) = jax.jit(next_logits, static_argnums=0)(config, params, weights, *inputs, layers)
    theirs, expected = network(config, params)(*inputs, cache)
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * float(jnp.abs(theirs).max()))
    np.testing.assert_allclose(jnp.stack(k), expected.k, atol=1e-4)
    np.testing.assert_allclose(jnp.stack(v), expected.v, atol=1e-4)


@pytest.mark.parametrize("B", [1, 6])
def test_in_16_bits_the_kernels_are_no_further_from_float32_than_the_network(B):
    config = replace(CONFIG, dtype="bfloat16")
    params, cache = params_of(config), cache_of(config, B)
    tokens, positions = jnp.arange(B)[:, None] + 7, jnp.arange(B)[:, None] * 40 + 3
    inputs = tokens, jnp.zeros(B, jnp.int32), positions
    weights, layers = prepare(config, params, cache)
    ours, _ = next_logits(config, params, weights, *inputs, layers)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), cache)
    exact, _ = network(CONFIG, params)(*inputs, wide)
    theirs = network(config, params)(*inputs, cache)[0]
    ours, theirs = (float(jnp.square(x - exact).mean() ** 0.5) for x in (ours, theirs))
    assert ours <= 1.1 * theirs


@pytest.mark.parametrize("shape", [(50, 96), (1000, 24), (7, 640)])
@pytest.mark.parametrize("B", [1, 4])
def test_a_product_in_one_kernel_is_the_plain_one(B, shape):
    N, K = shape
    x, weight, bias = normal(1, B, K), normal(2, N, K), normal(3, N)
    normed = {"sums": weight.sum(1)}
    cases = [
        ({}, {}),
        (normed, {}),
        (normed | {"bias": bias}, {"activation": "erf"}),
        ({"bias": bias}, {"activation": "tanh"}),
        ({"bias": bias}, {"residual": normal(6, B, N)}),
    ]
    for its, case in cases:
        product = Product(**{"weight": weight, "bias": None} | its)
        ours, plain = linear(x, product, **case), plain_linear(x, product, **case)
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-3)


def test_a_mean_a_thousand_times_the_deviation_costs_layer_norm_few_digits():
    x, weight = normal(1, 2, 640) + 1000, normal(2, 50, 640)
    ours = linear(x, Product(weight, None, weight.sum(1)))
    exact = np.float64(x)
    exact = (exact - exact.mean(1, keepdims=True)) / exact.std(1, keepdims=True)
    np.testing.assert_allclose(ours, exact @ np.float64(weight).T, atol=2e-2)


def test_layer_norms_scale_and_shift_are_in_the_product_that_follows():
    params = params_of(CONFIG)
    product, h = lay_out(CONFIG, params).layers[1].c_fc, params["h"]
    x = normal(9, 3, 96)
    ln, fc = (jax.tree.map(lambda x: x[1], part) for part in (h["ln_2"], h["mlp"]["c_fc"]))
    y = (x - x.mean(1, keepdims=True)) / jnp.sqrt(x.var(1, keepdims=True) + 1e-5)
    expected = (y * ln["weight"][None] + ln["bias"][None]) @ fc["weight"] + fc["bias"][None]
    np.testing.assert_allclose(plain_linear(x, product), expected, atol=1e-4)


@pytest.mark.parametrize("B", [1, 5, 400])  # 3, 3 and 1 programs share a row's slots
def test_attention_in_parts_is_the_softmax_over_the_slots_so_far(B):
    H, D, S = 2, 24, 300
    qkv, positions = normal(1, B, 3 * H * D), (jnp.arange(B) * 67 + 299) % S
    k, v = normal(2, B, S, H, D), normal(3, B, S, H, D)
    parts, new_k, new_v = attend(qkv, k, v, positions)
    q, *new = jnp.split(qkv.reshape(B, 3 * H, D), 3, axis=1)
    rows = jnp.arange(B)
    k, v = (x.at[rows, positions].set(y) for x, y in zip((k, v), new, strict=True))
    np.testing.assert_array_equal(new_k, k)
    np.testing.assert_array_equal(new_v, v)
    scores = jnp.einsum("bhd,bshd->bhs", q, k) / np.sqrt(D)
    seen = jnp.arange(S)[None, None] <= positions[:, None, None]
    probs = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    expected = jnp.einsum("bhs,bshd->bhd", probs, v).reshape(B, H * D)
    np.testing.assert_allclose(joined(parts), expected, atol=1e-5)


@pytest.mark.parametrize("n_tokens", [0, 180])
def test_a_token_drawn_in_a_kernel_is_the_one_drawn_without(n_tokens):
    """By the same random bits; logits of 16 bits have ties."""
    logits = normal(1, 300, 203, scale=2).astype(jnp.bfloat16).astype(jnp.float32)
    keys = jax.random.split(jax.random.key(7), 300)
    for rule in (Rule(0.8, 20), Rule(1.5, 3)):
        plain = next_token(logits, keys, rule, n_tokens)
        np.testing.assert_array_equal(next_token(logits, keys, rule, n_tokens, True), plain)
    assert len(set(plain.tolist())) > 50


def test_the_noise_of_a_draw_is_jaxs_own():
    key = jax.random.fold_in(jax.random.key(3), 5)
    ours = noise(jax.random.key_data(key), jnp.arange(5000))
    np.testing.assert_array_equal(ours, jax.random.gumbel(key, (5000,)))


def test_keys_of_another_kind_are_drawn_from_without_the_kernel():
    logits, keys = normal(1, 3, 300), jax.random.split(jax.random.key(3, impl="rbg"), 3)
    assert not can_draw(keys)
    plain, fused = (next_token(logits, keys, Rule(1.0, 20), 0, fused) for fused in (False, True))
    np.testing.assert_array_equal(fused, plain)
    assert can_draw(jax.random.split(jax.random.key(3), 3))
    with jax.threefry_partitionable(False):
        assert not can_draw(jax.random.split(jax.random.key(3), 3))


def test_few_logits_more_than_k_are_candidates_for_a_draw():
    """The threshold is one that k reach, and not many more; or the lowest value there is."""
    for k in (1, 50, 200):
        maxima = normal(k, 2000, scale=3).at[0].set(-jnp.inf).at[1].set(40.0)
        assert k <= int((maxima >= reached_by(maxima, k)).sum()) <= 1.2 * k + 2
    assert reached_by(jnp.arange(8.0), 9) == -jnp.inf
    assert reached_by(jnp.full(8, -jnp.inf), 3) == -jnp.inf


@pytest.mark.parametrize(("V", "k"), [(2000, 1), (2000, 200), (300, 299), (130, 7)])
def test_a_draw_keeps_all_that_tie_with_the_kth_and_nothing_below_it(V, k):
    """Ties, both zeros, infinities, all values equal, all below 0: each row drawn many times."""
    x = normal(1, 6, V, scale=4)
    x = x.at[1].set(x[1].astype(jnp.bfloat16).astype(jnp.float32))
    x = x.at[2].set(2.5).at[3].set(jnp.where(jnp.arange(V) % 3 == 0, -0.0, -1e-30))
    x = x.at[4, V // 2 :].set(-jnp.inf).at[5].set(-jnp.abs(x[5]))
    x = jnp.repeat(x, 8, axis=0)
    keys, rule = jax.random.split(jax.random.key(3), len(x)), Rule(1.3, k)
    draw = jax.jit(next_token, static_argnums=(2, 3, 4))
    np.testing.assert_array_equal(draw(x, keys, rule, 0, True), draw(x, keys, rule, 0, False))


def test_candidates_that_are_too_many_for_one_look_are_drawn_from_in_turn():
    """Where all tie; where k is larger than the number of tiles; ``CANDIDATES`` at a time."""
    x = jnp.stack([jnp.full(9000, 2.5), normal(1, 9000)])
    keys, draw = (
        jax.random.split(jax.random.key(3), 2),
        jax.jit(next_token, static_argnums=(2, 3, 4)),
    )
    for k in (40, 2000):
        np.testing.assert_array_equal(
            *(draw(x, keys, Rule(1.3, k), 0, own) for own in (True, False))
        )


def test_a_draw_from_no_numbers_ends():
    x = jnp.full((3, 40), jnp.nan).at[1].set(-jnp.inf).at[2, ::2].set(1.0)
    keys = jax.random.split(jax.random.key(3), 3)
    tokens = np.asarray(next_token(x, keys, Rule(1.0, 5), 0, True))
    assert ((tokens >= 0) & (tokens < 40)).all()


def test_texts_through_the_kernels_are_the_plain_ones():
    """C31, C32: greedy and drawn, rows that stop early, to the end of the room and past it."""
    config = replace(CONFIG, n_layer=1, block_size=24, n_tokens=200)
    model, params = GPT(config), params_of(config)
    params["h"] = jax.tree.map(lambda x: 3 * x, params["h"])  # else a few tokens would recur
    params["wte"] = jax.tree.map(lambda x: 0.3 * x, params["wte"])
    prompts = jnp.array([[5, 7, 9, 11], [8, 0, 0, 0], [1, 2, 3, 0]], jnp.int32)
    keys, lengths = jax.random.split(jax.random.key(0), 3), jnp.array([4, 1, 3], jnp.int32)
    stops, seen = [], set()
    for room, steps in ((20, 16), (32, 28)):
        for rule in (
            Rule(0.0, stop_tokens=(3,)),
            Rule(0.8, 20, stop_tokens=tuple(range(0, 200, 20))),
            Rule(0.8),
        ):
            runs = [
                decode(model, params, prefill(*state, fused), jnp.int32(steps), rule)
                for state in [(model, params, prompts, lengths, room, keys)]
                for fused in (False, True)
            ]
            np.testing.assert_array_equal(runs[0].tokens, runs[1].tokens)
            np.testing.assert_array_equal(runs[0].lengths, runs[1].lengths)
            stops += runs[0].done.tolist()
            seen |= set(runs[0].tokens[0].tolist())
    assert any(stops)
    assert not all(stops)
    assert len(seen) > 20


def test_cpus_and_float32_keep_the_plain_path():
    assert not can_decode(replace(CONFIG, dtype="bfloat16"), params_of(CONFIG))
