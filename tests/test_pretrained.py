"""A model by name: what a run saved, ready to compute."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from gpt_jax import GPT, GPTConfig, checkpoint, load
from gpt_jax.checkpoint import Checkpoints
from gpt_jax.config import TrainConfig
from gpt_jax.errors import DamageError, UserError
from gpt_jax.integrity import amend
from gpt_jax.pretrained import product_dtype
from gpt_jax.sharding import make_mesh
from gpt_jax.tokenizer import char_tokenizer
from gpt_jax.train_step import TrainState

TOKENIZER = char_tokenizer("ab é\n")
MODEL = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=9, bias=False))
LOSSES = {10: 3.0, 20: 1.0, 30: 2.0}


def params_of(step):
    random = np.random.default_rng(step)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.3, x.shape), x.dtype), shapes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(str(folder), len(LOSSES))
    for step, loss in LOSSES.items():
        meta = {
            "iter": step,
            "val_loss": loss,
            "best_val_loss": loss,
            "wandb_id": None,
            "config": vars(TrainConfig()),
            "model": vars(MODEL.config),
            "tokenizer": TOKENIZER.to_json(),
        }
        zero = jnp.zeros(())
        key = jax.random.key(0)
        state = TrainState(params_of(step), (), zero, key, zero, zero, zero, zero)
        checkpoints.save(state, meta)
    checkpoints.close()
    return folder


@pytest.fixture
def run(saved, tmp_path):
    """A copy of its own, to damage."""
    return str(shutil.copytree(saved, tmp_path / "run"))


def damage(out_dir, **changed):
    """Change the newest checkpoint's JSON, and seal it again, as who means harm can."""
    amend(checkpoint.folder(out_dir) / "30" / "meta" / "metadata", changed)


def test_a_run_loads_with_the_logits_it_was_saved_with(run):
    """S1, S3: model, parameters and tokenizer all come from its folder."""
    model, params, tokenizer = load(run)
    tokens = np.arange(8, dtype=np.int32)[None]
    forward = jax.jit(MODEL.apply)({"params": params_of(30)}, tokens)
    np.testing.assert_array_equal(jax.jit(model.apply)({"params": params}, tokens), forward)
    assert tokenizer.decode(tokenizer.encode("é ab\n")) == "é ab\n"
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("step", "number"), [("", 30), ("latest", 30), ("best", 20), ("10", 10), ("30", 30)]
)
def test_the_step_asked_for_is_the_one_loaded(run, step, number):
    params = load(run, step=step)[1]
    jax.tree.map(np.testing.assert_array_equal, params, params_of(number))


def test_ids_beyond_the_tokenizers_are_known_to_be_padding(run):
    """M16: the rows 5 to 8 of the embedding have no text."""
    model, _, tokenizer = load(run)
    assert model.config == replace(MODEL.config, n_tokens=5)
    assert tokenizer.n_tokens == 5


def test_a_run_is_computed_in_the_dtype_asked_for_whatever_it_was_trained_in(run):
    for dtype, expected in {"auto": "float32", "bfloat16": "bfloat16"}.items():
        model, params, _ = load(run, dtype=dtype)
        assert model.config.dtype == expected
        assert params["wte"]["weight"].dtype == jnp.float32
    damage(run, model={**vars(MODEL.config), "dtype": "bfloat16", "attention": "cudnn"})
    assert load(run)[0].config.dtype == "float32"
    assert load(run)[0].config.attention == "auto"  # there may be no cuDNN here


def test_parameters_are_laid_out_as_asked(run):
    one, eight = load(run)[1], load(run, mesh=make_mesh(fsdp=2))[1]
    assert len(one["wte"]["weight"].sharding.device_set) == 1
    assert len(eight["wte"]["weight"].sharding.device_set) == 8
    assert eight["wpe"]["weight"].sharding.spec == PartitionSpec(None, "fsdp")
    jax.tree.map(np.testing.assert_array_equal, one, eight)


@pytest.mark.parametrize("source", ["nothing", "gpt3", "."])
def test_a_folder_that_holds_no_run_is_refused_by_name(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        load(source)
    assert f"no checkpoint in {source}: train first, or name the folder of a run" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokenizer": {"kind": "psychic"}}, "no tokenizer of kind"),
        ({"model": {"n_heads": 2}}, "the checkpoint's model is of another version"),
        ({"model": {**vars(MODEL.config), "n_head": 3}}, "not a multiple of n_head=3"),
        ({"model": {**vars(MODEL.config), "vocab_size": 4}}, "n_tokens=5 is above vocab_size=4"),
        ({"model": {**vars(MODEL.config), "n_embd": "x"}}, "n_embd='x' is a str"),
    ],
)
def test_damaged_metadata_are_refused_in_one_line(run, changed, message):
    """C18, C26."""
    damage(run, **changed)
    with pytest.raises(UserError) as error:
        load(run)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert load(run, step="20")[0].config.n_embd == 16  # the others still load


def flip(run, step):
    """Turn a bit in the middle of the largest file of the parameters."""
    files = (checkpoint.folder(run) / str(step) / "params").rglob("*")
    path = max((file for file in files if file.is_file()), key=lambda file: file.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("arrays", [True, False])
def test_a_damaged_checkpoint_is_named_and_the_next_best_taken(run, capsys, arrays):
    """C17, C18: whether its arrays are not what was saved or its JSON cannot be read."""
    if arrays:
        flip(run, 30)
    else:
        (checkpoint.folder(run) / "30" / "meta" / "metadata").write_text("{")
    params = load(run)[1]
    jax.tree.map(np.testing.assert_array_equal, params, params_of(20))
    said = capsys.readouterr().err
    assert said.startswith("passed over: ")
    assert "checkpoints/30/" in said
    assert said.count("\n") == 1
    with pytest.raises(DamageError, match="checkpoints/30/"):
        load(run, step="30")


def test_where_every_checkpoint_is_damaged_none_is_loaded(run, capsys):
    for step in LOSSES:
        flip(run, step)
    with pytest.raises(DamageError, match="checkpoints/10/params is damaged"):
        load(run)
    assert capsys.readouterr().err.count("passed over: ") == 2


@pytest.mark.parametrize(
    "claim",
    [
        {"n_embd": 2**30, "n_head": 1},
        {"n_layer": 2**31 - 1},
        {"n_layer": 2},
        {"block_size": 4},
        {"bias": True},
    ],
    ids=str,
)
def test_a_model_that_claims_other_sizes_than_are_stored_is_refused_before_allocation(run, claim):
    """C19, C26: 4e18 bytes would be asked for if the first claim were believed."""
    damage(run, model={**vars(MODEL.config), **claim})
    said = "is damaged: it has .*, and its JSON says|holds other arrays than its JSON says"
    with pytest.raises(UserError, match=f"30/params ({said})"):
        load(run, step="30")


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ({"platform": "cpu"}, "float32"),
        ({"platform": "tpu"}, "bfloat16"),
        ({"platform": "gpu", "compute_capability": "9.0"}, "bfloat16"),
        ({"platform": "gpu", "compute_capability": "8.0"}, "bfloat16"),
        ({"platform": "gpu", "compute_capability": "10.0"}, "bfloat16"),
        ({"platform": "gpu", "compute_capability": "7.5"}, "float16"),
        ({"platform": "gpu", "compute_capability": "gfx90a"}, "bfloat16"),
        ({"platform": "gpu"}, "bfloat16"),
    ],
)
def test_auto_is_the_dtype_that_the_hardware_is_fast_in(monkeypatch, device, expected):
    """nanoGPT: bfloat16 where the GPU has it, else float16; float32 on a CPU (T4)."""
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(**device)])
    assert product_dtype("auto") == expected
    for named in ("float32", "bfloat16", "float16"):
        assert product_dtype(named) == named
