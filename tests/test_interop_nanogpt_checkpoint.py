"""nanoGPT's ckpt.pt, taken over and given back.

tests/reference/ckpt_{bias,nobias}.pt were written by nanoGPT's own train.py (torch 2.14, CPU):

    python train.py --dataset=letters --n_layer=2 --n_head=2 --n_embd=8 --block_size=16
        --batch_size=4 --gradient_accumulation_steps=2 --max_iters=20 --eval_interval=20
        --eval_iters=2 --learning_rate=1e-2 --min_lr=1e-3 --warmup_iters=2 --lr_decay_iters=30
        --device=cpu --compile=False --dtype=float32 --bias=True (or False)

with the data set of `letters` below. ckpt_*.npz hold what nanoGPT's model.py and AdamW then make of
it: ``logits`` of the first micro-batch and the ``losses`` of ten more iterations of train.py's loop
over ``tokens`` and ``targets`` (10, A, B, T), ``wte`` after them.
"""

import json
import pickle
import shutil
import sys
import zipfile
from collections import OrderedDict
from contextlib import chdir
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sample
import train
from gpt_jax import checkpoint, evaluate, load
from gpt_jax.config import parse
from gpt_jax.errors import UserError
from gpt_jax.integrity import amend
from gpt_jax.interop import torch_file
from gpt_jax.interop.nanogpt_checkpoint import export, is_adam, read
from gpt_jax.interop.torch_file import Tensor
from gpt_jax.optimizer import make_optimizer
from gpt_jax.prepare import prepare
from gpt_jax.prepare.dataset import for_dataset
from gpt_jax.sharding import make_mesh, state_sharding
from gpt_jax.start import resume, saved_meta
from gpt_jax.train_step import make_train_step

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "tests" / "reference"
SHARED = ROOT.parent / "shared"
BABY = SHARED / "reference" / "nanogpt_baby_ckpt.pt"
NAMES = ["bias", "nobias"]
METADATA = "checkpoints/20/meta/metadata"
SYMBOLS = "\nabcdefghijklmnopqrstuvwxyz"


def file(name):
    return str(REFERENCE / f"ckpt_{name}.pt")


@cache
def golden(name):
    with np.load(REFERENCE / f"ckpt_{name}.npz") as arrays:
        return dict(arrays)


@pytest.fixture(autouse=True, scope="module")
def compiled_in_haste():
    jax.config.update("jax_disable_most_optimizations", True)  # half the time, the same sums
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def letters(tmp_path, monkeypatch):
    """A working directory with the data that they were trained on."""
    monkeypatch.chdir(tmp_path)
    write_letters()


def write_letters():
    """Make the data set as nanoGPT has it."""
    random, ids = np.random.default_rng(0), [0]
    for _ in range(4000):
        ids.append(int((ids[-1] * 3 + random.integers(0, 4)) % 27))
    folder = Path("data/letters")
    folder.mkdir(parents=True)
    np.array(ids[:3600], np.uint16).tofile(folder / "train.bin")
    np.array(ids[3600:], np.uint16).tofile(folder / "val.bin")
    symbols = dict(enumerate(SYMBOLS))
    meta = {"vocab_size": 27, "itos": symbols, "stoi": {c: i for i, c in symbols.items()}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


@pytest.fixture
def run(monkeypatch, capfd):
    """Run a command in this process; return its exit code and what it prints."""

    def command(script, *argv):
        monkeypatch.setattr(sys, "argv", ["command", *argv])
        capfd.readouterr()
        return script.main(), "".join(capfd.readouterr())

    return command


def resumed(*argv, mesh=None):
    """The config, model and state that train.py goes on with."""
    config = parse(list(argv))
    mesh = mesh or make_mesh(data=1, devices=jax.devices()[:1])
    tokenizer, _, _ = for_dataset(Path(config.data_dir) / config.dataset)
    return config, *resume(config, saved_meta(config), "float32", tokenizer, mesh)


def losses_of(config, model, state, tokens, targets):
    step = make_train_step(model, make_optimizer(config))
    found = []
    for x, y in zip(tokens.astype(np.int32), targets.astype(np.int32), strict=True):
        state, metrics = step(state, x, y)
        found.append(float(metrics["loss"]))
    return found, state


def arrays_of(value):
    """The bytes of a file's tensors, and everything else, as they are."""
    if isinstance(value, Tensor):
        return value.shape, str(value.dtype), np.asarray(value).tobytes()
    if isinstance(value, dict):
        return {key: arrays_of(x) for key, x in value.items()}
    return list(map(arrays_of, value)) if isinstance(value, list) else value


# ---- nanoGPT's, here


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_nanogpts(name):
    model, params, tokenizer = load(file(name))
    tokens, logits = golden(name)["tokens"][0, 0].astype(np.int32), golden(name)["logits"]
    assert np.abs(jax.jit(model.apply)({"params": params}, tokens) - logits).max() <= 1e-5
    assert tokenizer.decode(range(27)) == SYMBOLS
    assert model.config.activation == "gelu"


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_with_nanogpts_losses(name):
    """T8, T17b: weights, both moments, AdamW's count, and the learning rate of the iteration."""
    config, model, state, meta = resumed(f"--init_from={file(name)}")
    assert meta["iter"] == int(state.step) == 20
    assert meta["best_val_loss"] == pytest.approx(
        {"bias": 3.0050, "nobias": 2.9071}[name], abs=1e-4
    )
    found, state = losses_of(config, model, state, golden(name)["tokens"], golden(name)["targets"])
    np.testing.assert_allclose(found, golden(name)["losses"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(state.params["wte"]["weight"], golden(name)["wte"], atol=1e-4)


def test_parameters_and_moments_are_laid_out_on_a_mesh():
    mesh = make_mesh(fsdp=2, tensor=2)
    _, _, state, _ = resumed(f"--init_from={file('bias')}", mesh=mesh)
    _, _, one, _ = resumed(f"--init_from={file('bias')}")
    laid_out = jax.tree.map(lambda x, s: x.sharding == s, state, state_sharding(mesh, state))
    assert jax.tree.all(laid_out)
    jax.tree.map(np.testing.assert_array_equal, state.params, one.params)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, one.opt_state)
    params = load(file("bias"), mesh=mesh)[1]
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), params, state.params)
    assert params["wpe"]["weight"].sharding == state.params["wpe"]["weight"].sharding


def test_the_state_can_be_donated_and_the_file_is_as_it_was():
    """XLA may write over what it is given: it is never given the file's pages."""
    before = Path(file("nobias")).read_bytes()
    config, model, state, _ = resumed(f"--init_from={file('nobias')}")
    losses_of(config, model, state, golden("nobias")["tokens"], golden("nobias")["targets"])
    assert Path(file("nobias")).read_bytes() == before


def test_the_runs_settings_are_carried_over():
    """T8: and where to write, on what, and whom to tell is not for the file to say."""
    config = parse([f"--init_from={file('bias')}"])
    assert (config.batch_size, config.gradient_accumulation_steps) == (4, 2)
    assert (config.learning_rate, config.min_lr, config.lr_decay_iters) == (1e-2, 1e-3, 30)
    assert (config.n_layer, config.n_embd, config.block_size, config.bias) == (2, 8, 16, True)
    assert (config.dataset, config.max_iters) == ("letters", 20)
    assert (config.out_dir, config.device, config.dtype) == ("out", "auto", "auto")
    assert config.compile  # theirs was compiled by nothing
    config = parse([f"--init_from={file('bias')}", "--beta2=0.5", "--weight_decay=0.3"])
    assert (config.beta2, config.weight_decay, config.learning_rate) == (0.5, 0.3, 1e-2)


def test_the_networks_sizes_are_the_files_whatever_the_config_file_says():
    """T8: the config file of a run whose sizes were given as flags."""
    config = parse(["train_shakespeare_char", f"--init_from={file('bias')}", "--batch_size=3"])
    assert (config.n_layer, config.n_head, config.n_embd, config.block_size) == (2, 2, 8, 16)
    assert config.bias
    assert config.dataset == "shakespeare_char"
    assert (config.learning_rate, config.batch_size) == (1e-3, 3)


@pytest.mark.parametrize(
    "flag", ["n_layer=3", "n_head=4", "n_embd=16", "block_size=8", "bias=False", "dropout=0.1"]
)
def test_a_flag_for_another_network_is_refused(flag):
    name, value = flag.split("=")
    if name == "dropout":  # which is no size
        assert resumed(f"--init_from={file('bias')}", f"--{flag}")[1].config.dropout == 0.1
        return
    with pytest.raises(UserError, match=rf"{name}={value}, but .*ckpt_bias\.pt has {name}="):
        resumed(f"--init_from={file('bias')}", f"--{flag}")


def test_a_run_goes_on_in_a_folder_of_its_own(run):
    source = f"--init_from={file('nobias')}"
    code, said = run(train, source, "--out_dir=new", "--max_iters=22", "--eval_interval=1")
    assert code == 0, said
    assert f"resuming nanoGPT's run from {file('nobias')}, iteration 20" in said
    lines = [json.loads(line) for line in Path("new/metrics.jsonl").read_text().splitlines()]
    assert [line["iter"] for line in lines if "loss" in line] == [20, 21]
    assert checkpoint.steps("new")[-1] == 22
    code, said = run(train, "--init_from=resume", "--out_dir=new", "--max_iters=24")
    assert code == 0, said
    assert "resuming from new, iteration 22" in said
    code, said = run(train, source, "--out_dir=new", "--max_iters=20")  # from the file once more
    assert code == 0, said
    assert "new held a run: it is in new/previous-1 now" in said
    assert checkpoint.steps("new") == [20]  # what was read is saved before it is trained


def test_beside_the_file_it_goes_on_from_a_run_leaves_it_there(run):
    Path("out").mkdir()
    Path("out/ckpt.pt").write_bytes(Path(file("bias")).read_bytes())
    for _ in range(2):
        assert run(train, "--init_from=out/ckpt.pt", "--out_dir=out")[0] == 0
    assert Path("out/ckpt.pt").read_bytes() == Path(file("bias")).read_bytes()
    assert checkpoint.steps("out") == checkpoint.steps("out/previous-1") == [20]


def test_it_is_sampled_and_evaluated(run):
    greedy = ["--temperature=0", "--num_samples=1", "--max_new_tokens=5", "--start=abc"]
    code, said = run(sample, f"--init_from={file('bias')}", *greedy)
    assert code == 0, said
    assert said.startswith("abc")
    assert said.endswith("\n---------------\n")
    code, said = run(evaluate, f"--init_from={file('bias')}")
    assert code == 0, said
    assert f"{file('bias')}, iteration 20, on letters" in said
    assert "val loss 2.9" in said or "val loss 3.0" in said
    code, said = run(train, f"--init_from={file('bias')}", "--eval_only")
    assert code == 0, said
    assert "step 20: train loss" in said
    assert not Path("out").exists()


def test_its_tokenizer_is_the_data_sets(run):
    """S3: from data_dir, wherever that is; GPT-2's would not fit 27 ids."""
    Path("data").rename("elsewhere")
    assert load(file("bias"), data_dir="elsewhere")[2].n_tokens == 27
    assert (
        run(sample, f"--init_from={file('bias')}", "--data_dir=elsewhere", "--num_samples=1")[0]
        == 0
    )
    code, said = run(sample, f"--init_from={file('bias')}")
    assert code == 2
    assert "has vocab_size=27, but the tiktoken tokenizer of data/letters has 50257 ids" in said


def test_symbols_that_are_fewer_than_its_rows_are_not_its_own():
    """nanoGPT pads GPT-2's vocabulary, and no other."""
    meta = {"vocab_size": 26, "itos": dict(enumerate(SYMBOLS[:26]))}
    meta["stoi"] = {c: i for i, c in meta["itos"].items()}
    Path("data/letters/meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(
        UserError, match="vocab_size=27, but the char tokenizer of data/letters has"
    ):
        load(file("bias"))


def test_of_a_mixture_the_tokenizer_is_that_of_each_set_and_none_lies_elsewhere():
    def trained_on(dataset):
        return saved(lambda values: values["config"].update(dataset=dataset))

    assert load(trained_on("letters:0.5,others:0.5"))[2].n_tokens == 27
    with pytest.raises(UserError, match="leaves data_dir"):
        load(trained_on(f"letters,{Path('data/letters').absolute()}"))


def test_a_folder_with_nothing_but_nanogpts_file_says_how_to_name_it(run):
    Path("theirs").mkdir()
    Path("theirs/ckpt.pt").write_bytes(b"")
    for script in (sample, evaluate):
        code, said = run(script, "--out_dir=theirs")
        assert (code, said.splitlines()[-1]) == (
            2, "error: no checkpoint in theirs: nanoGPT's is taken by --init_from=theirs/ckpt.pt",
        )  # fmt: skip
    code, said = run(train, "--init_from=resume", "--out_dir=theirs", "--dataset=letters")
    assert code == 2
    assert "to go on from nanoGPT's, --init_from=theirs/ckpt.pt" in said


# ---- what other versions of PyTorch and nanoGPT have written


def saved(change, name="bias"):
    """A file like one of nanoGPT's, but for a change."""
    values = torch_file.load(file(name))
    change(values)
    Path("x.pt").unlink(missing_ok=True)
    torch_file.save(Path("x.pt"), values)
    return "x.pt"


def tensor(array):
    return Tensor(array.shape, array.dtype, lambda: array)


def prefixed(values):
    values["model"] = {f"_orig_mod.{name}": x for name, x in values["model"].items()}


def with_masks(values):
    mask = tensor(np.tril(np.ones((1, 1, 16, 16), np.float32)))
    values["model"] |= {f"transformer.h.{i}.attn.bias": mask for i in range(2)}


def counted_by_ints(values):
    for entry in values["optimizer"]["state"].values():
        entry["step"] = 21
    for group in values["optimizer"]["param_groups"]:
        del group["maximize"]


def without_config(values):
    del values["config"]
    values["best_val_loss"] = 1e9


@pytest.mark.parametrize("change", [prefixed, with_masks, counted_by_ints, without_config])
def test_what_older_versions_wrote_is_read(change):
    _, _, state, _ = resumed(f"--init_from={saved(change)}", "--dataset=letters")
    _, _, expected, _ = resumed(f"--init_from={file('bias')}")
    jax.tree.map(np.testing.assert_array_equal, state.params, expected.params)
    mu, expected = state.opt_state[1][0].mu, expected.opt_state[1][0].mu
    jax.tree.map(np.testing.assert_array_equal, mu, expected)


def test_weights_of_16_bits_are_made_float32():
    def halved(values):
        values["model"] = {
            name: tensor(np.asarray(x).astype(np.float16)) for name, x in values["model"].items()
        }

    params = load(saved(halved))[1]
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
    np.testing.assert_allclose(params["wte"]["weight"], load(file("bias"))[1]["wte"]["weight"],
                               atol=1e-4)  # fmt: skip


# ---- what is refused


def put(value, *path):
    """A change: put a value where a path leads, or take away what is there."""

    def change(values):
        for key in path[:-1]:
            values = values[key]
        if value is None:
            del values[path[-1]]
        else:
            values[path[-1]] = value

    return change


ONE, HALF = tensor(np.float32([1])), tensor(np.zeros((27, 8), np.float64))
WTE, FC = "transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"
GROUPS, STATE = ("optimizer", "param_groups"), ("optimizer", "state")
LIES = {
    "no model": (put(None, "model"), "KeyError: 'model'"),
    "a model of numbers": (put(3, "model"), "is not a checkpoint of nanoGPT's train.py"),
    "no model_args": (put(None, "model_args"), "KeyError: 'model_args'"),
    "a size missing": (put(None, "model_args", "bias"), "model_args has no 'bias'"),
    "a size of text": (put("2", "model_args", "n_layer"), "n_layer='2' is a str"),
    "a size of lists": (put([[]], "model_args", "n_layer"), "'n_layer' is a list"),
    "another network": (put(True, "model_args", "rotary"), "model_args has 'rotary', which"),
    "more layers": (put(3, "model_args", "n_layer"), "has no 'transformer.h.2.ln_1.weight'"),
    "2 billion layers": (put(2**31 - 1, "model_args", "n_layer"), "n_layer=2147483647, and it has"),
    "fewer layers": (put(1, "model_args", "n_layer"), "has 'transformer.h.1.ln_1.weight', which"),
    "2 billion ids": (put(2**31 - 1, "model_args", "vocab_size"), "has shape (27, 8), the model"),
    "a wide network": (put(2**30, "model_args", "n_embd"), "has shape (27, 8), the model config"),
    "a long context": (put(2**30, "model_args", "block_size"), "has shape (16, 8), the model"),
    "no heads": (put(0, "model_args", "n_head"), "n_head=0 is out of range"),
    "odd heads": (put(3, "model_args", "n_head"), "n_embd=8 is not a multiple of n_head=3"),
    "no biases": (put(False, "model_args", "bias"), "which this model config does not"),
    "dropout of 1": (put(1.0, "model_args", "dropout"), "dropout=1.0 is out of range"),
    "a tensor missing": (put(None, "model", FC), f"the state_dict has no '{FC}'"),
    "a tensor too many": (put(ONE, "model", "x"), "the state_dict has 'x', which this model"),
    "a tensor's name": (put(ONE, "model", "a\x1b[1m"), "it has a tensor 'a\\x1b[1m'"),
    "a long name": (put(ONE, "model", "a" * 10**6), "it has a tensor 'aaa"),
    "a number as name": (put(ONE, "model", 3), "the state_dict has '3', which"),
    "no tensor": (put("x", "model", WTE), f"'{WTE}' is str, not float32"),
    "a tensor of float64": (put(HALF, "model", WTE), f"'{WTE}' is float64, not float32"),
    "an output layer of its own": (
        put(tensor(np.ones((27, 8), np.float32)), "model", "lm_head.weight"), "they must be tied",
    ),
    "no iteration": (put(None, "iter_num"), "KeyError: 'iter_num'"),
    "iteration -1": (put(-1, "iter_num"), "iter_num=-1"),
    "iteration 2**31": (put(2**31, "iter_num"), "iter_num=2147483648"),
    "an iteration of text": (put("20", "iter_num"), "iter_num='20'"),
    "a list as iteration": (put([], "iter_num"), "'iter_num' is a list"),
    "a loss of text": (put("x", "best_val_loss"), "best_val_loss is a str"),
    "a loss of many": (put(HALF, "best_val_loss"), "best_val_loss is of shape (27, 8)"),
    "a loss without end": (put(10**400, "best_val_loss"), "OverflowError"),
    "a config of numbers": (put(3, "config"), "is not a checkpoint of nanoGPT's train.py"),
    "a setting of text": (put("x", "config", "batch_size"), "batch_size='x' is a str"),
    "a setting of lists": (put([1], "config", "batch_size"), "'batch_size' is a list"),
    "a setting out of range": (put(-1, "config", "batch_size"), "batch_size=-1 is out of range"),
    "data elsewhere": (put("../../x", "config", "dataset"), "leaves data_dir"),
    "data at the root": (put("/etc", "config", "dataset"), "leaves data_dir"),
    "data of no name": (put("a\nb", "config", "dataset"), "is empty or unprintable"),
}  # fmt: skip


def counts(n):
    """A change: every parameter's count of updates."""

    def change(values):
        for entry in values["optimizer"]["state"].values():
            entry["step"] = n

    return change


OPTIMIZERS = {
    "none": (put(None, "optimizer"), "x.pt has no optimizer: it can be sampled, not trained on"),
    "a number": (put(3, "optimizer"), "TypeError"),
    "no state": (put(None, *STATE), "KeyError: 'state'"),
    "one group": (put([], *GROUPS), "its groups are of other sizes"),
    "groups of lists": (put([[], []], *GROUPS), "TypeError"),
    "another order of groups": (lambda x: x["optimizer"]["param_groups"].reverse(), "other sizes"),
    "another eps": (put(1e-6, *GROUPS, 0, "eps"), "eps is not 1e-08"),
    "amsgrad": (put(True, *GROUPS, 1, "amsgrad"), "amsgrad is not False"),
    "a list as eps": (put([], *GROUPS, 0, "eps"), "eps is not 1e-08"),
    "numbers that are none": (put([[]] * 10, *GROUPS, 0, "params"), "TypeError"),
    "a parameter without state": (put(None, *STATE, 3), "KeyError: 3"),
    "a state of numbers": (put(3, *STATE, 3), "TypeError"),
    "no first moment": (put(None, *STATE, 3, "exp_avg"), "KeyError: 'exp_avg'"),
    "another shape": (put(ONE, *STATE, 0, "exp_avg_sq"), f"'{WTE}' has shape (1,)"),
    "no tensor": (put(1.0, *STATE, 0, "exp_avg"), f"'{WTE}' is float, not float32"),
    "float64": (put(HALF, *STATE, 0, "exp_avg"), f"'{WTE}' is float64, not float32"),
    "counts that differ": (put(3.0, *STATE, 0, "step"), "there is no one count"),
    "half a count": (counts(0.5), "there is no one count"),
    "nan counts": (counts(float("nan")), "there is no one count"),
    "a count below 0": (counts(-1), "there is no one count"),
    "a count of text": (counts("3"), "step is a str"),
}  # fmt: skip


def one_line(error):
    text = str(error.value)
    assert text.isprintable()
    assert len(text) < 600
    return text


@pytest.mark.parametrize(("change", "said"), LIES.values(), ids=LIES)
def test_a_file_that_is_not_nanogpts_or_lies_is_refused(change, said):
    path = saved(change)
    with pytest.raises(UserError) as error:
        resumed(f"--init_from={path}")
    assert said in one_line(error)
    if said.startswith("batch_size"):  # sampling needs none
        return
    with pytest.raises(UserError) as error:
        load(path)
    assert said in one_line(error)


@pytest.mark.parametrize(("change", "said"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_another_optimizers_state_is_sampled_but_not_trained_on(change, said):
    path = saved(change)
    load(path)
    with pytest.raises(UserError) as error:
        resumed(f"--init_from={path}")
    assert said in one_line(error)
    assert "x.pt" in one_line(error)


@settings(
    max_examples=200, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4),
    st.booleans(),
)
def test_a_pickle_changed_at_random_is_read_or_refused(tmp_path, changes, delete):
    """With checksums that agree: whatever comes of it, it is values or one line."""
    with zipfile.ZipFile(file("nobias")) as source, zipfile.ZipFile("y.pt", "w") as target:
        for info in source.infolist():
            data = bytearray(source.read(info))
            if info.filename.endswith("data.pkl"):
                for at, byte in changes:
                    at %= len(data)
                    data[at : at + 1] = b"" if delete else bytes([byte])
            target.writestr(info.filename, bytes(data))
    try:
        theirs = read("y.pt")
        theirs.params()
        theirs.moments()
    except UserError as error:
        text = str(error)
        if not text.isprintable() or len(text) >= 600:
            raise AssertionError(text) from error


# ---- ours, there


@pytest.fixture(scope="module")
def taken_over(tmp_path_factory):
    folder = tmp_path_factory.mktemp("taken_over")
    with chdir(folder), pytest.MonkeyPatch.context() as patch:
        write_letters()
        patch.setattr(sys, "argv", ["command", f"--init_from={file('bias')}", "--out_dir=ours"])
        assert train.main() == 0
    return folder / "ours"


@pytest.fixture
def ours(taken_over):
    """A run of ours that has read nanoGPT's checkpoint, saved it, and done no update."""
    return str(shutil.copytree(taken_over, "ours"))


@pytest.mark.parametrize("name", NAMES)
def test_what_comes_from_nanogpt_goes_back_to_the_byte(run, name):
    """Weights and moments; the names, their order, the groups, the numbers."""
    assert run(train, f"--init_from={file(name)}", "--out_dir=ours")[0] == 0
    said = export("ours", "", Path("back"))
    assert said == [
        "back/ckpt.pt: iteration 20 of ours",
        "back/meta.pkl: its symbols; nanoGPT's sample.py looks for them in data/letters/meta.pkl",
    ]
    there, back = torch_file.load(file(name)), torch_file.load("back/ckpt.pt")
    assert list(there) == list(back)
    for key in ("model", "optimizer"):
        assert arrays_of(back[key]) == arrays_of(there[key])
    assert list(back["model"]) == list(there["model"])
    assert list(back["config"]) == list(there["config"])
    assert back["model_args"] == there["model_args"]
    assert list(back["optimizer"]["param_groups"][0]) == list(there["optimizer"]["param_groups"][0])
    assert back["iter_num"] == there["iter_num"]
    assert back["best_val_loss"].shape == ()
    differing = {k for k, x in back["config"].items() if there["config"][k] != x}
    assert differing == {"out_dir", "device", "compile"}
    assert pickle.loads(Path("back/meta.pkl").read_bytes()) == pickle.loads(
        Path("data/letters/meta.pkl").read_bytes()
    )


def test_what_goes_there_comes_back_to_the_bit(run):
    """A run of ours, its Adam state of several updates included."""
    argv = ["--max_iters=23", "--eval_interval=1", "--out_dir=ours"]
    assert run(train, f"--init_from={file('bias')}", *argv)[0] == 0
    export("ours", "23", Path("there/x.pt"))
    assert Path("there/meta.pkl").exists()
    _, _, ours, _ = resumed("--init_from=resume", "--out_dir=ours")
    _, _, back, meta = resumed("--init_from=there/x.pt")
    assert meta["iter"] == 23
    jax.tree.map(np.testing.assert_array_equal, ours.params, back.params)
    adam, adam_back = (
        next(filter(is_adam, jax.tree.leaves(state.opt_state, is_leaf=is_adam)))
        for state in (ours, back)
    )
    jax.tree.map(np.testing.assert_array_equal, adam, adam_back)
    assert int(ours.step) == int(back.step) == 23


def test_nothing_is_written_over(ours):
    Path("back").mkdir()
    Path("back/meta.pkl").write_text("mine")
    with pytest.raises(UserError, match=r"back/meta\.pkl is there already"):
        export(ours, "", Path("back"))
    assert [path.name for path in Path("back").iterdir()] == ["meta.pkl"]
    Path("back/meta.pkl").rename("back/ckpt.pt")
    export(ours, "", Path("both/a.pt"))
    export(ours, "", Path("both/b.pt"))  # its symbols are those that are there
    assert sorted(path.name for path in Path("both").iterdir()) == ["a.pt", "b.pt", "meta.pkl"]
    with pytest.raises(UserError, match=r"back/ckpt\.pt is there already"):
        export(ours, "", Path("back"))
    assert Path("back/ckpt.pt").read_text() == "mine"


def test_without_the_optimizer_it_is_for_sampling_alone(ours):
    said = export(ours, "latest", Path("back"), optimizer=False)
    assert "no optimizer: nanoGPT's sample.py can use it, --init_from=resume cannot" in said
    assert "optimizer" not in torch_file.load("back/ckpt.pt")
    params = load("back/ckpt.pt")[1]
    jax.tree.map(np.testing.assert_array_equal, params, load(ours)[1])
    with pytest.raises(UserError, match="has no optimizer"):
        resumed("--init_from=back/ckpt.pt")


def test_a_network_that_nanogpt_has_not_is_refused_by_name(ours):
    meta = checkpoint.read_meta(ours, 20)
    amend(Path(ours, METADATA), {"model": {**meta["model"], "activation": "gelu_tanh"}})
    with pytest.raises(UserError, match="activation='gelu_tanh' in ours, but nanoGPT's network"):
        export(ours, "", Path("back"))
    assert not Path("back").exists()


def test_a_tokenizer_that_nanogpt_has_not_is_said(ours):
    amend(Path(ours, METADATA), {"tokenizer": {"kind": "byte"}})
    said = export(ours, "", Path("back"))
    assert said[1] == "nanoGPT knows no byte tokenizer: its sample.py will take ids for GPT-2's"
    assert [path.name for path in Path("back").iterdir()] == ["ckpt.pt"]


def test_a_padded_vocabulary_and_gpt2s_tokenizer_go_as_they_are(ours):
    amend(Path(ours, METADATA), {"tokenizer": {"kind": "tiktoken", "name": "gpt2"}})
    assert export(ours, "", Path("back")) == ["back/ckpt.pt: iteration 20 of ours"]
    assert torch_file.load("back/ckpt.pt")["model"][WTE].shape == (27, 8)


def test_a_damaged_checkpoint_is_not_exported(ours):
    amend(Path(ours, METADATA), {"digests": {}})
    with pytest.raises(UserError, match="has no digests"):
        export(ours, "", Path("back"))
    assert not Path("back").exists()


def test_settings_are_in_nanogpts_words(ours):
    export(ours, "", Path("back"))
    config = torch_file.load("back/ckpt.pt")["config"]
    assert (config["device"], config["dtype"], config["init_from"]) == (
        "cuda",
        "float32",
        "scratch",
    )
    assert all(type(x) in (int, float, bool, str) for x in config.values())


def test_pytorch_reads_it_as_nanogpt_does(ours):
    torch = pytest.importorskip("torch")
    export(ours, "", Path("back"))
    there = torch.load("back/ckpt.pt", map_location="cpu", weights_only=True)
    assert isinstance(there["model"], OrderedDict)
    head, wte = there["model"]["lm_head.weight"], there["model"][WTE]
    assert head.data_ptr() == wte.data_ptr()


# ---- a real one, of 9.7 MB


@pytest.fixture
def baby():
    text = SHARED / "data" / "tinyshakespeare.txt"
    if not (BABY.exists() and text.exists()):
        pytest.skip(f"nanoGPT's checkpoint of the README's CPU run is absent: put it in {BABY}")
    prepare("shakespeare_char", Path("data/shakespeare_char"), input=text, log=lambda _: None)
    return str(BABY)


def test_nanogpts_cpu_run_is_computed_as_there(run, baby):
    model, params, tokenizer = load(baby)
    ids = np.int32([tokenizer.encode("ROMEO:\n")])
    assert ids.tolist() == [[30, 27, 25, 17, 27, 10, 0]]
    logits = np.asarray(jax.jit(model.apply)({"params": params}, ids))[0, -1]
    top = {tokenizer.decode([i]): logits[i] for i in np.argsort(-logits)[:5]}
    expected = {"I": 4.7973, "A": 4.7812, "W": 4.6785, "T": 4.6208, "H": 4.0723}
    assert list(top) == list(expected)
    np.testing.assert_allclose(list(top.values()), list(expected.values()), atol=1e-4)
    assert logits.sum() == pytest.approx(16.39022, abs=1e-4)
    argv = ["--start=ROMEO:\n", "--temperature=0", "--max_new_tokens=40", "--num_samples=1"]
    code, said = run(sample, f"--init_from={baby}", *argv)
    assert code == 0, said
    assert said == "ROMEO:\nI ward the shall the shall the shall the\n---------------\n"


def test_nanogpts_cpu_run_has_the_loss_that_it_has_there(baby):
    from gpt_jax.data import evaluation_starts
    from gpt_jax.evaluation import evaluate, make_eval_step
    from gpt_jax.prepare.checked import open_checked

    mesh = make_mesh()
    model, params, _ = load(baby, mesh=mesh)
    split = open_checked(Path("data/shakespeare_char"), "val", 65, "uint16", 64)
    starts = evaluation_starts(split)
    result = evaluate(make_eval_step(model, mesh), params, split, starts, 32, mesh, None)
    assert result.loss == pytest.approx(1.89824, abs=1e-4)


def test_nanogpts_cpu_run_goes_on_as_there(baby):
    """Ten iterations over batches drawn by numpy: their losses by nanoGPT and torch 2.14."""
    ids = np.fromfile("data/shakespeare_char/train.bin", np.uint16).astype(np.int32)
    starts = np.random.default_rng(0).integers(0, len(ids) - 64, (10, 1, 12))
    windows = ids[starts[..., None] + np.arange(65)]
    config, model, state, meta = resumed(f"--init_from={baby}")
    assert (meta["iter"], round(meta["best_val_loss"], 4)) == (2000, 1.8857)
    found, _ = losses_of(config, model, state, windows[..., :-1], windows[..., 1:])
    expected = [1.7838445, 1.7453294, 1.7621568, 1.7296766, 1.7507616, 1.7439221, 1.6904417,
                1.7611953, 1.7477328, 1.8397737]  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
