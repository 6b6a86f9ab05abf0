"""The same numbers as nanoGPT: arrays it wrote while running in float32 stand in for it.

tests/reference/nanogpt_{bias,nobias}.npz hold, under nanoGPT's state_dict names: `param/`, `grad/`
and `logits` of the first micro-batch, and the 20 updates `train/` with the parameters after them,
`final/`. The LayerNorms are perturbed, so that a swapped or ignored one shows.
"""

import ast
from dataclasses import replace
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
EVERY_FIXTURE = pytest.mark.parametrize("name", FIXTURES)


@pytest.fixture(autouse=True, scope="module")
def compiled_in_haste():
    jax.config.update("jax_disable_most_optimizations", True)  # half the time, the same sums
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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
    config = replace(settings(name, GPTConfig), **layout)
    return GPT(config), from_state_dict(under(name, "param/"), config)


def relative(ours, theirs):
    difference = np.linalg.norm(np.float64(ours) - np.float64(theirs))
    return difference / np.linalg.norm(np.float64(theirs))


@EVERY_FIXTURE
def test_logits_are_nanogpts(name):  # C1; M2-M5, M7-M10
    model, params = model_and_params(name)
    logits = jax.jit(model.apply)({"params": params}, fixture(name)["tokens"][0, 0])
    assert np.abs(logits - fixture(name)["logits"]).max() <= 1e-5


# test_model.py holds layers rolled and rematerialised at once equal to these
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("nobias", {}),
        ("bias", {}),
        ("bias", {"scan_layers": True}),
        ("bias", {"remat": "dots"}),
        ("bias", {"remat": "full"}),
    ],
    ids=str,
)
def test_loss_and_every_gradient_are_nanogpts(name, layout):  # C2; M6-M8, M13
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


@EVERY_FIXTURE
def test_twenty_updates_are_nanogpts(name):  # C3; M17, T14, T20
    model, params = model_and_params(name)
    theirs = fixture(name)
    tx = make_optimizer(settings(name, TrainConfig))
    step = make_train_step(model, tx)
    state = init_state(jax.tree.map(jnp.asarray, params), tx)
    losses, norms = [], []
    for tokens, targets in zip(theirs["tokens"], theirs["targets"], strict=True):
        state, metrics = step(state, tokens, targets)
        losses.append(metrics["loss"])
        norms.append(metrics["grad_norm"])
    assert len(losses) == 20
    np.testing.assert_allclose(np.array(losses), theirs["train/losses"], rtol=1e-5, atol=0)
    np.testing.assert_allclose(np.array(norms), theirs["train/grad_norms"], rtol=1e-5, atol=0)
    ours = to_state_dict(state.params)
    far = {key: np.abs(ours[key] - x).max() for key, x in under(name, "final/").items()}
    assert {key: x for key, x in far.items() if not x <= 2e-5} == {}


@EVERY_FIXTURE
def test_learning_rates_are_nanogpts(name):  # T14
    config = settings(name, TrainConfig)
    ours = [learning_rate(config, step) for step in range(20)]
    np.testing.assert_allclose(ours, fixture(name)["train/lrs"], rtol=1e-12, atol=0)


@EVERY_FIXTURE
def test_a_state_dict_survives_the_way_there_and_back(name):
    arrays = under(name, "param/")
    back = to_state_dict(model_and_params(name)[1])
    tied = arrays["transformer.wte.weight"]
    assert list(back) == [*arrays, "lm_head.weight"]  # nanoGPT's order too
    for key, x in {**arrays, "lm_head.weight": tied}.items():
        assert back[key].dtype == x.dtype
        assert back[key].shape == x.shape
        assert back[key].tobytes() == x.tobytes()


@EVERY_FIXTURE
def test_parameters_survive_the_way_there_and_back(name):
    model, params = model_and_params(name)
    again = from_state_dict(to_state_dict(params), model.config)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))


def test_a_state_dict_keeps_its_dtype():
    arrays = {key: x.astype(np.float16) for key, x in under("bias", "param/").items()}
    params = from_state_dict(arrays, settings("bias", GPTConfig))
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float16)}


@EVERY_FIXTURE
def test_the_imported_tree_is_the_one_the_model_makes(name):
    model, params = model_and_params(name)
    made = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, made)


def test_names_are_as_many_as_nanogpts():
    tied = ["lm_head.weight"]
    assert len([*shapes(GPTConfig(bias=False)), *tied]) == 76
    assert len([*shapes(GPTConfig(bias=True)), *tied]) == 149


def test_torch_compiles_prefix_is_taken_off():  # T8, S1
    _, params = model_and_params("bias")
    arrays = {f"_orig_mod.{key}": x for key, x in to_state_dict(params).items()}
    again = from_state_dict(arrays, settings("bias", GPTConfig))
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))


@pytest.mark.parametrize("key", ["transformer.wpe.weight", "transformer.h.1.attn.c_proj.bias"])
def test_a_missing_name_is_named(key):
    arrays = under("bias", "param/")
    del arrays[key]
    with pytest.raises(UserError, match=rf"has no '{key}'"):
        from_state_dict(arrays, settings("bias", GPTConfig))


@pytest.mark.parametrize("key", ["transformer.h.2.ln_1.weight", "transformer.h.0.attn.bias"])
def test_an_unexpected_name_is_named(key):
    arrays = {**under("bias", "param/"), key: np.ones(32, np.float32)}
    with pytest.raises(UserError, match=rf"has '{key}', which this model config does not"):
        from_state_dict(arrays, settings("bias", GPTConfig))


def test_biases_are_refused_where_the_config_has_none():
    config = replace(settings("bias", GPTConfig), bias=False)
    with pytest.raises(UserError, match=r"has 'transformer\.h\.0\.ln_1\.bias'"):
        from_state_dict(under("bias", "param/"), config)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("transformer.wpe.weight", (8, 32)),
        ("transformer.h.0.mlp.c_fc.weight", (32, 128)),  # as Hugging Face holds it
        ("transformer.h.1.attn.c_attn.bias", (3, 32)),
    ],
)
def test_another_shape_is_named_with_both_shapes(key, shape):
    arrays = under("bias", "param/")
    expected = arrays[key].shape
    arrays[key] = np.ones(shape, np.float32)
    with pytest.raises(UserError) as error:
        from_state_dict(arrays, settings("bias", GPTConfig))
    for part in (repr(key), str(shape), str(expected)):
        assert part in str(error.value)


def test_an_untied_lm_head_is_refused():  # M10
    arrays = to_state_dict(model_and_params("bias")[1])
    arrays["lm_head.weight"] = arrays["lm_head.weight"] + 1
    with pytest.raises(UserError, match=r"'lm_head\.weight' differs.*must be tied"):
        from_state_dict(arrays, settings("bias", GPTConfig))
