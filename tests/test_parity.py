"""The same numbers as nanoGPT: arrays it wrote while running in float32 stand in for it.

tests/reference/nanogpt_{bias,nobias}.npz hold, under nanoGPT's state_dict names: `param/`, `grad/`
and `logits` of the first micro-batch, and the 20 updates `train/` with the parameters after them,
`final/`. The LayerNorms are perturbed, so that a swapped or ignored one shows.
"""

import ast
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import GPTConfig, TrainConfig
from gpt_jax.errors import UserError
from gpt_jax.interop.nanogpt import from_state_dict, shapes, to_state_dict
from gpt_jax.model import GPT
from gpt_jax.optimizer import learning_rate, make_optimizer
from gpt_jax.train_step import init_state, make_train_step

REFERENCE = Path(__file__).parent / "reference"
FIXTURES = ["bias", "nobias"]
# every way to run the same network, but the first for all tests
LAYOUTS = [
    {"scan_layers": scan, "remat": remat}
    for scan in (False, True)
    for remat in ("none", "dots", "full")
]
EVERY_LAYOUT = pytest.mark.parametrize(
    "layout", LAYOUTS, ids=lambda x: f"{'rolled' if x['scan_layers'] else 'unrolled'}-{x['remat']}"
)
EVERY_FIXTURE = pytest.mark.parametrize("name", FIXTURES)


@cache
def fixture(name):
    with np.load(REFERENCE / f"nanogpt_{name}.npz") as arrays:
        return dict(arrays)


def settings(name, kind):
    values = ast.literal_eval(str(fixture(name)["config"]))
    return kind(**{key: x for key, x in values.items() if key in kind.__dataclass_fields__})


def under(name, prefix):
    return {k.removeprefix(prefix): x for k, x in fixture(name).items() if k.startswith(prefix)}


def model_and_params(name, **layout):
    config = settings(name, GPTConfig)
    config = GPTConfig(**{**vars(config), **layout})
    return GPT(config), from_state_dict(under(name, "param/"), config)


def relative(ours, theirs):
    difference = np.linalg.norm(np.float64(ours) - np.float64(theirs))
    return difference / np.linalg.norm(np.float64(theirs))


@EVERY_FIXTURE
def test_logits_are_nanogpts(name):  # C1; M2-M5, M7-M10
    model, params = model_and_params(name)
    logits = jax.jit(model.apply)({"params": params}, fixture(name)["tokens"][0, 0])
    assert np.abs(logits - fixture(name)["logits"]).max() <= 1e-5


@EVERY_LAYOUT
@EVERY_FIXTURE
def test_loss_and_every_gradient_are_nanogpts(name, layout):  # C2; M13
    model, params = model_and_params(name, **layout)
    tokens, targets = fixture(name)["tokens"][0, 0], fixture(name)["targets"][0, 0]

    def loss(params):
        return model.apply({"params": params}, tokens, targets, method="loss")

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert abs(float(value) / float(fixture(name)["loss"]) - 1) <= 1e-6
    ours, theirs = to_state_dict(grads), under(name, "grad/")
    assert set(ours) - {"lm_head.weight"} == set(theirs)
    far = {key: relative(ours[key], theirs[key]) for key in theirs}
    assert {key: x for key, x in far.items() if not x <= 1e-5} == {}


@pytest.mark.parametrize(
    ("name", "layout"),
    [("bias", LAYOUTS[0]), ("nobias", LAYOUTS[0]), *[("bias", x) for x in LAYOUTS[1:]]],
    ids=str,
)
def test_twenty_updates_are_nanogpts(name, layout):  # C3; M17, T14, T20
    model, params = model_and_params(name, **layout)
    arrays = fixture(name)
    tx = make_optimizer(settings(name, TrainConfig))
    step = make_train_step(model, tx)
    state = init_state(jax.tree.map(jnp.asarray, params), tx)
    losses, norms = [], []
    for tokens, targets in zip(arrays["tokens"], arrays["targets"], strict=True):
        state, metrics = step(state, tokens, targets)
        losses.append(metrics["loss"])
        norms.append(metrics["grad_norm"])
    assert len(losses) == 20
    np.testing.assert_allclose(np.array(losses), arrays["train/losses"], rtol=1e-5, atol=0)
    np.testing.assert_allclose(np.array(norms), arrays["train/grad_norms"], rtol=1e-5, atol=0)
    ours = to_state_dict(state.params)
    far = {key: np.abs(ours[key] - x).max() for key, x in under(name, "final/").items()}
    print(max(far.values()), max(far, key=far.get))
    assert {key: x for key, x in far.items() if not x <= 2e-5} == {}


@EVERY_FIXTURE
def test_learning_rates_are_nanogpts(name):  # T14
    config = settings(name, TrainConfig)
    ours = [learning_rate(config, step) for step in range(20)]
    np.testing.assert_allclose(ours, fixture(name)["train/lrs"], rtol=1e-12, atol=0)
