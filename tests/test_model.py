"""The network: its parameters, what it computes, and the ways to compute it held equal."""

import math
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.extend.core import jaxprs_in_params

from gpt_jax.config import GPTConfig
from gpt_jax.errors import UserError
from gpt_jax.model import GPT, MLP, CausalSelfAttention, count_params, gelu
from gpt_jax.start import crop_block_size

SMALL = GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32, bias=True)
TOKENS = np.random.default_rng(0).integers(0, 64, (4, 16)).astype(np.int32)
TARGETS = np.random.default_rng(1).integers(0, 64, (4, 16)).astype(np.int32)
KEY = jax.random.key(7)


@pytest.fixture(autouse=True, scope="module")
def compiled_in_haste():
    jax.config.update("jax_disable_most_optimizations", True)  # half the time, the same sums
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def shapes_of(config):
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(GPT(config).init, jax.random.key(0), tokens)["params"]


def made_up_params(config, seed=0):
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        norm = path[-2].key.startswith("ln_") and path[-1].key == "weight"
        return np.float32(rng.normal(1.0 if norm else 0.0, 0.1, x.shape))

    return jax.tree_util.tree_map_with_path(leaf, shapes_of(config))


PARAMS = made_up_params(SMALL)


def apply(config, params, tokens=TOKENS, **more):
    return jax.jit(lambda p, t: GPT(config).apply({"params": p}, t, **more))(params, tokens)


LOGITS = jax.jit(lambda params, tokens: GPT(SMALL).apply({"params": params}, tokens))


# --- parameters


# M9, M10, M12 and the table of verified counts
@pytest.mark.parametrize(
    ("sizes", "total", "reported"),
    [
        ((12, 12, 768, 1024, 50304, False), 124_373_760, 123_587_328),
        ((12, 12, 768, 1024, 50257, True), 124_439_808, 123_653_376),
        ((24, 16, 1024, 1024, 50257, True), 354_823_168, 353_774_592),
        ((36, 20, 1280, 1024, 50257, True), 774_030_080, 772_719_360),
        ((6, 6, 384, 256, 65, False), 10_745_088, 10_646_784),
        ((4, 4, 128, 64, 65, False), 804_096, 795_904),
    ],
    ids=["scratch 124M", "gpt2", "gpt2-medium", "gpt2-large", "shakespeare_char", "CPU baby"],
)
def test_parameters_are_as_many_as_nanogpts(sizes, total, reported):
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")
    params = shapes_of(GPTConfig(**dict(zip(names, sizes, strict=True))))
    assert count_params(params, non_embedding=False) == total
    assert count_params(params) == reported


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_have_nanogpts_names_and_layers_are_stacked(bias):
    L, C, H, D, V, T = 2, 32, 2, 16, 64, 16
    expected = {
        "wte/weight": (V, C),
        "wpe/weight": (T, C),
        "h/ln_1/weight": (L, C),
        "h/attn/c_attn/weight": (L, C, 3, H, D),
        "h/attn/c_proj/weight": (L, H, D, C),
        "h/ln_2/weight": (L, C),
        "h/mlp/c_fc/weight": (L, C, 4 * C),
        "h/mlp/c_proj/weight": (L, 4 * C, C),
        "ln_f/weight": (C,),
    }
    if bias:
        expected |= {
            "h/ln_1/bias": (L, C),
            "h/attn/c_attn/bias": (L, 3, H, D),
            "h/attn/c_proj/bias": (L, C),
            "h/ln_2/bias": (L, C),
            "h/mlp/c_fc/bias": (L, 4 * C),
            "h/mlp/c_proj/bias": (L, C),
            "ln_f/bias": (C,),
        }
    leaves = flatten_dict(shapes_of(replace(SMALL, bias=bias)), sep="/")
    assert {name: x.shape for name, x in leaves.items()} == expected
    assert {x.dtype for x in leaves.values()} == {jnp.dtype("float32")}


def test_parameters_are_float32_whatever_the_products_are():
    for dtype in ("bfloat16", "float16"):
        leaves = jax.tree.leaves(shapes_of(replace(SMALL, dtype=dtype)))
        assert {x.dtype for x in leaves} == {jnp.dtype("float32")}


def test_weights_start_as_nanogpts_do():  # M2, M11
    config = replace(SMALL, block_size=64, vocab_size=512, n_layer=8, n_embd=64)
    init = jax.jit(lambda key: GPT(config).init(key, jnp.zeros((1, 1), jnp.int32)))
    leaves = flatten_dict(jax.tree.map(np.asarray, init(KEY)["params"]), sep="/")
    for name, x in leaves.items():
        if name.endswith("bias"):
            assert (x == 0).all(), name
        elif "ln_" in name:
            assert (x == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj/weight") else 0.02
            # 5 standard errors of a normal sample's mean, std and kurtosis
            assert abs(x.mean()) < 5 * std / math.sqrt(x.size), name
            assert abs(x.std() / std - 1) < 5 / math.sqrt(2 * x.size), name
            kurtosis = ((x / x.std()) ** 4).mean()  # 3 unless cut off: at 2 std it would be 2.2
            assert abs(kurtosis - 3) < 5 * math.sqrt(24 / x.size), name
    layers = leaves["h/mlp/c_fc/weight"]
    assert len({layer.tobytes() for layer in layers}) == 8  # each its own draw
    assert len({x.tobytes() for x in np.moveaxis(leaves["h/attn/c_attn/weight"][0], 1, 0)}) == 3


# --- what it computes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logits_and_features_are_float32(dtype):
    model = GPT(replace(SMALL, dtype=dtype))
    logits = jax.eval_shape(model.apply, {"params": PARAMS}, TOKENS)
    assert (logits.shape, logits.dtype) == ((4, 16, 64), jnp.float32)
    features = jax.eval_shape(
        lambda p: model.apply({"params": p}, TOKENS, method="features")[0], PARAMS
    )
    assert (features.shape, features.dtype) == ((4, 16, 32), jnp.float32)


def products_in(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from products_in(inner)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_product_is_made_in_dtype(dtype):
    model = GPT(replace(SMALL, dtype=dtype))
    made = jax.make_jaxpr(model.apply)({"params": PARAMS}, TOKENS)
    products = list(products_in(made.jaxpr))
    # q, k, v, scores, values, c_proj, c_fc, c_proj of a layer, written once; and the logits
    assert len(products) == 9
    assert {str(x.aval.dtype) for product in products for x in product.invars} == {dtype}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close_to_float32(dtype):
    bound = {"bfloat16": 2e-2, "float16": 3e-3}[dtype]
    exact = np.asarray(apply(SMALL, PARAMS))
    near = np.asarray(apply(replace(SMALL, dtype=dtype), PARAMS))
    off = np.linalg.norm(near - exact) / np.linalg.norm(exact)
    assert 1e-5 < off < bound  # the lower bound: it really is half precision


def test_the_residual_stream_stays_float32_with_float16():
    # without blocks' outputs, wte + wpe reach ln_f as they are: 16 bits would round them
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if "c_proj" in str(path) else x, PARAMS
    )
    x = params["wte"]["weight"][TOKENS] + params["wpe"]["weight"][None]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    expected = x * params["ln_f"]["weight"] + params["ln_f"]["bias"]
    features, _ = apply(replace(SMALL, dtype="float16"), params, method="features")
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-5)


def test_too_long_a_sequence_is_refused_with_both_lengths():  # M13
    with pytest.raises(UserError, match="length 17, block size is only 16"):
        GPT(SMALL).apply({"params": PARAMS}, jnp.zeros((1, 17), jnp.int32))


def test_a_later_token_changes_no_earlier_logits():
    for t in (1, 7, 15):
        other = TOKENS.copy()
        other[:, t:] = (other[:, t:] + 1) % 64
        before, after = LOGITS(PARAMS, TOKENS), LOGITS(PARAMS, other)
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert (np.abs(before[:, t] - after[:, t]).max(-1) > 1e-3).all()


def test_numpy_parameters_may_be_constants_of_a_jitted_function():
    # as from_state_dict returns them
    logits = jax.jit(lambda tokens: GPT(SMALL).apply({"params": PARAMS}, tokens))(TOKENS)
    np.testing.assert_allclose(logits, LOGITS(PARAMS, TOKENS), rtol=1e-4, atol=1e-5)


def test_an_earlier_token_changes_later_logits():
    other = TOKENS.copy()
    other[:, 0] = (other[:, 0] + 1) % 64
    change = np.abs(LOGITS(PARAMS, TOKENS) - LOGITS(PARAMS, other)).max(-1)
    assert (change > 1e-5).all()


def test_a_shorter_sequence_gives_the_beginning_of_the_logits():  # M13
    short = LOGITS(PARAMS, TOKENS[:, :5])
    np.testing.assert_allclose(short, LOGITS(PARAMS, TOKENS)[:, :5], rtol=1e-5, atol=1e-5)


def test_next_logits_are_the_logits_at_the_place_asked_for():  # M13, without targets
    last = jnp.array([0, 3, 15, 7])
    ours, cache = apply(SMALL, PARAMS, last=last, method="next_logits")
    assert cache is None
    np.testing.assert_allclose(
        ours, LOGITS(PARAMS, TOKENS)[np.arange(4), last], rtol=1e-5, atol=1e-5
    )


def test_loss_is_the_mean_of_the_targets_counted():  # M13
    targets = TARGETS.copy()
    targets[:, ::3] = -1
    logits = np.float64(LOGITS(PARAMS, TOKENS))
    log_z = np.log(np.exp(logits).sum(-1))
    losses = log_z - np.take_along_axis(logits, TARGETS[..., None], -1)[..., 0]
    ours = apply(SMALL, PARAMS, targets=targets, method="loss")
    np.testing.assert_allclose(ours, losses[targets >= 0].mean(), rtol=1e-5)


def test_exact_gelu_is_x_times_the_normal_distribution():  # M7
    x = np.linspace(-6, 6, 201)
    exact = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x]
    np.testing.assert_allclose(gelu(jnp.float32(x), False), exact, rtol=0, atol=1e-6)


def test_tanh_gelu_is_openais():
    x = np.linspace(-6, 6, 201)
    tanh = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(gelu(jnp.float32(x), True), tanh, rtol=0, atol=1e-6)
    assert np.abs(gelu(jnp.float32(x), True) - gelu(jnp.float32(x), False)).max() > 1e-4


@pytest.mark.parametrize(("activation", "approximate"), [("gelu", False), ("gelu_tanh", True)])
def test_the_activation_is_the_one_configured(activation, approximate):
    config = replace(SMALL, activation=activation)
    x = np.float32(np.random.default_rng(0).normal(0, 2, (1, 4, 32)))
    layer = jax.tree.map(lambda x: x[0] * 3, PARAMS["h"]["mlp"])
    inner = x @ layer["c_fc"]["weight"] + layer["c_fc"]["bias"]
    outer = np.asarray(gelu(jnp.asarray(inner), approximate)) @ layer["c_proj"]["weight"]
    ours = MLP(config).apply({"params": layer}, x, None)
    np.testing.assert_allclose(ours, outer + layer["c_proj"]["bias"], rtol=1e-5, atol=3e-5)


def test_gelu_keeps_half_precision():
    for dtype in (jnp.bfloat16, jnp.float16):
        for approximate in (True, False):
            y = jax.eval_shape(lambda x, a=approximate: gelu(x, a), jnp.ones(3, dtype))
            assert y.dtype == dtype


def test_a_cropped_model_agrees_on_what_still_fits():  # M14
    cropped = crop_block_size(PARAMS, 8)
    assert cropped["wpe"]["weight"].shape == (8, 32)
    assert PARAMS["wpe"]["weight"].shape == (16, 32)  # the old ones are left alone
    ours = apply(replace(SMALL, block_size=8), cropped, TOKENS[:, :8])
    np.testing.assert_allclose(ours, LOGITS(PARAMS, TOKENS)[:, :8], rtol=1e-5, atol=1e-5)
    same = crop_block_size(PARAMS, 16)
    np.testing.assert_array_equal(same["wpe"]["weight"], PARAMS["wpe"]["weight"])


def test_cropping_to_more_than_there_is_is_refused():  # M14
    with pytest.raises(UserError, match="block_size=17 is more than the 16"):
        crop_block_size(PARAMS, 17)


# --- dropout


DROPPING = replace(SMALL, dropout=0.25)


def test_dropout_is_off_unless_asked_for():
    np.testing.assert_array_equal(apply(DROPPING, PARAMS), LOGITS(PARAMS, TOKENS))


def test_dropout_needs_a_key():
    with pytest.raises(Exception, match='needs PRNG for "dropout"'):
        GPT(DROPPING).apply({"params": PARAMS}, TOKENS, deterministic=False)


def test_dropout_follows_from_its_key():
    run = jax.jit(
        lambda key: GPT(DROPPING).apply({"params": PARAMS}, TOKENS, False, rngs={"dropout": key})
    )
    first, again, other = run(KEY), run(KEY), run(jax.random.key(8))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-2
    assert np.abs(first - LOGITS(PARAMS, TOKENS)).max() > 1e-2


def check_drops(values, rate):
    """Of `values`, once all 1, `rate` are now 0 and the others scaled up to keep the mean."""
    values = np.asarray(values)
    kept = 1 / (1 - rate)
    assert np.isclose(values, 0).sum() + np.isclose(values, kept).sum() == values.size
    assert abs((values == 0).mean() - rate) < 5 * math.sqrt(rate * (1 - rate) / values.size)


def test_the_sum_of_the_embeddings_drops():  # M6, site 1
    params = {**jax.tree.map(np.zeros_like, PARAMS), "ln_f": PARAMS["ln_f"]}
    params["wte"]["weight"][:] = params["wpe"]["weight"][:] = 0.5
    seen = []

    def see(call, args, kwargs, context):
        if context.module.name == "ln_f":  # the blocks add nothing
            seen.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(see):
        GPT(DROPPING).apply({"params": params}, TOKENS, False, rngs={"dropout": KEY})
    check_drops(seen[0], 0.25)


def attention_layer(rate, attention=1.0, projection=1.0):
    """Return what one attention layer makes of values of 1, one for each head, T = 1."""
    config = GPTConfig(block_size=1, n_layer=1, n_head=32, n_embd=32, dropout=rate, bias=True)
    params = jax.tree.map(lambda x: np.zeros(x.shape[1:], np.float32), shapes_of(config)["h"])
    params = params["attn"]
    params["c_attn"]["bias"][2] = attention  # v, whatever the input
    params["c_proj"]["weight"][:, 0] = np.eye(32)
    params["c_proj"]["bias"][:] = projection
    x, positions = jnp.zeros((64, 1, 32)), jnp.zeros((1, 1), jnp.int32)
    layer = CausalSelfAttention(config)
    y, _ = layer.apply({"params": params}, x, positions, None, jax.random.split(KEY))
    return y


def test_the_output_of_attention_drops():  # M6, site 3
    check_drops(attention_layer(0.25, attention=0.0), 0.25)


def test_attention_probabilities_drop():  # M6, site 2
    values = np.asarray(attention_layer(0.25, projection=0.0))
    # a value is there if neither site dropped it, and then both have scaled it up
    kept = 1 / 0.75**2
    assert np.isclose(values, 0).sum() + np.isclose(values, kept).sum() == values.size
    share = (values != 0).mean()
    assert abs(share - 0.75**2) < 5 * math.sqrt(share * (1 - share) / values.size)


def test_the_output_of_the_mlp_drops():  # M6, site 4
    params = jax.tree.map(lambda x: 0 * x[0], PARAMS["h"]["mlp"])
    params["c_proj"]["bias"] = np.ones(32, np.float32)
    layer = MLP(DROPPING)
    y = layer.apply({"params": params}, jnp.zeros((8, 16, 32)), KEY)
    check_drops(y, 0.25)


@pytest.mark.parametrize("rolled", [False, True])
def test_each_place_in_each_layer_drops_its_own(rolled):
    params = jax.tree.map(np.zeros_like, PARAMS)
    for part in ("attn", "mlp"):
        params["h"][part]["c_proj"]["bias"][:] = 1
    params["ln_f"]["weight"][:] = 1
    features, _ = apply(
        replace(DROPPING, dropout=0.5, scan_layers=rolled),
        params,
        deterministic=False,
        rngs={"dropout": KEY},
        method="features",
    )
    # four places make 0 to 8 in steps of 2; the same mask twice would leave some out
    levels = [len(np.unique(np.round(row, 3))) for row in np.asarray(features).reshape(-1, 32)]
    assert max(levels) == 5


# --- the same, computed otherwise


def loss_and_gradients(layout):
    model = GPT(replace(DROPPING, bias=False, **layout))

    def loss(params):
        rngs = {"dropout": KEY}
        return model.apply({"params": params}, TOKENS, TARGETS, False, rngs=rngs, method="loss")

    return jax.jit(jax.value_and_grad(loss))(made_up_params(model.config))


@pytest.fixture(scope="module")
def unrolled():
    return loss_and_gradients({})


# without dropout test_parity.py holds rolled layers, and both kinds of remat, equal to nanoGPT
@pytest.mark.parametrize(
    "layout",
    [{"scan_layers": True, "remat": "dots"}, {"scan_layers": True, "remat": "full"}],
    ids=str,
)
def test_neither_rolling_nor_rematerialising_changes_what_drops(unrolled, layout):
    loss, gradients = loss_and_gradients(layout)
    np.testing.assert_allclose(loss, unrolled[0], rtol=1e-6)
    for (path, ours), (_, theirs) in zip(
        jax.tree_util.tree_leaves_with_path(gradients),
        jax.tree_util.tree_leaves_with_path(unrolled[1]),
        strict=True,
    ):
        off = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert off < 1e-5, jax.tree_util.keystr(path)
