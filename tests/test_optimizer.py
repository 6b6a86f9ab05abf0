"""The learning rate, who decays, the clipping, and AdamW, each against nanoGPT's own formula."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_jax.config import GPTConfig, TrainConfig
from gpt_jax.model import GPT
from gpt_jax.optimizer import decayed, learning_rate, make_optimizer
from gpt_jax.reporting import decay_groups

GPT2 = TrainConfig(learning_rate=6e-4, warmup_iters=2000, lr_decay_iters=600_000, min_lr=6e-5)
CHAR = TrainConfig(learning_rate=1e-3, warmup_iters=100, lr_decay_iters=5000, min_lr=1e-4)


@pytest.fixture(autouse=True, scope="module")
def compiled_in_haste():
    jax.config.update("jax_disable_most_optimizations", True)  # half the time, the same sums
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# T14, as nanoGPT computes it
RATES = [
    (GPT2, 0, 2.998500749625187e-07),
    (GPT2, 1999, 5.997001499250374e-4),
    (GPT2, 2000, 6e-4),
    (GPT2, 100_000, 5.649999182240157e-4),
    (GPT2, 301_000, 3.3e-4),
    (GPT2, 600_000, 6e-5),
    (GPT2, 600_001, 6e-5),
    (GPT2, 2**31 - 2, 6e-5),
    (CHAR, 0, 9.900990099009901e-06),
    (CHAR, 100, 1e-3),
    (CHAR, 2550, 5.5e-4),
    (CHAR, 5000, 1e-4),
    (CHAR, 7500, 1e-4),  # a cosine that went on would have risen again
]


@pytest.mark.parametrize(("config", "step", "rate"), RATES)
def test_the_learning_rate_is_nanogpts(config, step, rate):  # T14
    ours = learning_rate(config, step)
    assert isinstance(ours, float)
    assert math.isclose(ours, rate, rel_tol=1e-12)


@pytest.mark.parametrize("config", [GPT2, CHAR], ids=["gpt2", "shakespeare_char"])
def test_inside_jit_the_learning_rate_is_the_same_in_float32(config):
    rated = [(step, rate) for c, step, rate in RATES if c is config]
    jitted = jax.jit(lambda step: learning_rate(config, step))
    for step, rate in rated:
        ours = jitted(jnp.int32(step))
        assert ours.dtype == jnp.float32
        assert math.isclose(ours, rate, rel_tol=1e-6)


@pytest.mark.parametrize("step", [0, 1, 10**6])
def test_without_decay_the_learning_rate_is_constant(step):  # T14
    config = TrainConfig(learning_rate=3e-5, decay_lr=False)
    assert learning_rate(config, step) == 3e-5
    traced = jax.jit(lambda step: jnp.float32(learning_rate(config, step)))(step)
    assert traced == np.float32(3e-5)


@pytest.mark.parametrize("warmup", [0, 10])
def test_a_warmup_as_long_as_the_decay_divides_by_nothing(warmup):
    config = TrainConfig(learning_rate=1e-3, warmup_iters=warmup, lr_decay_iters=warmup, min_lr=0)
    rates = [learning_rate(config, step) for step in range(warmup + 3)]
    rising = [1e-3 * (step + 1) / (warmup + 1) for step in range(warmup)]
    assert rates == pytest.approx([*rising, 1e-3, 0, 0])


# --- decay


def shapes_of(*sizes):
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")
    model = GPT(GPTConfig(**dict(zip(names, sizes, strict=True))))
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


# M17 and the table of verified counts
@pytest.mark.parametrize(
    ("sizes", "with_decay", "without"),
    [
        ((12, 12, 768, 1024, 50304, False), (50, 124_354_560), (25, 19_200)),
        ((12, 12, 768, 1024, 50257, True), (50, 124_318_464), (98, 121_344)),
        ((24, 16, 1024, 1024, 50257, True), (98, 354_501_632), (194, 321_536)),
        ((36, 20, 1280, 1024, 50257, True), (146, 773_428_480), (290, 601_600)),
        ((6, 6, 384, 256, 65, False), (26, 10_740_096), (13, 4_992)),
        ((4, 4, 128, 64, 65, False), (18, 802_944), (9, 1_152)),
    ],
    ids=["scratch 124M", "gpt2", "gpt2-medium", "gpt2-large", "shakespeare_char", "CPU baby"],
)
def test_as_many_parameters_decay_as_in_nanogpt(sizes, with_decay, without):
    assert decay_groups(shapes_of(*sizes)) == (with_decay, without)


def test_matrices_and_embeddings_decay_and_nothing_else():  # M17
    decays = flatten_dict(decayed(shapes_of(2, 2, 8, 4, 16, True)), sep="/")
    assert {name for name, yes in decays.items() if yes} == {
        "wte/weight",
        "wpe/weight",
        "h/attn/c_attn/weight",
        "h/attn/c_proj/weight",
        "h/mlp/c_fc/weight",
        "h/mlp/c_proj/weight",
    }
    assert len(decays) == 16


# --- clipping


def params_and_gradients(scale=1.0, seed=0):
    """Return a small tree with a leaf of each kind, and gradients of a global norm of `scale`."""
    shapes = {"wte": {"weight": (5, 4)}, "ln_f": {"weight": (4,), "bias": (4,)}}
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    rng = np.random.default_rng(seed)
    params = [np.float32(rng.normal(0, 1, shape)) for shape in leaves]
    grads = [rng.normal(0, 1, shape) for shape in leaves]
    norm = math.sqrt(sum((g**2).sum() for g in grads))
    grads = [np.float32(g * scale / norm) for g in grads]
    return jax.tree.map(jnp.asarray, (tree.unflatten(params), tree.unflatten(grads)))


def first_moment(config, params, grads):
    """Return what reached AdamW: its first moment after one update, (1 - beta1) times that."""
    tx = make_optimizer(config)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    return jax.tree.map(lambda m: m / (1 - config.beta1), optax.tree.get(state, "mu"))


@pytest.mark.parametrize("clip", [1.0, 0.25])
@pytest.mark.parametrize("norm", [0.1, 0.9, 1.1, 30.0])
def test_clipping_is_torchs_but_for_its_1e_6(norm, clip):  # T21
    params, grads = params_and_gradients(norm)
    clipped = first_moment(TrainConfig(grad_clip=clip), params, grads)
    torchs = min(1.0, clip / (norm + 1e-6))
    bound = 1e-6 / clip + 1e-6  # torch's term, and float32's
    for ours, g in zip(jax.tree.leaves(clipped), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(ours, np.float64(g) * torchs, rtol=bound)


def test_a_grad_clip_of_0_clips_nothing():  # T21
    params, grads = params_and_gradients(1e4)
    unclipped = first_moment(TrainConfig(grad_clip=0.0), params, grads)
    for ours, g in zip(jax.tree.leaves(unclipped), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(ours, g, rtol=1e-6)


# --- AdamW


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_updates_are_adamws_by_hand(clip):  # M17, T14, T21
    config = TrainConfig(
        learning_rate=1e-2, warmup_iters=1, lr_decay_iters=10, weight_decay=0.1,
        beta1=0.9, beta2=0.95, grad_clip=clip,
    )  # fmt: skip
    tx = make_optimizer(config)
    params, _ = params_and_gradients()
    state = tx.init(params)
    update = jax.jit(tx.update)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    theirs = [np.float64(x) for x in jax.tree.leaves(params)]
    m, v = [0.0] * len(theirs), [0.0] * len(theirs)
    for step in range(3):
        _, grads = params_and_gradients(10.0**-step, seed=step)  # above the clip, and below it
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        rate = learning_rate(config, step)
        g = [np.float64(x) for x in jax.tree.leaves(grads)]
        if clip:
            norm = math.sqrt(sum((x**2).sum() for x in g))
            g = [x * min(1.0, clip / norm) for x in g]
        for i, name in enumerate(names):
            m[i] = 0.9 * m[i] + 0.1 * g[i]
            v[i] = 0.95 * v[i] + 0.05 * g[i] ** 2
            m_hat, v_hat = m[i] / (1 - 0.9 ** (step + 1)), v[i] / (1 - 0.95 ** (step + 1))
            decay = 0.1 if "wte" in name else 0.0
            theirs[i] -= rate * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay * theirs[i])
        for ours, x in zip(jax.tree.leaves(params), theirs, strict=True):
            np.testing.assert_allclose(ours, x, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("clip", [0.0, 1.0])
@given(
    st.lists(
        st.lists(st.floats(-(2.0**62), 2.0**62, width=32), min_size=4, max_size=4),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_finite_gradient_makes_a_finite_update(clip, gradients):  # C22
    """Of all gradients whose norm is finite; train_step does not look at the update again."""
    tx = make_optimizer(TrainConfig(grad_clip=clip, warmup_iters=0))
    params = {"wte": {"weight": jnp.zeros((2, 2))}}
    state = tx.init(params)
    for gradient in gradients:
        grads = {"wte": {"weight": jnp.array(gradient, jnp.float32).reshape(2, 2)}}
        assert np.isfinite(optax.tree.norm(grads))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for x in jax.tree.leaves((updates, state, params)):
            assert np.isfinite(x).all(), (x, gradient)


def test_eps_is_1e_8_and_outside_the_root():  # M17
    config = TrainConfig(learning_rate=1.0, decay_lr=False, weight_decay=0.0, grad_clip=0.0)
    params = {"ln_f": {"weight": jnp.zeros(3)}}
    grads = {"ln_f": {"weight": jnp.array([1e-8, 1e-7, 0.0])}}
    tx = make_optimizer(config)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["ln_f"]["weight"], [-1 / 2, -10 / 11, 0], rtol=1e-3)


def test_moments_are_float32_and_as_many_as_parameters():
    params, _ = params_and_gradients()
    state = make_optimizer(TrainConfig()).init(params)
    for name in ("mu", "nu"):
        moments = optax.tree.get(state, name)
        assert jax.tree.structure(moments) == jax.tree.structure(params)
        assert {x.dtype for x in jax.tree.leaves(moments)} == {jnp.dtype("float32")}
