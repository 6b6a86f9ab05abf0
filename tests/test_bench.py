"""The bench: what it measures is the real thing, its arithmetic is right, its errors one line.

No time is asserted: speed is measured, never tested.
"""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData

from gpt_jax.bench import HELP, VERBS, compiling, loading, main, measure, profiling
from gpt_jax.bench.children import output
from gpt_jax.bench.compiling import start_up
from gpt_jax.bench.config import (
    MODELS,
    CompileBench,
    DecodeBench,
    LoaderBench,
    TrainBench,
    configured,
)
from gpt_jax.bench.decoding import decode
from gpt_jax.bench.floor import Floor, floors
from gpt_jax.bench.loading import loader
from gpt_jax.bench.measure import memory_told, network, peak_memory, rate, spread
from gpt_jax.bench.nanogpt import compared, in_turns, merged, record_of, task_of, theirs_of
from gpt_jax.bench.profiling import Kernel, busy_time, grouped, programs, read
from gpt_jax.bench.report import put_out, written
from gpt_jax.bench.training import train
from gpt_jax.config import TrainConfig, parse
from gpt_jax.errors import RunError, UserError
from gpt_jax.metrics import flops_per_token
from gpt_jax.prepare.checked import open_dataset
from gpt_jax.sharding import make_mesh

TINY = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--vocab_size=64",
        "--batch_size=8", "--dropout=0", "--repeats=2"]  # fmt: skip

# What nanogpt_program asks of torch, and no more: enough to see that it asks for the right things.
TORCH = """
import contextlib, types
__version__ = "9.9"
bfloat16, float32, float16 = "bfloat16", "float32", "float16"
log = []
def manual_seed(seed): pass
class Tensor:
    def __init__(self, shape): self.shape = tuple(shape)
    def __getitem__(self, index):
        if isinstance(index, int): return Tensor(self.shape[1:])
        return Tensor((*self.shape[:-1], self.shape[-1] - 1))
    def __truediv__(self, n): return self
    def contiguous(self): return self
    def backward(self): log.append("backward")
    def item(self): return 4.0
def randint(high, shape, device): return Tensor(shape)
def compile(model): log.append("compile"); return model
no_grad = contextlib.nullcontext
backends = types.SimpleNamespace(cuda=types.SimpleNamespace(matmul=types.SimpleNamespace()),
                                 cudnn=types.SimpleNamespace())
cuda = types.SimpleNamespace(is_available=lambda: False)
class Scaler:
    def __init__(self, device, enabled): assert not enabled
    def scale(self, loss): return loss
    def unscale_(self, optimizer): pass
    def step(self, optimizer): log.append("step")
    def update(self): pass
amp = types.SimpleNamespace(GradScaler=Scaler)
def clip(parameters, norm): log.append(f"clip {norm}")
nn = types.SimpleNamespace(utils=types.SimpleNamespace(clip_grad_norm_=clip))
"""
MODEL = """
import torch
class GPTConfig:
    def __init__(self, block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias):
        assert (n_layer, n_head, n_embd, bias) == (1, 2, 16, False)
class Optimizer:
    param_groups = [{}]
    def zero_grad(self, set_to_none): assert set_to_none; torch.log.append("zero")
class GPT:
    def __init__(self, config): pass
    def to(self, device): assert device == "cpu"; return self
    def eval(self): pass
    def parameters(self): return []
    def configure_optimizers(self, decay, rate, betas, device_type):
        assert (decay, betas, device_type) == (0.1, (0.9, 0.95), "cpu")
        return Optimizer()
    def __call__(self, x, y):
        assert x.shape == y.shape
        open(__file__ + ".log", "a").write(f"{x.shape} {' '.join(torch.log)}\\n")
        torch.log.clear()
        return None, torch.Tensor(())
    def generate(self, prompt, n, temperature, top_k):
        open(__file__ + ".log", "a").write(f"{prompt.shape} {n} {temperature} {top_k}\\n")
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder like nanoGPT's, and a torch for the interpreter that runs it."""
    (tmp_path / "torch.py").write_text(TORCH)
    folder = tmp_path / "nanoGPT"
    folder.mkdir()
    (folder / "model.py").write_text(MODEL)
    monkeypatch.setenv("XLA_FLAGS", "")  # ours on one device, as nanoGPT
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[1]}")
    return folder


def command(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["bench", *argv])
    code = main()
    return code, capsys.readouterr()


# ---- the command line ----------------------------------------------------------------------------


def test_a_model_gives_the_sizes_that_flags_are_laid_over():
    config = configured(["--model=350M", "--batch_size=3"], TrainBench)
    assert (config.n_layer, config.n_embd, config.block_size, config.batch_size) == (
        24, 1024, 1024, 3)  # fmt: skip
    assert configured([], TrainBench).model == "124M"
    assert configured(["--model=XL"], DecodeBench).batch_size == 1


def test_the_models_have_nanogpts_sizes():
    millions = {"124M": 124, "350M": 354, "774M": 774, "XL": 1558}  # with V = 50257 and biases
    for name, size in millions.items():
        config = configured([f"--model={name}"], TrainBench)
        shapes = jax.eval_shape(
            network(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
        )
        counted = sum(x.size for x in jax.tree.leaves(shapes))
        assert counted / 1e6 == pytest.approx(size, rel=0.005)
        assert config.vocab_size == 50304
        assert not config.dropout


def test_the_char_models_are_those_of_the_preset_and_of_the_readmes_cpu_command():
    preset = configured(["train_shakespeare_char"], TrainBench)
    named = configured(["--model=char"], TrainBench)
    for key in ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "dropout"):
        assert getattr(preset, key) == getattr(named, key)
    config = configured(["--model=char_cpu"], TrainBench)
    assert (config.n_layer, config.n_embd, config.block_size, config.batch_size) == (4, 128, 64, 12)
    assert (config.dtype, config.compile, config.vocab_size) == ("float32", False, 65)


def test_a_configs_network_is_measured_too(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("n_layer = 2\nn_head = 2\nn_embd = 32\nlearning_rate = 1e-2\n")
    config = configured([str(path)], TrainBench)
    assert (config.model, config.n_layer, config.n_embd) == ("", 2, 32)
    path.write_text("model = 'XL'\n")
    with pytest.raises(UserError, match="model='XL' in a config file"):
        configured([str(path)], TrainBench)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian"], "unknown bench 'trian', did you mean 'train'?"),
        (["train", "--model=125M"], "unknown model '125M', did you mean '124M'? (there are 124M, "),
        (["train", "char"], "'char' is a network, not a config file: use --model=char"),
        (["compile", "--vocab_size=2000000"], "vocab_size=2000000 is out of range"),
        (["train", "--json=/dev/null/x"], "json='/dev/null/x' cannot be written (Not a directory)"),
        (["decode", "--profile=/dev/null/x"], "profile='/dev/null/x' cannot be written"),
        (["decode", "--steps=3"], "unknown key 'steps'"),
        (["train", "--steps=0"], "steps=0 is out of range"),
        (["train", "--nanogpt=/nowhere"], "nanogpt='/nowhere' is not a nanoGPT checkout"),
        (["train", "--nanogpt=x", "--profile=y"], "profile and nanogpt do not go together"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(argv, said, monkeypatch, capsys):
    for verb in ("train", "decode", "start_up"):  # nothing is measured
        monkeypatch.setattr(f"gpt_jax.bench.{verb}", None)
    code, shown = command(monkeypatch, capsys, *argv)
    assert code == 2
    assert said in shown.err
    assert shown.err.count("\n") == 1


def test_help_lists_the_verbs_and_each_verbs_help_its_keys(monkeypatch, capsys):
    code, shown = command(monkeypatch, capsys)
    assert (code, shown.out.strip()) == (0, HELP.strip())
    assert all(f"\n  {verb} " in HELP for verb in VERBS)
    for verb, kind in VERBS.items():
        with pytest.raises(SystemExit):
            command(monkeypatch, capsys, verb, "--help")
        shown = capsys.readouterr().out
        assert f"usage: python -m gpt_jax.bench {verb} " in shown
        assert "--model=" in shown
        assert kind.command.endswith(verb)


# ---- what is measured ----------------------------------------------------------------------------


def test_train_measures_the_real_step_and_says_so_in_every_field(tmp_path):
    config = configured([*TINY, "--steps=2", "--profile=" + str(tmp_path / "trace")], TrainBench)
    record, profile = train(config)
    assert record["loss_first"] == pytest.approx(math.log(64), rel=0.05)
    assert record["skipped"] == 0
    assert record["ms_min"] <= record["ms"] <= record["ms_max"]
    assert record["tokens_per_second"] == pytest.approx(8 * 16 / record["ms"] * 1000)
    assert record["mfu"] is None  # of a CPU no peak is known
    assert record["peak_from"] == "program"
    assert record["peak_gib"] > 0
    assert record["compile_seconds"] > 0
    assert record["dtype"] == "float32"
    assert (record["what"], record["program"], record["n_devices"]) == ("train", "gpt_jax", 8)
    assert {"jax", "device", "date", "attention", "remat", "micro_batches"} <= set(record)
    assert (record["matmul_dtype"], record["kernels"]) == ("auto", "auto")
    assert (record["bias"], record["activation"]) == (False, "gelu")
    assert [record[axis] for axis in ("data", "fsdp", "tensor")] == [8, 1, 1]

    assert Path(profile["trace"]).is_file()
    assert profile["source"].startswith("CPU thunks")
    assert profile["kernels"]
    assert any("f32[" in kernel["shape"] for kernel in profile["kernels"])
    assert profile["floor_ms"] is None
    page = written([record, profile])
    assert "tokens/s" in page
    assert "auto" not in page
    page8 = written([record | {"matmul_dtype": "float8", "kernels": "pallas"}])
    assert "float32, matmul_dtype float8, kernels pallas\n" in page8
    assert "kernel" in page
    assert json.loads(json.dumps([record, profile])) == [record, profile]


def test_mfu_is_the_formulas_flops_over_the_peak_that_is_given():
    config = configured([*TINY, "--peak_flops=1e9"], TrainBench)
    model = network(config)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    state = SimpleNamespace(params=params)
    t: Any = SimpleNamespace(mesh=make_mesh(), model=model, shape=(1, 8), state=state)
    n = 64 * 16 + 3 * 16 + 12 * 16 * 16  # wte, three LayerNorms, one block's products
    flops = flops_per_token(model.config, n) * 8 * 16 / 0.5
    found = rate(config, t, 0.5)
    assert found == {"tokens_per_second": 256, "mfu": pytest.approx(flops / (8 * 1e9))}


def test_decode_measures_generate(monkeypatch):
    lengths = []
    from gpt_jax.bench import decoding

    real = decoding.generate

    def spied(model, params, prompts, **rule):
        lengths.append((len(prompts), len(prompts[0]), rule["max_new_tokens"], rule["top_k"]))
        return real(model, params, prompts, **rule)

    monkeypatch.setattr(decoding, "generate", spied)
    argv = [*TINY, "--max_new_tokens=5", "--prompt_tokens=3", "--batch_size=2", "--top_k=4",
            "--matmul_dtype=float8"]  # fmt: skip
    (record,) = decode(configured(argv, DecodeBench))
    assert lengths == [(2, 3, 5, 4)] * 4  # it compiles, it warms up, and two measurements
    assert record["tokens_per_second"] == pytest.approx(2 * 5 / record["ms"] * 1000)
    assert record["ms_per_token"] == pytest.approx(record["ms"] / 5)
    assert record["matmul_dtype"] == "auto"  # float8 is for training
    assert "ms/token" in written([record])


def test_loader_measures_the_same_step_with_and_without_the_loader(monkeypatch):
    monkeypatch.setattr(loading, "N_TOKENS", 2**12)
    drawn = []
    real = loading.batches

    def spied(split, *rest):
        [file] = split.files
        drawn.append((len(file.tokens), file.path.suffix, file.tokens.dtype))
        return real(split, *rest)

    monkeypatch.setattr(loading, "batches", spied)
    resident, real_loader = loader(configured([*TINY, "--steps=2"], LoaderBench))
    assert drawn == [(2**12, ".bin", np.uint16)]
    assert (resident["batches"], real_loader["batches"]) == ("resident", "loader")
    expected = 100 * (real_loader["ms"] / resident["ms"] - 1)
    assert real_loader["slower_percent"] == pytest.approx(expected)
    assert "the loader costs" in written([resident, real_loader])


def test_random_rows_are_all_distinct():
    batch = measure.random_batch(configured(TINY, TrainBench), make_mesh(), 1, 8)
    tokens, targets = (np.asarray(x) for x in batch)
    assert tokens.shape == (1, 8, 16)
    assert len({row.tobytes() for row in tokens[0]}) == 8
    np.testing.assert_array_equal(tokens[..., 1:], targets[..., :-1])


def test_compile_measures_cold_and_warm_with_a_cache_of_its_own(tmp_path, monkeypatch):
    """The bench that it runs is a stub: what that measures has tests of its own."""
    stub = tmp_path / "stub.py"
    stub.write_text(
        "import json, os, pathlib, sys\n"
        "cache = pathlib.Path(os.environ['JAX_COMPILATION_CACHE_DIR'])\n"
        "record = {'compile_seconds': 1.0 if cache.exists() else 9.0}\n"
        "cache.mkdir(parents=True, exist_ok=True)\n"
        "record |= {key: 0 for key in sys.argv[1].split(',')}\n"
        "open(sys.argv[-1].removeprefix('--json='), 'a').write(json.dumps(record) + chr(10))\n"
    )
    keys = ("model,batch_size,n_layer,n_head,n_embd,block_size,vocab_size,dropout,bias,activation,"
            "dtype,matmul_dtype,attention,kernels,remat,scan_layers,data,fsdp,tensor,platform,"
            "device,n_devices,jax,date")  # fmt: skip
    monkeypatch.setattr(
        compiling, "own", lambda verb, argv: [sys.executable, str(stub), keys, *argv]
    )
    monkeypatch.setattr(compiling, "IMPORT", "print(0.5)")
    script = tmp_path / "train.py"
    script.write_text("print('step 0')\nprint('iter 0: loss 4', flush=True)\ninput()\n")
    monkeypatch.setattr(compiling, "SCRIPT", script)
    (record,) = start_up(configured([*TINY, "--repeats=1"], CompileBench), TINY)
    assert record["compile_cold_seconds"] == 9.0
    assert record["compile_warm_seconds"] == 1.0
    assert record["import_seconds"] == 0.5
    assert record["first_iteration_cold_seconds"] > 0
    assert "train.py to its first iteration" in written([record])
    script.write_text("import sys\nsys.exit('error: n_embd=7 is wrong')\n")
    with pytest.raises(RunError, match=r"^train\.py: n_embd=7 is wrong$"):
        start_up(configured([*TINY, "--repeats=1"], CompileBench), TINY)


def test_the_first_iteration_is_that_of_the_real_train_py(tmp_path):
    config = configured([*TINY, "--model=char_cpu"], CompileBench)
    compiling.made_up(config, tmp_path / "data" / "made_up")
    assert compiling.first_iteration(config, tmp_path, "cold") > 0


def test_train_py_is_given_every_key_that_is_not_its_default(tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.write_text(
        "import pathlib, sys\n"
        "pathlib.Path(__file__).with_name('flags').write_text(' '.join(sys.argv[2:]))\n"
        "print('iter 0: loss 4', flush=True)\n"
    )
    monkeypatch.setattr(compiling, "SCRIPT", script)
    argv = ["--kernels=reference", "--matmul_dtype=float8", "--activation=gelu_tanh",
            "--deterministic=True"]  # fmt: skip
    config = configured(["train_gpt2", *argv], CompileBench)
    compiling.first_iteration(config, tmp_path, "cold")
    flags = (tmp_path / "flags").read_text().split()
    assert set(argv) <= set(flags)
    assert not any(flag.startswith("--model=") for flag in flags)
    run = parse(flags)  # the last of two flags counts
    assert (run.activation, run.wandb_log, run.max_iters) == ("gelu_tanh", False, 1)


def test_made_up_data_of_many_symbols_are_read_back(tmp_path):
    config = configured([*TINY, "--vocab_size=70000"], CompileBench)
    compiling.made_up(config, tmp_path / "made_up")
    _, vocab_size, splits = open_dataset(str(tmp_path), "made_up", 16)
    assert vocab_size == 70000
    tokens = splits["train"].files[0].tokens
    assert tokens.dtype == np.uint32
    assert 2**16 < tokens.max() < 70000


def test_a_profile_that_fails_leaves_the_record_of_what_was_measured(monkeypatch, capsys, tmp_path):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(profiling, "read", full)
    config = configured([*TINY, f"--profile={tmp_path}", f"--json={tmp_path / 'x'}"], TrainBench)
    about = {"what": "ratio", "ratio": 1.5, "ratios": [1.5], "ratio_of_best": 1.5,
             "memory_ratio": None, "torch": "2"}  # fmt: skip
    work = lambda: jax.block_until_ready(jnp.ones(8) + 1)  # noqa: E731
    with pytest.raises(RunError, match=r"profile=.* failed \(No space left"):
        profiling.profiled(config, work, 1, "step", about)
    assert json.loads((tmp_path / "x").read_text()) == about
    assert "over nanoGPT" in capsys.readouterr().out


def test_too_large_a_batch_is_told_in_one_line(monkeypatch):
    config = configured(TINY, TrainBench)
    line = r"batch_size=8 does not fit.*--remat=dots, or "
    with pytest.raises(RunError, match=line + ".*--model=char_cpu"), memory_told(config):
        raise jax.errors.JaxRuntimeError("INTERNAL: Error: Out of memory allocating 9 bytes.")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(RunError, match=line + ".*MEM_FRACTION"), memory_told(config):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    with pytest.raises(ValueError, match="something else"), memory_told(config):
        raise ValueError("something else")


def test_peak_memory_is_the_devices_word_where_it_has_one():
    stats = SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 3 * 2**30})
    mesh = SimpleNamespace(devices=np.array([stats]))
    assert peak_memory(mesh, None) == {"peak_gib": 3.0, "peak_from": "device"}
    silent = make_mesh(devices=jax.devices()[:1])
    assert peak_memory(silent, None) == {"peak_gib": None, "peak_from": None}


def test_spread_is_median_least_and_most_in_milliseconds():
    assert spread([0.003, 0.001, 0.002]) == {"ms": 2.0, "ms_min": 1.0, "ms_max": 3.0}


def test_json_lines_come_last_or_are_added_to_a_file(tmp_path, capsys):
    record = {"what": "ratio", "ratio": 1.23456789, "ratios": [1.0], "ratio_of_best": 1.5,
              "memory_ratio": None, "torch": "2"}  # fmt: skip
    put_out([record], "")
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record | {"ratio": 1.23457}
    file = tmp_path / "all.jsonl"
    put_out([record], str(file))
    put_out([record], str(file))
    assert "{" not in capsys.readouterr().out
    assert len(file.read_text().splitlines()) == 2
    with pytest.raises(RunError, match="cannot be written"):
        put_out([record], str(tmp_path / "nowhere" / "x"))
    assert json.loads(capsys.readouterr().out)  # not lost


# ---- beside nanoGPT ------------------------------------------------------------------------------


def result(ms, rows=4, **more):
    record = {
        "what": "train", "program": "gpt_jax", "model": "124M", "batch_size": rows, "ms": ms,
        "ms_min": ms - 1, "ms_max": ms + 1, "tokens_per_second": rows * 16 * 1000 / ms,
        "mfu": 0.5, "peak_gib": 2.0, "peak_from": "device", "compile_seconds": 9.0, "jax": "1",
        "device": "d", "dtype": "float32", "block_size": 16, "date": "now", "platform": "cpu",
    }  # fmt: skip
    return record | more


def test_the_ratio_is_of_median_tokens_per_second():
    config = configured([*TINY, "--batch_size=4"], TrainBench)
    ours = [result(10.0), result(8.0), result(9.0)]
    seconds = [{"seconds": [s], "first": s + 2, "peak": 4 * 2**30, "loss": 1.0, "torch": "2"}
               for s in (0.018, 0.020, 0.016)]  # fmt: skip
    theirs = [record_of(config, ours[0], one) for one in seconds]
    assert theirs[0]["program"] == "nanoGPT"
    assert theirs[0]["tokens_per_second"] == pytest.approx(4 * 16 / 0.018)
    assert theirs[0]["mfu"] == pytest.approx(0.5 * 10 / 18)
    assert theirs[0]["compile_seconds"] == pytest.approx(2)
    found = compared(config, ours, theirs, "2")
    assert found["ratio"] == pytest.approx(18 / 9)
    assert found["ratios"] == pytest.approx([1.8, 2.5, 16 / 9])
    assert found["ratio_of_best"] == pytest.approx(16 / 7)
    assert found["memory_ratio"] == 0.5
    assert merged(ours)["ms"] == 9.0
    assert (merged(ours)["ms_min"], merged(ours)["ms_max"]) == (7.0, 11.0)


def test_each_side_may_have_its_own_batch_and_memory_is_then_not_compared():
    config = configured([*TINY, "--batch_size=4", "--nanogpt_batch_size=8"], TrainBench)
    theirs = record_of(config, result(10.0), {
        "seconds": [0.02], "first": 1, "peak": 2**30, "loss": 1.0, "torch": "2"})  # fmt: skip
    assert theirs["tokens_per_second"] == pytest.approx(8 * 16 / 0.02)
    found = compared(config, [result(10.0)], [theirs], "2")
    assert found["ratio"] == pytest.approx(1.0)
    assert found["batch_sizes"] == [4, 8]
    assert found["memory_ratio"] is None


def test_ours_and_nanogpts_run_in_turns_each_in_its_own_process(checkout, monkeypatch):
    argv = [*TINY, "--steps=1", "--repeats=1", f"--nanogpt={checkout}", "--rounds=1"]
    ours, theirs, ratio = in_turns("train", configured(argv, TrainBench), argv)
    assert (ours["program"], theirs["program"], ratio["what"]) == ("gpt_jax", "nanoGPT", "ratio")
    assert ours["loss_first"] == pytest.approx(math.log(64), rel=0.05)
    assert theirs["torch"] == ratio["torch"] == "9.9"
    assert ratio["ratio"] == pytest.approx(ours["tokens_per_second"] / theirs["tokens_per_second"])
    lines = (checkout / "model.py.log").read_text().splitlines()
    assert lines[0] == "(8, 16) compile"
    # one whole iteration of nanoGPT's train.py, the first, the warm ones and the one measured
    assert lines[1:] == ["(8, 16) backward clip 1.0 step zero"] * 6
    assert "over nanoGPT" in written([ours, theirs, ratio])


def test_nanogpts_generate_is_called_as_its_sample_py_calls_it(checkout):
    argv = [*TINY, "--batch_size=2", "--repeats=1", f"--nanogpt={checkout}", "--prompt_tokens=3",
            "--nanogpt_new_tokens=7", "--top_k=0"]  # fmt: skip
    config = configured(argv, DecodeBench)
    task = task_of(config, {"path": str(checkout), "device": "auto"}, result(1.0))
    assert not task["compile"]
    assert task["device"] == "cpu"  # where ours ran
    found = theirs_of(config, task)
    assert (checkout / "model.py.log").read_text().splitlines() == [
        "(2, 3) 4 0.8 None", "(2, 3) 7 0.8 None"]  # fmt: skip
    record = record_of(config, result(1.0), found)
    assert record["max_new_tokens"] == 7
    assert record["tokens_per_second"] == pytest.approx(2 * 7 / found["seconds"][0])


@pytest.mark.parametrize(
    ("torch", "model", "kind", "said"),
    [
        ("raise ModuleNotFoundError(\"No module named 'torch'\")", MODEL, UserError,
         "has no torch.*--nanogpt_python"),
        (TORCH, "import torch\n", UserError, "cannot be imported .*cannot import name 'GPT'"),
        (TORCH + "\ncuda.is_available = lambda: False", MODEL, RunError, "finds no GPU"),
    ],
)  # fmt: skip
def test_what_nanogpts_side_lacks_is_said_before_ours_runs(
    torch, model, kind, said, checkout, monkeypatch
):
    (checkout.parent / "torch.py").write_text(torch)
    (checkout / "model.py").write_text(model)
    monkeypatch.setattr("gpt_jax.bench.nanogpt.ours_of", None)
    argv = [f"--nanogpt={checkout}", "--device=cuda:0"]
    with pytest.raises(kind, match=said):
        in_turns("train", configured(argv, TrainBench), argv)


def test_a_child_that_fails_or_hangs_is_one_line():
    python = [sys.executable, "-c"]
    program = "import sys; print('error: n_head is wrong', file=sys.stderr); sys.exit(2)"
    with pytest.raises(UserError, match=r"^ours: n_head is wrong$"):
        output([*python, program], "ours", 60)
    with pytest.raises(RunError, match=r"^theirs: ValueError: 7$"):
        output([*python, "raise ValueError(7)"], "theirs", 60)
    with pytest.raises(RunError, match=r"took more than --timeout=0.2 seconds"):
        output([*python, "input()\nimport time; time.sleep(99)"], "theirs", 0.2, "x\n")
    with pytest.raises(UserError, match="'/no/python' cannot be run"):
        output(["/no/python"], "theirs", 60)


# ---- the profile ---------------------------------------------------------------------------------


TRACE = """
planes {
  name: "/device:GPU:0"
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
  stat_metadata { key: 2 value { id: 2 name: "hlo_module" } }
  event_metadata { key: 1 value { id: 1 name: "loop_add_fusion_1" } }
  event_metadata { key: 2 value { id: 2 name: "nvjet_128x256" } }
  lines {
    id: 1 name: "Stream #20(Compute)" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 5000 duration_ps: 3000
             stats { metadata_id: 1 str_value: "while.2/loop_add_fusion.1" }
             stats { metadata_id: 2 str_value: "jit_train_step" } }
  }
  lines {
    id: 2 name: "Stream #21(Compute)" timestamp_ns: 1000
    events { metadata_id: 2 offset_ps: 1000 duration_ps: 2000 }
  }
  lines { id: 3 name: "XLA Ops" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 5000 duration_ps: 3000 } }
}
planes { name: "/device:GPU:1" lines { id: 1 name: "Stream #1"
  events { metadata_id: 1 duration_ps: 9 } } event_metadata { key: 1 value { id: 1 name: "x" } } }
"""


def test_of_a_gpus_trace_the_streams_of_the_first_device_are_read(tmp_path):
    path = tmp_path / "x.xplane.pb"
    path.write_bytes(ProfileData.text_proto_to_serialized_xspace(TRACE))
    where, kernels = read(path)
    assert where == "device kernels"
    assert kernels == [
        Kernel("nvjet_128x256", "", "", 1001, 1003),
        Kernel("loop_add_fusion_1", "jit_train_step", "loop_add_fusion.1", 1005, 1008),
    ]


def test_a_trace_without_kernels_is_said_to_have_none(tmp_path):
    path = tmp_path / "x.xplane.pb"
    path.write_bytes(ProfileData.text_proto_to_serialized_xspace('planes { name: "/host:CPU" }'))
    assert read(path) == ("no kernels in the trace", [])


def test_idle_time_is_what_no_kernel_covers_and_overlaps_count_once():
    kernels = [
        Kernel("a", "", "a", 0, 10), Kernel("b", "", "b", 5, 8), Kernel("c", "", "c", 7, 12),
        Kernel("d", "", "d", 20, 30),
    ]  # fmt: skip
    assert busy_time(kernels) == (22, 30)
    assert busy_time([]) == (0, 0)


def test_kernels_are_grouped_by_name_without_number_and_by_shape():
    found = {
        ("m", "loop_add_fusion.1"): Floor("fusion", "f32[8]", 100, 0),
        ("m", "loop_add_fusion.22"): Floor("fusion", "f32[8]", 100, 0),
        ("m", "loop_add_fusion"): Floor("fusion", "f32[9]", 100, 0),
        ("m", "dot.3"): Floor("dot", "f32[8]", 100, 4000),
        ("", "loop_add_fusion.22"): Floor("fusion", "f32[8]", 100, 0),
    }
    kernels = [
        Kernel("loop_add_fusion_1", "m", "loop_add_fusion.1", 0, 200),
        Kernel("loop_add_fusion_22", "m", "call.7", 200, 400),  # of a CUDA graph
        Kernel("loop_add_fusion", "m", "loop_add_fusion", 400, 500),
        Kernel("gemm", "m", "dot.3", 500, 1500),
        Kernel("split_k_reduce", "m", "dot.3", 1500, 1600),  # the same product: one floor
        Kernel("memcpy", "", "", 1600, 1610),
    ]
    groups = grouped(kernels, found, (1e9, 1e10))
    assert [(g.name, g.shape, g.launches, g.time, g.floor, g.bound) for g in groups] == [
        ("dot", "f32[8]", 2, 1100, pytest.approx(400), "products"),
        ("loop_add_fusion", "f32[8]", 2, 400, pytest.approx(200), "memory"),
        ("loop_add_fusion", "f32[9]", 1, 100, pytest.approx(100), "memory"),
        ("memcpy", "", 1, 10, None, ""),
    ]
    assert all(g.floor is None for g in grouped(kernels, found, None))


def test_the_programs_of_this_process_have_floors_by_module_and_instruction():
    @jax.jit
    def a_product_of_its_own(x):
        return jnp.tanh(x @ x)

    x = jnp.ones((128, 128))
    compiled = a_product_of_its_own.lower(x).compile()
    found = programs({"jit_a_product_of_its_own"})
    assert found
    assert {module for module, _ in found} == {"", "jit_a_product_of_its_own"}
    assert sum(f.flops for (module, _), f in found.items() if module) == 2 * 128**3
    assert floors(compiled.as_text()).keys() == {name for module, name in found if module}


def test_a_products_floor_is_its_flops_and_its_operands():
    x, w = jnp.ones((256, 128)), jnp.ones((128, 512))
    found = floors(jax.jit(jnp.dot).lower(x, w).compile().as_text())
    assert sum(one.flops for one in found.values()) == 2 * 256 * 128 * 512
    assert sum(one.bytes for one in found.values()) == 4 * (256 * 128 + 128 * 512 + 256 * 512)


def module(body, more=""):
    return f"HloModule m\n{more}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"


def test_a_fusion_that_cuts_out_a_piece_reads_that_piece():
    inside = """%fused (p.0: f32[12,64]) -> f32[1,64] {
  %p.0 = f32[12,64]{1,0} parameter(0)
  %p.1 = f32[1,64]{1,0} parameter(1)
  %b = f32[12,64]{1,0} bitcast(%p.0)
  %s = f32[1,64]{1,0} slice(%b), slice={[3:4], [0:64]}
  ROOT %add = f32[1,64]{1,0} add(%s, %p.1)
}
"""
    text = module(
        "  %w = f32[12,64]{1,0} parameter(0)\n  %x = f32[1,64]{1,0} parameter(1)\n"
        "  ROOT %f.1 = f32[1,64]{1,0} fusion(%w, %x), kind=kLoop, calls=%fused",
        inside,
    )
    assert floors(text) == {"f.1": Floor("fusion", "f32[1,64]", 3 * 64 * 4, 0)}


def test_a_fusion_that_updates_in_place_writes_the_update():
    inside = """%fused (p.0: bf16[12,64]) -> bf16[12,64] {
  %p.0 = bf16[12,64]{1,0} parameter(0)
  %p.1 = bf16[1,64]{1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %u = bf16[12,64]{1,0} dynamic-update-slice(%p.0, %p.1, %p.2, %zero)
}
"""
    text = module(
        "  %w = bf16[12,64]{1,0} parameter(0)\n  %x = bf16[1,64]{1,0} parameter(1)\n"
        "  %i = s32[] parameter(2)\n"
        "  ROOT %f = bf16[12,64]{1,0} fusion(%w, %x, %i), kind=kLoop, calls=%fused",
        inside,
    )
    assert floors(text)["f"].bytes == 2 * 64 * 2 + 4


def test_the_libraries_products_count_without_their_room_to_work_in():
    dims = '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}'
    config = f'backend_config={{"gemm_backend_config":{{"dot_dimension_numbers":{dims}}}}}'
    call = '"__cublas$lt$matmul", ' + config
    text = module(
        "  %x = bf16[64,32]{1,0} parameter(0)\n  %w = bf16[32,16]{1,0} parameter(1)\n"
        "  %y = f8e4m3fn[64,32]{1,0} parameter(2)\n"
        "  %c.1 = (bf16[64,16]{1,0}, s8[33554432]{0}) custom-call(%x, %w), "
        f"custom_call_target={call}\n"
        "  ROOT %c.2 = (bf16[64,16]{1,0}, s8[4]{0}) custom-call(%y, %w), "
        f"custom_call_target={call}"
    )
    found = floors(text)
    flops = 2 * 64 * 32 * 16
    assert found["c.1"] == Floor(
        "__cublas$lt$matmul", "bf16[64,16], ...", 2 * (64 * 32 + 32 * 16 + 64 * 16), flops
    )
    assert found["c.2"].flops == flops / 2  # float8, at twice the speed


def test_attentions_floor_is_its_products_causal_by_half():
    operands = "%q, %q, %q"
    text = module(
        "  %q = bf16[2,64,3,16]{3,2,1,0} parameter(0)\n"
        f"  ROOT %a = (bf16[2,64,3,16]{{3,2,1,0}}, u8[0]{{0}}) custom-call({operands}), "
        'custom_call_target="__cudnn$fmhaSoftmax", backend_config={"intermediate_tensor_shape": '
        '{"dimensions": ["2", "3", "64", "64"]}, "mask_type": "CAUSAL"}'
    )
    assert floors(text)["a"].flops == 2 * 2 * (2 * 3 * 64 * 64) * 16 / 2


def test_a_floor_is_the_longer_of_moving_and_multiplying():
    assert Floor("dot", "", 100, 50).seconds(bandwidth=10, peak=10) == 10
    assert Floor("dot", "", 100, 500).seconds(bandwidth=10, peak=10) == 50


def test_presets_are_flags_that_exist():
    known = set(TrainConfig.__dataclass_fields__) | {"vocab_size"}
    assert all(set(sizes) <= known for sizes in MODELS.values())
