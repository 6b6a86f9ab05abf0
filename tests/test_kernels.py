"""Kernels of our own, interpreted, against what is written out: values and gradients."""

from dataclasses import replace
from functools import partial
from importlib.metadata import entry_points
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from test_loss import shapes_in

from gpt_jax import kernels, reporting
from gpt_jax.config import GPTConfig, TrainConfig
from gpt_jax.errors import UserError
from gpt_jax.kernels import cross_entropy, layer_norm
from gpt_jax.kernels.gelu import gelu, in_kernels
from gpt_jax.loss import cross_entropy_of_projection
from gpt_jax.model import GPT
from gpt_jax.plan.topology import as_if_there, describe_topology

RNG = np.random.default_rng(0)


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(0, 1, shape), dtype)


def close(ours, theirs, bound):
    """Relative error by norm: an element may be small by chance."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) <= bound * np.linalg.norm(b)


# --- LayerNorm


def plain_layer_norm(x, y, weight, bias, uses):
    total, *normed = layer_norm.reference(x, y, weight, bias, uses)
    return total, *[z.astype(x.dtype) for z in normed]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("n", "c", "two", "biased", "uses"),
    [(64, 48, True, True, 1), (70, 64, False, False, 3), (33, 20, True, False, 1),
     (1, 5, False, True, 1), (4, 4100, True, True, 2)],
)  # fmt: skip
def test_layer_norm_and_its_gradients_are_the_plain_ones(n, c, two, biased, uses, dtype):
    """Rows and widths that fill no block, too."""
    x, y = normal(n, c, dtype=dtype), normal(n, c, dtype=dtype) if two else None
    weight, bias = 1 + normal(c) / 3, normal(c) if biased else None
    down = [normal(n, c, dtype=dtype) for _ in range(1 + uses)]

    @partial(jax.jit, static_argnums=0)
    def run(f):
        out, back = jax.vjp(lambda *a: f(*a, uses), x, y, weight, bias)
        return out, back(tuple(down))

    bound = {"float32": 1e-6, "bfloat16": 6e-3}[dtype]
    close(run(layer_norm.fused), run(plain_layer_norm), bound)


def test_the_sum_that_layer_norm_returns_is_the_one_that_it_norms():
    """In bfloat16 the sum is rounded: what goes down the stream and what is normed must agree."""
    x, y = normal(8, 64, dtype="bfloat16"), normal(8, 64, dtype="bfloat16")
    weight = jnp.ones(64)
    total, normed = jax.jit(layer_norm.fused)(x, y, weight, None)
    assert (total == x + y).all()
    again = jax.jit(layer_norm.fused)(total, None, weight, None)[1]
    assert (normed == again).all()


# --- the loss


def plain_losses(logits, targets):
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], 1)[:, 0]
    return jnp.where(targets >= 0, jax.nn.logsumexp(logits, -1) - picked, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("v", [13, 1024, 8192 + 77])
def test_losses_and_their_gradient_are_the_formula(v, dtype):  # C34
    logits = 3 * normal(6, v, dtype=dtype)
    targets = jnp.asarray([0, v - 1, -1, 5, 7, -1])
    plain = jax.jit(lambda x: (plain_losses(x, targets), jax.grad(
        lambda x: plain_losses(x, targets).sum())(x)))(logits)  # fmt: skip
    loss = jax.jit(cross_entropy.losses)(logits, targets)
    ours = jax.jit(cross_entropy.losses_and_gradient)(logits, targets)
    close(loss, plain[0], 1e-6)
    close(ours[0], plain[0], 1e-6)
    close(ours[1], plain[1], {"float32": 1e-5, "bfloat16": 4e-3}[dtype])
    assert not np.any(ours[1][2])
    assert not np.any(ours[1][5])


def test_large_logits_do_not_overflow_and_no_number_makes_no_number():
    logits = jnp.asarray([[1e4, 0.0, -1e4], [np.nan, 0, 0], [np.inf, 0, 0]])
    targets = jnp.asarray([1, 1, 1])
    loss, gradient = jax.jit(cross_entropy.losses_and_gradient)(logits, targets)
    assert loss[0] == 1e4
    assert (gradient[0] == jnp.asarray([1, -1, 0])).all()
    assert not np.isfinite(loss[1:]).any()


def test_a_target_that_the_vocabulary_does_not_have_makes_a_loss_that_is_no_number():
    """So that the update is left out, as on the plain path."""
    loss = cross_entropy.losses(normal(3, 13), jnp.asarray([12, 13, 99]))
    assert np.isfinite(loss).tolist() == [True, False, False]


B, T, C, V = 3, 10, 8, 13
X, W = normal(B, T, C), normal(V, C)
TARGETS = jnp.asarray(RNG.integers(-1, V, (B, T)), jnp.int32)


@partial(jax.jit, static_argnums=(2, 3))
def mean_and_gradients(x, weight, backend, chunk):
    def mean(x, weight):
        total, count = cross_entropy_of_projection(
            x, weight, TARGETS, "float32", chunk, backend=backend
        )
        return total / count, count

    return jax.value_and_grad(mean, (0, 1), has_aux=True)(x, weight)


@pytest.mark.parametrize("chunk", [B * T * V, B * V * 4, V * 7, 1])
def test_gradients_made_in_the_forward_pass_are_those_of_the_plain_loss(chunk):  # C34
    ours = mean_and_gradients(X, W, "pallas", chunk)
    close(ours, mean_and_gradients(X, W, "reference", B * T * V), 1e-6)


def test_no_more_logits_than_a_chunk_exist_at_once():
    jaxpr = jax.make_jaxpr(mean_and_gradients, static_argnums=(2, 3))(X, W, "pallas", 5 * V)
    logits = [shape for shape in shapes_in(jaxpr.jaxpr) if len(shape) == 2 and shape[1] == V]
    # a chunk is of 32 bits a logit, these have 16
    assert max(np.prod(shape) for shape in logits) == 2 * 5 * V


def test_xla_has_the_logits_of_one_piece_alive_at_a_time():
    """Compiled for a GPU that is not there; beside them lies the gradient of all rows."""
    if not any("cuda" in plugin.name for plugin in entry_points(group="jax_plugins")):
        pytest.skip("JAX's CUDA plugin is not installed")
    target, (n, c, v) = describe_topology("h200:1"), (65536, 768, 50304)
    place = SingleDeviceSharding(target.devices[0])
    shapes = [((n, c), jnp.bfloat16), ((v, c), jnp.float32), ((n,), jnp.int32)]
    like = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes]
    piece = 2**28

    def total(x, weight, targets):
        return cross_entropy.loss_of_projection(x, weight, targets, "bfloat16", piece)

    with as_if_there(target):
        step = jax.jit(jax.grad(total, (0, 1))).trace(*like).lower(lowering_platforms=("cuda",))
        sizes = step.compile().memory_analysis()
    assert 2 * piece < sizes.temp_size_in_bytes < 1.6 * 2 * piece


# --- GELU


def test_gelu_and_its_slope_are_the_exact_ones():
    x = np.linspace(-12, 12, 4001).astype(np.float32)
    exact = lambda x: 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))  # noqa: E731
    for f, bound in ((gelu, 0), (jax.vmap(jax.grad(gelu)), 4e-7)):
        theirs = jax.jit(exact if f is gelu else jax.vmap(jax.grad(exact)))(x)
        assert np.abs(jax.jit(f)(x) - theirs).max() <= bound


@pytest.mark.parametrize("n", [4096, 1001])  # whole programs, and not
def test_gelu_in_kernels_is_exact_to_a_fifth_of_what_float16_rounds_away(n):
    """C34's kind: the value to 1e-4 of itself on either side of 0, its slope to 2e-5."""
    x = np.linspace(-5, 5, n).astype(np.float32)
    exact = lambda x: 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))  # noqa: E731
    with jax.enable_x64():
        wide = jnp.float64(x)
        value, slope = exact(wide), jax.vmap(jax.grad(exact))(wide)
    np.testing.assert_allclose(in_kernels(x), value, rtol=1.05e-4, atol=0)
    ones = jnp.ones(n, jnp.float32)
    np.testing.assert_allclose(jax.vjp(in_kernels, x)[1](ones)[0], slope, rtol=1e-5, atol=2.3e-5)


def test_gelu_in_kernels_is_the_exact_value_rounded_to_16_bits_or_its_neighbour():
    x = jnp.linspace(-9, 9, 2**16).astype(jnp.bfloat16)
    with jax.enable_x64():
        y = jnp.float64(x)
        exact = (0.5 * y * (1 + jax.lax.erf(y * 0.5**0.5))).astype(jnp.bfloat16)
    bits = [np.int32(np.asarray(y).view(np.int16)) for y in (in_kernels(x), exact)]
    apart = np.abs(bits[0] - bits[1])[np.abs(np.float32(x)) < 5]
    assert apart.max() <= 1
    assert (apart > 0).mean() < 0.004
    np.testing.assert_allclose(np.float32(in_kernels(x)), np.float32(exact), rtol=2**-7, atol=4e-7)


@pytest.mark.parametrize("value", [np.inf, np.nan, 3e38, -3e38])
def test_gelu_in_kernels_of_numbers_at_the_edge_is_the_plain_one(value):
    x = jnp.full(3, value, jnp.bfloat16)
    np.testing.assert_array_equal(np.float32(in_kernels(x)), np.float32(gelu(x)))
    slopes = [jax.vjp(f, x)[1](jnp.ones_like(x))[0] for f in (in_kernels, gelu)]
    np.testing.assert_array_equal(*(np.float32(slope) for slope in slopes))


# --- the network

SIZES = {"block_size": 16, "vocab_size": 65, "n_layer": 2, "n_head": 2, "n_embd": 48}


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_model_on_kernels_has_the_loss_and_gradients_of_one_without(dtype, bound, bias):
    config = GPTConfig(**SIZES, bias=bias, dtype=dtype, kernels="reference")
    tokens = jnp.asarray(RNG.integers(0, 65, (3, 16)), jnp.int32)
    targets = jnp.asarray(RNG.integers(-1, 65, (3, 16)), jnp.int32)
    params = GPT(config).init(jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda x: x + 0.1 * normal(*x.shape), params)

    def run(kernels):
        model = GPT(replace(config, kernels=kernels))
        loss = lambda p: model.apply({"params": p}, tokens, targets, method="loss")  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    close(run("pallas"), run("reference"), bound)


def test_the_stream_is_bfloat16_with_bfloat16_products_and_float32_otherwise():
    tokens = jnp.zeros((1, 4), jnp.int32)
    for dtype, stream in (("bfloat16", "bfloat16"), ("float16", "float32"), ("float32", "float32")):
        model = GPT(GPTConfig(**SIZES, dtype=dtype))
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)
        _, kept = jax.eval_shape(
            lambda p, m=model: m.apply(p, tokens, capture_intermediates=True), params
        )
        assert kept["intermediates"]["ln_f"]["__call__"][0][0].dtype == stream


# --- where they are used


def device(platform="gpu", kind="NVIDIA H100", capability="9.0"):
    return SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)


@pytest.mark.parametrize(
    ("there", "dtype", "why"),
    [
        (device(), "bfloat16", None),
        (device(capability="8.0"), "float16", None),
        (device(), "float32", "for bfloat16 and float16, not float32"),
        (device(kind="Tesla T4", capability="7.5"), "float16", "for NVIDIA GPUs, not Tesla T4"),
        (device(kind="NVIDIA V100", capability="7.0"), "float16", "need compute capability 8"),
        (device("tpu", "TPU v5e"), "bfloat16", "for NVIDIA GPUs, not TPU v5e"),
        (device("gpu", "AMD Instinct MI300X"), "bfloat16", "not AMD Instinct MI300X"),
    ],
)
def test_kernels_are_used_by_themselves_where_they_can_be_compiled(monkeypatch, there, dtype, why):
    monkeypatch.setattr(jax, "devices", lambda: [there])
    reason = kernels.why_not(dtype)
    assert (why is None and reason is None) or why in reason
    assert kernels.use("auto", dtype) == (why is None)
    assert not kernels.use("reference", dtype)
    if why is None:
        assert kernels.use("pallas", dtype)
    else:
        with pytest.raises(UserError, match=f"kernels=pallas: .*{why}.*use --kernels=auto"):
            kernels.use("pallas", dtype)


def test_a_jax_without_the_lowering_goes_without_the_kernels(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [device()])
    monkeypatch.setattr(kernels, "triton", None)
    assert "no Triton lowering" in kernels.why_not("bfloat16")
    assert not kernels.use("auto", "bfloat16")
    with pytest.raises(UserError, match=r"kernels=pallas: this version of JAX has no.*=auto"):
        kernels.use("pallas", "bfloat16")


def test_on_this_cpu_the_network_uses_none():
    model = GPT(GPTConfig(**SIZES, dtype="bfloat16"))
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    assert "pallas" not in str(jax.make_jaxpr(lambda p: model.apply(p, tokens))(params))


def test_parameters_of_16_bits_have_gradients_of_16_bits():
    model = GPT(GPTConfig(**SIZES, dtype="bfloat16", kernels="pallas"))
    tokens = jnp.zeros((1, 16), jnp.int32)
    params = jax.tree.map(jnp.bfloat16, model.init(jax.random.key(0), tokens)["params"])
    grad = jax.grad(lambda p: model.apply({"params": p}, tokens, tokens, method="loss"))
    assert {x.dtype.name for x in jax.tree.leaves(jax.eval_shape(grad, params))} == {"bfloat16"}


def test_a_gpu_that_goes_without_is_told_why(monkeypatch):
    def said(there, dtype="bfloat16", sizes=(1, 1, 1), **changes):
        monkeypatch.setattr(jax, "devices", lambda: [there])
        devices = np.array([there] * int(np.prod(sizes)), object).reshape(sizes)
        shape = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
        mesh = SimpleNamespace(size=devices.size, shape=shape, devices=devices)
        return reporting.kernels(TrainConfig(**changes), mesh, dtype)

    assert said(device()) == said(device("cpu", "cpu")) == ""
    assert said(device(), "float32", kernels="reference") == ""
    assert "for bfloat16 and float16, not float32" in said(device(), "float32")
    assert "cannot cut them along fsdp" in said(device(), sizes=(2, 2, 1))
    assert said(device(), sizes=(4, 1, 1)) == ""


def test_where_several_devices_share_arrays_there_are_none():
    model = kernels.without(GPT(GPTConfig(**SIZES)))
    assert model.config == GPTConfig(**SIZES, kernels="reference")
    with pytest.raises(UserError, match=r"kernels=pallas is for arrays that are whole.*=auto"):
        kernels.without(GPT(GPTConfig(**SIZES, kernels="pallas")))


def test_an_unknown_kind_of_kernels_is_refused():
    with pytest.raises(UserError, match=r"kernels='triton' is not one of auto\|reference\|pallas"):
        GPTConfig(kernels="triton")


def test_xla_is_told_of_a_gpus_training_step_alone_to_leave_products_apart():
    apart = {"xla_gpu_dot_merger_threshold_mb": 0}
    config = GPTConfig(dtype="bfloat16")
    assert kernels.compiler_options(config) is None
    with mock.patch("gpt_jax.kernels.no_gpu", return_value=False):
        assert kernels.compiler_options(config) is None  # what is here has no kernels
        with mock.patch("gpt_jax.kernels.why_not", return_value=None):
            assert kernels.compiler_options(config) == apart
            plain = GPTConfig(dtype="bfloat16", kernels="reference")
            assert kernels.compiler_options(plain) is None
            eight = GPTConfig(dtype="bfloat16", matmul_dtype="float8")
            its = {"xla_gpu_enable_triton_gemm": False}
            assert kernels.compiler_options(eight) == apart | its
