"""Products in 8 bits against those in float32, and where there are none."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from gpt_jax import load
from gpt_jax.config import GPTConfig, TrainConfig
from gpt_jax.errors import UserError
from gpt_jax.kernels import float8
from gpt_jax.model import GPT, products
from gpt_jax.optimizer import make_optimizer
from gpt_jax.prepare import prepare
from gpt_jax.sharding import batch_sharding, make_mesh, state_sharding
from gpt_jax.train_step import init_state, make_train_step

M, K, N = 192, 128, 160
UNSEEN = 8  # a row that is no multiple of INPUT.stride and GRADIENT.stride


def operands(parts=1, sizes=(1.0, 0.02, 1e-3)):
    """x, weight and the gradient of each product, normal with these deviations, in bfloat16."""
    keys = jax.random.split(jax.random.key(0), 2 + parts)
    shapes = [(M, K), (K, parts, N)] + parts * [(M, N)]
    scales = [*sizes[:2], *parts * [sizes[2]]]
    arrays = [
        (jax.random.normal(key, shape) * scale).astype(jnp.bfloat16)
        for key, shape, scale in zip(keys, shapes, scales, strict=True)
    ]
    return arrays[0], arrays[1], arrays[2:]


@jax.jit
def all_three(x, weight, dys):
    ys, gradients = jax.vjp(float8.products, x, weight)
    return jnp.stack(ys), *gradients(dys)


def exact(x, weight, dys):
    """The same in float32, by the products of the model."""
    x, weight, dys = jax.tree.map(lambda a: a.astype(jnp.float32), (x, weight, dys))
    ys, gradients = jax.vjp(lambda x, w: products([x], w), x, weight)
    return jnp.stack(ys), *gradients(dys)


def error(found, expected):
    found, expected = (np.asarray(a, np.float64) for a in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("parts", [1, 3])
def test_products_and_gradients_differ_by_the_rounding_of_operands_alone(parts):
    """Measured: 3.8 % of two roundings to e4m3, 5.9 % of one to e4m3 and one to e5m2."""
    found, expected = all_three(*operands(parts)), exact(*operands(parts))
    assert [a.dtype for a in found] == 3 * [jnp.bfloat16]
    assert [a.shape for a in found] == [a.shape for a in expected]
    bounds = (0.042, 0.064, 0.064)
    for name, a, b, bound in zip(("y", "dx", "dw"), found, expected, bounds, strict=True):
        assert 0.5 * bound < error(a, b) < bound, name


@pytest.mark.parametrize("powers", [(0, 0, -40), (-60, 5, 20), (66, -66, 0), (0, 0, 60)], ids=str)
def test_a_power_of_two_comes_out_as_it_went_in_however_large_or_small(powers):
    a, b, c = (2.0**power for power in powers)
    x, weight, dys = operands()
    y, dx, dw = all_three(x, weight, dys)
    scaled = all_three(x * a, weight * b, [dy * c for dy in dys])
    for found, expected in zip(scaled, (y * a * b, dx * b * c, dw * a * c), strict=True):
        np.testing.assert_array_equal(found, expected)
        assert np.abs(np.asarray(found, np.float32)).max() > 0


@pytest.mark.parametrize("how", [float8.WEIGHT, float8.INPUT, float8.GRADIENT], ids=str)
def test_the_largest_seen_comes_to_lie_below_a_power_of_two_times_a_power_of_two(how):
    x = operands()[0] * 0.37
    x8 = float8.scaled([x], how)
    assert jnp.frexp(x8.unit)[0] == 0.5
    assert x8.rows.dtype == how.dtype
    np.testing.assert_array_equal(x8.columns, x8.rows.T)
    largest = jnp.abs(x8.rows.astype(jnp.float32)[:: how.stride]).max()
    assert 2.0 ** (how.top - 1) <= largest <= 2.0**how.top
    np.testing.assert_allclose(x8.rows.astype(jnp.float32) * x8.unit, x, rtol=0.13, atol=0.01)


def test_zeros_give_zeros():
    zeros = jax.tree.map(jnp.zeros_like, operands())
    for found in (*all_three(*zeros), *all_three(*operands()[:2], zeros[2])[1:]):
        assert not np.asarray(found, np.float32).any()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan], ids=str)
@pytest.mark.parametrize("row", [0, UNSEEN], ids=["seen", "unseen"])
def test_what_is_not_finite_makes_what_is_not_finite(bad, row):
    """So that the update is left out."""
    x, weight, dys = operands()
    y, _, dw = all_three(x.at[row, 5].set(bad), weight, dys)
    assert not np.isfinite(np.asarray(y, np.float32)[0, row]).any()
    assert not np.isfinite(np.asarray(dw, np.float32)[5]).any()
    y, dx, _ = all_three(x, weight.at[row, 0, 5].set(bad), dys)
    assert not np.isfinite(np.asarray(y, np.float32)[0, :, 5]).any()
    assert not np.isfinite(np.asarray(dx, np.float32)[:, row]).any()
    _, dx, dw = all_three(x, weight, [dys[0].at[row, 5].set(bad)])
    assert not np.isfinite(np.asarray(dx, np.float32)[row]).any()
    assert not np.isfinite(np.asarray(dw, np.float32)[:, 0, 5]).any()


def test_what_no_one_looked_at_may_be_several_times_larger_and_is_cut_beyond():
    x, weight, dys = operands()
    large, huge = (x.at[UNSEEN].multiply(times) for times in (6, 1000))
    assert error(all_three(large, weight, dys)[0], exact(large, weight, dys)[0]) < 0.042
    y, _, dw = all_three(huge, weight, dys)
    assert np.isfinite(np.asarray(y, np.float32)).all()
    assert np.isfinite(np.asarray(dw, np.float32)).all()
    assert error(y[:, :UNSEEN], exact(huge, weight, dys)[0][:, :UNSEEN]) < 0.042
    large = [dys[0].at[UNSEEN].multiply(200)]
    assert error(all_three(x, weight, large)[1], exact(x, weight, large)[1]) < 0.064


NETWORK = GPTConfig(
    n_layer=2, n_head=4, n_embd=64, block_size=32, vocab_size=160, dtype="bfloat16"
)  # fmt: skip


def network(**changes):
    config = replace(NETWORK, **changes)
    tokens = jax.random.randint(jax.random.key(1), (8, 32), 0, 160)
    params = GPT(config).init(jax.random.key(0), tokens[:1, :1])["params"]
    return GPT(config), params, tokens


def loss_and_gradient(**changes):
    model, params, tokens = network(**changes)

    def loss(params):
        return model.apply({"params": params}, tokens, jnp.roll(tokens, -1, 1), method="loss")

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize(
    "changes", [{}, {"bias": False}, {"scan_layers": True, "remat": "dots"}], ids=str
)
def test_a_networks_loss_and_gradient_stay_close_to_bfloat16s(changes):
    loss, gradient = loss_and_gradient(**changes)
    loss8, gradient8 = loss_and_gradient(matmul_dtype="float8", **changes)
    assert abs(loss8 - loss) < 2e-3
    assert loss8 != loss
    weights, weights8 = (jnp.concatenate([g[name]["weight"].ravel() for name in ("wte", "wpe")]
                         + [x.ravel() for x in jax.tree.leaves(g["h"])])
                         for g in (gradient, gradient8))  # fmt: skip
    cosine = weights @ weights8 / jnp.linalg.norm(weights) / jnp.linalg.norm(weights8)
    assert cosine > 0.99
    assert abs(jnp.linalg.norm(weights8) / jnp.linalg.norm(weights) - 1) < 0.02


def test_parameters_start_the_same():
    _, params, _ = network()
    _, params8, _ = network(matmul_dtype="float8")
    jax.tree.map(np.testing.assert_array_equal, params, params8)


@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 2)], ids=str)
def test_twenty_updates_bring_the_loss_down_on_any_mesh(sizes):
    model, params, tokens = network(matmul_dtype="float8", n_layer=1)
    config = TrainConfig(learning_rate=3e-3, warmup_iters=0, decay_lr=False)
    mesh = make_mesh("auto", *sizes, devices=jax.devices()[: int(np.prod(sizes))])
    state = init_state(params, tx := make_optimizer(config))
    state = jax.device_put(state, state_sharding(mesh, state))
    step = make_train_step(model, tx, mesh)
    batch = [
        jax.device_put(a[None], batch_sharding(mesh, 3)) for a in (tokens, jnp.roll(tokens, -1, 1))
    ]
    losses = [float(step_metrics["loss"]) for state, step_metrics in updates(step, state, batch)]
    assert losses[0] == pytest.approx(float(loss_and_gradient(n_layer=1)[0]), abs=2e-3)
    assert losses[-1] < 0.75 * losses[0]


def updates(step, state, batch, n=20):
    for _ in range(n):
        state, metrics = step(state, *batch)
        yield state, metrics


def test_a_run_trains_in_8_bits_and_its_network_writes_in_the_dtype_of_the_rest(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("to be, or not to be, that is the question.\n" * 400, "utf-8")
    prepare("text", Path("data/text"), input=Path("text.txt"), tokenizer="char", log=lambda _: None)
    flags = [
        "train_shakespeare_char", "--dataset=text", "--n_layer=1", "--n_head=2", "--n_embd=32",
        "--block_size=16", "--batch_size=8", "--max_iters=4", "--eval_iters=1", "--out_dir=out",
        "--eval_interval=4", "--dtype=bfloat16", "--matmul_dtype=float8", "--sample_tokens=5",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    assert train.main() == 0
    assert "a sample" in capsys.readouterr().out
    assert load("out")[0].config.matmul_dtype == "auto"


def test_a_run_that_goes_on_goes_on_in_8_bits_or_in_the_dtype_that_it_now_asks_for():
    for matmul_dtype in ("float8", "auto"):
        continued = TrainConfig(matmul_dtype=matmul_dtype).continued(GPTConfig())
        assert continued.matmul_dtype == matmul_dtype


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, w: (x.astype(jnp.float16), w), "goes with bfloat16, not float16"),
        (lambda x, w: (x[:-1], w), "batch_size * block_size=191: choose"),
        (lambda x, w: (x[:, 1:], w[1:]), "inputs=127: choose"),
        (lambda x, w: (x, w[:, :, 1:]), "outputs=159: choose"),
    ],
)
def test_what_cannot_be_multiplied_in_8_bits_is_refused(change, words):
    with pytest.raises(UserError) as refusal:
        float8.products(*change(*operands()[:2]))
    assert words in str(refusal.value)
    assert "leave --matmul_dtype=auto" in str(refusal.value)


@pytest.mark.parametrize(
    ("backend", "device", "fine"),
    [
        ("gpu", {"device_kind": "NVIDIA H200", "compute_capability": "9.0"}, True),
        ("gpu", {"device_kind": "NVIDIA L4", "compute_capability": "8.9"}, True),
        ("gpu", {"device_kind": "NVIDIA B200", "compute_capability": "10.0"}, True),
        ("gpu", {"device_kind": "NVIDIA A100", "compute_capability": "8.0"}, False),
        ("gpu", {"device_kind": "AMD MI210", "compute_capability": "gfx90a"}, False),
        ("tpu", {"device_kind": "TPU v5 lite"}, False),
    ],
)
def test_hardware_without_8_bits_is_refused(backend, device, fine, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(**device)])
    if fine:
        float8.check(*operands()[:2])
    else:
        with pytest.raises(UserError, match=rf"8.9 or more, not {device['device_kind']}: leave"):
            float8.check(*operands()[:2])


PROGRAM = """
import re, sys
from gpt_jax.runtime import use_platform
use_platform("cpu")
import jax, jax.numpy as jnp
from dataclasses import replace
from gpt_jax.config import TrainConfig
from gpt_jax.model import GPT
from gpt_jax.optimizer import make_optimizer
from gpt_jax.plan.program import state_shapes
from gpt_jax.plan.topology import as_if_there, attention_for, describe_topology
from gpt_jax.sharding import batch_sharding, make_mesh
from gpt_jax.train_step import make_train_step

target = describe_topology("h200:1")
mesh = make_mesh("auto", devices=target.devices)
config = TrainConfig(n_layer=2, n_head=16, n_embd=1024, matmul_dtype="float8", bias=True)
model = config.model_config(4096, "bfloat16")
model = replace(model, attention=attention_for(target, model))
batch = jax.ShapeDtypeStruct((1, 16, 1024), jnp.int32, sharding=batch_sharding(mesh, 3))
step = make_train_step(GPT(model), make_optimizer(config), mesh)
with as_if_there(target):
    traced = step.trace(state_shapes(config, model, mesh), batch, batch)
    text = traced.lower(lowering_platforms=("cuda",)).compile().as_text()
kinds = re.findall(r'custom_call_target="__cublas\\$lt\\$matmul(\\$f8)?"', text)
print(kinds.count("$f8"), kinds.count(""), text.count("triton_nested_gemm"))
f8 = r"f8\\w+\\[(\\d+),(\\d+)\\]\\S*"
both = re.findall(rf"= \\({f8}, {f8}\\) fusion", text)
print(sum("16384" in sizes for sizes in both))
"""


def test_a_step_for_a_gpu_has_14_products_in_8_bits_a_layer_and_three_of_the_head():
    """q, k, v, two projections and the MLP's, 6, and the gradients of 4 inputs and 4 weights.

    An operand and its transpose are written in one pass, but for q, k and v's gradients.
    """
    if not any("cuda" in plugin.name for plugin in entry_points(group="jax_plugins")):
        pytest.skip("JAX's CUDA plugin is not installed")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    products, passes = done.stdout.strip().splitlines()[-2:]
    assert products == f"{2 * 14} 3 0"
    assert passes == str(2 * (4 + 3))
