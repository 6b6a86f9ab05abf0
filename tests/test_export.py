"""What a run is exported as: read again it is the same, and it is there whole or not at all."""

import errno
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt_jax import GPT, GPTConfig, checkpoint, export, load
from gpt_jax.checkpoint import Checkpoints
from gpt_jax.config import TrainConfig
from gpt_jax.export import hugging_face
from gpt_jax.integrity import amend
from gpt_jax.interop import gpt2, safetensors_file
from gpt_jax.optimizer import make_optimizer
from gpt_jax.sharding import make_mesh
from gpt_jax.tokenizer import byte_tokenizer, char_tokenizer, from_json
from gpt_jax.train_step import init_state

REFERENCE = Path(__file__).parent / "reference" / "hugging_face"
TOKENIZER = char_tokenizer("ab é\n")
PADDED = 9
ONE = make_mesh(devices=jax.local_devices()[:1])
MODELS = {
    "plain": GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=PADDED, bias=False),
    "biases": GPTConfig(
        n_layer=1, n_head=4, n_embd=8, block_size=8, vocab_size=PADDED, bias=True, dropout=0.25,
        activation="gelu_tanh", dtype="bfloat16",
    ),
}  # fmt: skip
STEPS = {10: 2.0, 20: 1.0}


def state_of(config, step):
    """A state in which no array is of one value."""
    random = np.random.default_rng(step)
    params = GPT(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    state = init_state(params, make_optimizer(TrainConfig()))

    def noise(x):
        return jnp.asarray(random.normal(0, 0.3, x.shape), x.dtype) if x.ndim > 1 else x

    return state.replace(params=jax.tree.map(noise, params),
                         opt_state=jax.tree.map(noise, state.opt_state))  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a run of each model."""
    folder = tmp_path_factory.mktemp("runs")
    for name, config in MODELS.items():
        checkpoints = Checkpoints(str(folder / name), len(STEPS))
        for step, loss in STEPS.items():
            checkpoints.save(state_of(config, step), {
                "iter": step, "val_loss": loss, "best_val_loss": loss, "wandb_id": None,
                "config": vars(TrainConfig()), "model": vars(config),
                "tokenizer": TOKENIZER.to_json(),
            })  # fmt: skip
        checkpoints.close()
    return folder


@pytest.fixture
def work(saved, tmp_path, monkeypatch):
    """A copy of it, to damage, as the working directory."""
    folder = shutil.copytree(saved, tmp_path / "work")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(export, "use_platform", lambda _: None)  # for a process of its own
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command; return its exit code and the lines of its stdout and stderr."""

    def command(*argv):
        monkeypatch.setattr(sys, "argv", ["export", *argv])
        capsys.readouterr()
        code = export.main()
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return command


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def equal(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(
        jax.tree.map(np.array_equal, a, b)
    )


def with_biases(params, config):
    """The parameters with biases of 0 where they have none, and without the padding's rows."""
    shapes = jax.eval_shape(
        GPT(replace(config, bias=True)).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    )["params"]
    flat = dict(jax.tree_util.tree_leaves_with_path(params))
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: flat.get(path, np.zeros(x.shape, x.dtype)), shapes
    )
    return {**params, "wte": {"weight": params["wte"]["weight"][: TOKENIZER.n_tokens]}}


# ---- transformers' folder


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_for_transformers_is_the_same_network_read_again(work, run, name):
    code, out, _ = run(f"--out_dir={name}", "folder")
    assert code == 0
    config, params = MODELS[name], state_of(MODELS[name], 20).params
    model, again = gpt2.load_network(Path("folder"), "float32", ONE)
    assert equal(again, with_biases(params, config))
    assert model.config == GPTConfig(
        n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, block_size=8,
        vocab_size=5, bias=True, activation=config.activation,
    )  # fmt: skip
    tokens = np.arange(5, dtype=np.int32)[None]
    logits = jax.jit(GPT(replace(config, dtype="float32")).apply)({"params": params}, tokens)
    ours = jax.jit(model.apply)({"params": again}, tokens)
    np.testing.assert_allclose(ours, logits[..., :5], rtol=0, atol=1e-5)
    assert out[0].startswith(f"folder: {name}, iteration 20, ")
    assert out[1].startswith("  4 rows of the embedding are padding and left out")
    assert any("no biases" in line for line in out) == (not config.bias)


def test_its_config_says_what_transformers_must_know(work, run):
    assert run("--out_dir=biases", "--dtype=bfloat16", "folder")[0] == 0
    config = json.loads(Path("folder/config.json").read_text())
    known = json.loads((REFERENCE / "tanh" / "config.json").read_text())  # transformers' own
    expected = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 5,
        "activation_function": "gelu_new", "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 4,
        "n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "bos_token_id": None, "eos_token_id": None,
        "attn_pdrop": 0.25, "embd_pdrop": 0.25, "resid_pdrop": 0.25,
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False, "add_cross_attention": False,
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected
    assert config.keys() - known.keys() == {"n_ctx", "torch_dtype"}


def test_the_activation_is_said_truthfully(work, run):
    for name, said in (("plain", "gelu"), ("biases", "gelu_new")):
        run(f"--out_dir={name}", f"folder-{name}")
        config = json.loads(Path(f"folder-{name}/config.json").read_text())
        assert config["activation_function"] == said


def test_the_end_of_text_is_told():
    config = hugging_face.config_json(MODELS["plain"], byte_tokenizer(), "float32", 9)
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 0)


def test_padding_is_kept_where_it_is_asked_for(work, run):
    code, out, _ = run("--out_dir=biases", "--keep_padding=True", "folder")
    assert (code, len([line for line in out if "padding" in line])) == (0, 0)
    _, params = gpt2.load_network(Path("folder"), "float32", ONE)
    assert equal(params, state_of(MODELS["biases"], 20).params)
    assert json.loads(Path("folder/config.json").read_text())["vocab_size"] == PADDED


@pytest.mark.parametrize("name", sorted(path.name for path in REFERENCE.iterdir()))
def test_from_hugging_face_and_back_every_bit_is_the_same(tmp_path, name):
    """Also in float16 and bfloat16, of which float32 holds every value; no name more or less."""
    folder = REFERENCE / name
    model, params = gpt2.load_network(folder, "float32", ONE)
    dtype = json.loads((folder / "config.json").read_text())["dtype"]
    tokenizer = replace(byte_tokenizer(), n_tokens=model.config.vocab_size)
    hugging_face.write(tmp_path / "x", model.config, params, tokenizer, dtype, keep_padding=False)
    theirs, ours = gpt2.read_tensors(folder), gpt2.read_tensors(tmp_path / "x")
    assert theirs.keys() == ours.keys()
    for key, x in theirs.items():
        assert (x.dtype, x.shape, x.tobytes()) == (ours[key].dtype, ours[key].shape,
                                                   ours[key].tobytes())  # fmt: skip
    known = json.loads((folder / "config.json").read_text())
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    sizes = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "n_inner", "model_type")
    assert {key: known[key] for key in sizes} == {key: config[key] for key in sizes}


def test_pytorchs_format_is_named_as_transformers_before_5_insists(work, run):
    run("--out_dir=plain", "folder")
    data = Path("folder/model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert json.loads(data[8 : 8 + length])["__metadata__"] == {"format": "pt"}


def test_any_model_that_can_be_loaded_is_exported(work, run, monkeypatch):
    """From one of Hugging Face's to our form, say."""
    monkeypatch.setattr(gpt2, "read_tokenizer", lambda folder, config: byte_tokenizer())
    monkeypatch.setattr(gpt2, "replace", lambda config, n_tokens: config)
    source = REFERENCE / "tanh"
    assert run(f"--init_from={source}", "--to=safetensors", "x.safetensors")[0] == 0
    _, params = gpt2.load_network(source, "float32", ONE)
    found = safetensors_file.open_tensors(Path("x.safetensors"))
    np.testing.assert_array_equal(
        found["h.attn.c_proj.bias"], params["h"]["attn"]["c_proj"]["bias"]
    )


# ---- our own form


def test_a_file_of_our_own_names_holds_the_parameters_and_what_they_are(work, run):
    assert run("--out_dir=plain", "--to=safetensors", "x.safetensors")[0] == 0
    found = safetensors_file.open_tensors(Path("x.safetensors"))
    params = state_of(MODELS["plain"], 20).params
    leaves = jax.tree_util.tree_leaves_with_path(params)
    expected = {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in leaves}
    assert "h.attn.c_attn.weight" in expected
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x)
    data = Path("x.safetensors").read_bytes()
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    assert GPTConfig(**json.loads(metadata["config"])) == replace(MODELS["plain"], n_tokens=5)
    assert from_json(json.loads(metadata["tokenizer"])).decode([0, 3]) == "aé"
    assert metadata["format"] == "gpt_jax"


def test_the_optimizers_moments_come_too_where_they_are_asked_for(work, run):
    assert run("--out_dir=biases", "--to=safetensors", "--optimizer=True", "x.safetensors")[0] == 0
    found = safetensors_file.open_tensors(Path("x.safetensors"))
    state = state_of(MODELS["biases"], 20)
    assert len(found) == 3 * len(jax.tree.leaves(state.params))
    np.testing.assert_array_equal(found["wte.weight"], state.params["wte"]["weight"])
    for name in ("mu", "nu"):
        tree = optax.tree.get(state.opt_state, name)
        c_fc = found[f"{name}.h.mlp.c_fc.weight"]
        np.testing.assert_array_equal(c_fc, tree["h"]["mlp"]["c_fc"]["weight"])
        assert c_fc.any()


# ---- which checkpoint


@pytest.mark.parametrize(("step", "number"), [("", 20), ("latest", 20), ("best", 20), ("10", 10)])
def test_the_step_asked_for_is_exported(work, run, step, number):
    assert run("--out_dir=plain", f"--step={step}", "folder")[0] == 0
    _, params = gpt2.load_network(Path("folder"), "float32", ONE)
    expected = with_biases(state_of(MODELS["plain"], number).params, MODELS["plain"])
    assert equal(params, expected)


def test_a_damaged_checkpoint_is_named_and_the_next_best_exported(work, run):
    amend(checkpoint.folder("plain") / "20" / "meta" / "metadata", {"digests": {"params": {}}})
    code, out, err = run("--out_dir=plain", "folder")
    assert (code, len(err)) == (0, 1)
    assert err[0].startswith("passed over: ")
    assert "iteration 10" in out[0]
    code, _, err = run("--out_dir=plain", "--step=20", "other")
    assert (code, len(err)) == (2, 1)
    assert "checkpoints/20/params" in err[0]
    assert not Path("other").exists()


# ---- whole or not at all

FORMS = {"hf": "folder", "safetensors": "x.safetensors"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "make",
    [Path.touch, Path.mkdir, lambda path: path.symlink_to("nowhere")],
    ids=["a file", "a folder", "a broken link"],
)
def test_nothing_is_overwritten(work, run, form, make):
    path = Path(FORMS[form])
    make(path)
    before = os.lstat(path)
    code, _, err = run("--out_dir=plain", f"--to={form}", str(path))
    assert (code, len(err)) == (2, 1)
    assert f"{path} is there already" in err[0]
    assert os.lstat(path) == before


def test_what_has_come_there_meanwhile_is_not_overwritten(work, run, monkeypatch):
    write = hugging_face.write

    def slowly(*arguments):
        Path("folder").mkdir()
        return write(*arguments)

    monkeypatch.setattr(hugging_face, "write", slowly)
    code, _, err = run("--out_dir=plain", "folder")
    assert (code, len(err)) == (2, 1)
    assert left(work / "folder") == []
    assert not [name for name in left(work) if name.startswith(".")]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("after", [0, 1])
def test_a_full_disk_is_one_line_and_leaves_nothing(work, run, monkeypatch, form, after):
    calls, before = [], left(work)

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > (after if form == "hf" else 0):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = run("--out_dir=plain", f"--to={form}", FORMS[form])
    assert (code, len(err)) == (2, 1)
    assert "cannot be written (No space left on device; " in err[0]
    assert "bytes are free there): make room" in err[0]
    assert left(work) == before


@pytest.mark.parametrize("form", FORMS)
def test_an_interrupted_export_leaves_nothing(work, run, monkeypatch, form):
    before = left(work)

    def interrupt(descriptor):
        assert len(left(work)) == len(before) + 1  # what is there so far
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    assert run("--out_dir=plain", f"--to={form}", FORMS[form])[0] == 130
    assert left(work) == before


@pytest.mark.parametrize("form", FORMS)
def test_what_a_killed_export_has_left_is_cleared_away(work, run, form):
    for make in (Path.touch, Path.mkdir):
        make(Path(f".{FORMS[form]}.exporting"))
        assert run("--out_dir=plain", f"--to={form}", FORMS[form])[0] == 0
        assert not [name for name in left(work) if name.startswith(".")]
        shutil.move(FORMS[form], f"{make.__name__}-{FORMS[form]}")


def test_folders_on_the_way_are_made_and_a_file_there_is_told_of(work, run):
    assert run("--out_dir=plain", "a/b/folder")[0] == 0
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert left(work / "a/b/folder") == files
    code, _, err = run("--out_dir=plain", "a/b/folder/config.json/x")
    assert (code, len(err)) == (2, 1)
    assert "cannot be written (" in err[0]


def test_a_value_beyond_float16_is_refused_and_leaves_nothing(work, run, monkeypatch):
    huge = {"wte": {"weight": np.full((5, 8), 1e6, np.float32)}}
    write = hugging_face.write
    monkeypatch.setattr(
        hugging_face, "write", lambda path, c, p, *rest: write(path, c, {**p, **huge}, *rest)
    )
    code, _, err = run("--out_dir=biases", "--dtype=float16", "folder")
    assert (code, len(err)) == (2, 1)
    assert "transformer.wte.weight holds 1e+06, beyond float16: use --dtype=float32" in err[0]
    assert left(work) == sorted(MODELS)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--out_dir=plain"], "0 destinations are named"),
        (["--out_dir=plain", "a", "b"], "2 destinations are named"),
        (["--out_dir=nowhere", "a"], "no checkpoint in nowhere"),
        (["--out_dir=plain", f"{__file__}/a"], f"{__file__} is a file): name another place"),
        (["--out_dir=plain", "--to=gguf", "a"], "to='gguf' is not one of hf|safetensors|nanogpt"),
        (["--out_dir=plain", "--to=safetensors", "a"], "let a end in .safetensors"),
        (["--out_dir=plain", "--optimizer=True", "a"], "optimizer=True is for --to=safetensors "),
        (["--to=safetensors", "--optimizer=True", "--dtype=float16", "a"], "dtype=float16"),
        (["--to=nanogpt", "--dtype=bfloat16", "a.pt"], "dtype=bfloat16"),
        (["--out_dir=plain", "--fromat=hf", "a"], "unknown key 'fromat'"),
        (["--out_dir=plain", "--step=30", "a"], "no checkpoint of step 30"),
        (["--out_dir=plain", "-x", "a"], "'-x' is neither"),
        (["--out_dir=plain", "."], ". is there already"),
        (["--out_dir=plain", "/"], "/ is there already"),
    ],
    ids=str,
)
def test_a_command_line_that_cannot_be_followed_is_one_line(work, run, argv, said):
    code, _, err = run(*argv)
    assert (code, len(err)) == (2, 1)
    assert said in err[0]
    assert left(work) == sorted(MODELS)


def test_help_tells_of_every_key(run):
    code, out, _ = run("--help")
    assert code == 0
    for name in ("init_from", "out_dir", "step", "to", "dtype", "keep_padding", "optimizer"):
        assert any(line.startswith(f"  --{name}=") for line in out)


def test_export_of_an_export_is_refused_as_a_run(work, run):
    """Its config.json is not a run's."""
    run("--out_dir=plain", "folder")
    code, _, err = run("--out_dir=folder", "again")
    assert (code, len(err)) == (2, 1)
    assert "no checkpoint in folder" in err[0]


def test_a_folder_is_exported_and_loaded_by_name(work, run, monkeypatch):
    monkeypatch.setattr(gpt2, "read_tokenizer", lambda folder, config: TOKENIZER)
    run("--out_dir=plain", "folder")
    model, params, tokenizer = load("folder")
    assert model.config.n_tokens == 5
    assert equal(params, with_biases(state_of(MODELS["plain"], 20).params, MODELS["plain"]))
    assert tokenizer is TOKENIZER


def test_a_checkpoint_of_nanogpts_is_exported_with_the_symbols_of_its_data(work, run):
    source = f"--init_from={REFERENCE.parent / 'ckpt_nobias.pt'}"
    folder = work / "elsewhere" / "letters"
    folder.mkdir(parents=True)
    symbols = "abcdefghijklmnopqrstuvwxyz "
    spec = {"kind": "char", "symbols": symbols}
    meta = {"tokenizer": spec, "vocab_size": 27, "dtype": "uint16"}
    (folder / "meta.json").write_text(json.dumps(meta))
    code, _, err = run(source, "a.hf")
    assert (code, len(err)) == (2, 1)
    assert "name another --data_dir" in err[0]
    assert run(source, "--data_dir=elsewhere", "a.hf")[0] == 0
    assert load("a.hf")[2].spec == spec
