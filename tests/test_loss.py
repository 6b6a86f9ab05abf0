"""The loss against its formula, and its pieces against the whole (C34)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from gpt_jax.config import GPTConfig
from gpt_jax.loss import cross_entropy, cross_entropy_of_projection, project
from gpt_jax.model import GPT

B, T, C, V = 3, 10, 8, 13  # V is no multiple of anything
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(0, 1, (B, T, C)), jnp.float32)
W = jnp.asarray(RNG.normal(0, 1, (V, C)), jnp.float32)
TARGETS = RNG.integers(0, V, (B, T)).astype(np.int32)
TARGETS[0, 3:6] = TARGETS[2, -1] = -1
TARGETS = jnp.asarray(TARGETS)
COUNTED = B * T - 4


@pytest.fixture(autouse=True, scope="module")
def compiled_in_haste():
    jax.config.update("jax_disable_most_optimizations", True)  # half the time, the same sums
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def by_hand(logits, targets):
    """Return the summed loss in float64, one position at a time."""
    total = 0.0
    for row, target in zip(np.float64(logits).reshape(-1, V), np.ravel(targets), strict=True):
        if target != -1:
            total += np.log(np.exp(row - row.max()).sum()) + row.max() - row[target]
    return total


def test_cross_entropy_is_its_formula_and_leaves_out_targets_of_minus_1():  # M13
    logits = project(X, W, "float32")
    total, count = jax.jit(cross_entropy)(logits, TARGETS)
    np.testing.assert_allclose(total, by_hand(logits, TARGETS), rtol=1e-6)
    assert (count, count.dtype, total.dtype) == (COUNTED, jnp.int32, jnp.float32)


def test_large_logits_do_not_overflow():
    logits = jnp.array([[[1e4, 0.0, -1e4]]])
    summed = jax.jit(cross_entropy)
    for target, loss in ((0, 0.0), (1, 1e4), (2, 2e4)):
        assert summed(logits, jnp.array([[target]]))[0] == loss


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logits_are_float32_from_products_in_dtype(dtype):  # M10
    logits = project(X, W, dtype)
    assert (logits.shape, logits.dtype) == ((B, T, V), jnp.float32)
    off = np.abs(logits - np.float64(X) @ np.float64(W).T).max()
    least, most = {"float32": (0, 5e-6), "bfloat16": (5e-3, 0.2), "float16": (5e-4, 2e-2)}[dtype]
    assert least <= off <= most


# pieces: 2 of 5 tokens; 3 of 4, the last one padded; 10 of 1; and less than one row of V, which
# asks for more pieces than T and gets T
PIECES = {2: B * V * 5, 3: B * V * 4, 10: B * V, "tiny": V - 1}


@partial(jax.jit, static_argnums=2)
def mean_and_gradients(x, weight, chunk):
    def mean(x, weight):
        total, count = cross_entropy_of_projection(x, weight, TARGETS, "float32", chunk)
        return total / count, (total, count)

    return jax.value_and_grad(mean, (0, 1), has_aux=True)(x, weight)


@pytest.mark.parametrize("chunk", PIECES.values(), ids=PIECES.keys())
def test_in_pieces_the_loss_and_its_gradients_are_the_same(chunk):
    ours, whole = mean_and_gradients(X, W, chunk), mean_and_gradients(X, W, B * T * V)
    assert int(ours[0][1][1]) == COUNTED
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def shapes_in(jaxpr):
    for equation in jaxpr.eqns:
        for x in equation.outvars:
            yield x.aval.shape
        for inner in jaxprs_in_params(equation.params):
            yield from shapes_in(inner)


@pytest.mark.parametrize("pieces", [2, 5, 10])
def test_no_more_logits_than_a_chunk_exist_at_once(pieces):
    chunk = B * T * V // pieces

    def total(x, weight, chunk):
        return cross_entropy_of_projection(x, weight, TARGETS, "float32", chunk)[0]

    def most_logits(chunk):
        jaxpr = jax.make_jaxpr(jax.grad(total, (0, 1)), static_argnums=2)(X, W, chunk)
        return max(np.prod(shape) for shape in shapes_in(jaxpr.jaxpr) if V in shape[1:])

    assert most_logits(B * T * V) == B * T * V
    assert most_logits(chunk) == chunk


@pytest.mark.parametrize("chunk", [B * T * V, B * V * 3])
def test_no_targets_at_all_make_a_sum_of_0_without_nan(chunk):
    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def total(x, weight):
        return cross_entropy_of_projection(x, weight, jnp.full((B, T), -1), "float32", chunk)

    (loss, count), gradients = total(X, W)
    assert (loss, count) == (0, 0)
    assert not any(np.any(g) for g in gradients)


def test_a_model_told_no_targets_has_a_loss_of_0():
    model = GPT(GPTConfig(block_size=4, vocab_size=V, n_layer=1, n_head=1, n_embd=4))
    tokens = jnp.zeros((2, 4), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    variables = jax.tree.map(lambda x: jnp.ones(x.shape), shapes)
    loss = jax.jit(lambda targets: model.apply(variables, tokens, targets, method="loss"))
    assert loss(tokens - 1) == 0
    assert loss(tokens) > 1
