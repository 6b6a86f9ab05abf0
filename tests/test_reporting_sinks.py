"""metrics.jsonl, TensorBoard and Weights & Biases: each number once, and the same in all three."""

import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import train
from gpt_jax import checkpoint, reporting
from gpt_jax.config import GPTConfig, TrainConfig
from gpt_jax.errors import RunError, UserError
from gpt_jax.model import GPT
from gpt_jax.prepare import prepare
from gpt_jax.reporting import sinks
from gpt_jax.reporting.memory import memory
from gpt_jax.reporting.norms import as_floats, gradient_norms, parameter_norms
from gpt_jax.sharding import batch_sharding, make_mesh, state_sharding
from gpt_jax.train_step import init_state, make_train_step

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "run" / "metrics.jsonl"
TEXT = "".join(f"line {i}: to be, or not to be, that is the question.\n" for i in range(400))
TINY = [
    "train_shakespeare_char", "--dataset=text", "--n_layer=2", "--n_head=2", "--n_embd=16",
    "--block_size=16", "--batch_size=8", "--gradient_accumulation_steps=2", "--dropout=0.1",
    "--eval_interval=4", "--eval_iters=2", "--log_interval=1", "--warmup_iters=2",
    "--always_save_checkpoint=True", "--peak_flops=1e12", "--out_dir=out", "--log_norms",
    "--tensorboard", "--wandb_log",
]  # fmt: skip
PER_ITER = 16 * 16  # tokens


def make_data(folder: Path) -> None:
    (folder / "text.txt").write_text(TEXT, "utf-8")
    prepare("text", folder / "data/text", input=folder / "text.txt", tokenizer="char",
            log=lambda _: None)  # fmt: skip


def start(folder: Path, *flags: str) -> subprocess.Popen:
    """Start a run as a user does, in a process group of its own."""
    alone = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    environment = {
        **os.environ, "XLA_FLAGS": alone.strip(), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1",
        "WANDB_MODE": "offline", "WANDB_DIR": str(folder), "HOME": str(folder),
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *TINY, *flags], cwd=folder, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that Ctrl-C stops, whose last save is lost, and that goes on from the one before."""
    if sys.platform == "win32":
        pytest.skip("a process group that can be sent Ctrl-C is POSIX's")
    for package in ("tensorboardX", "tensorboard", "wandb.proto"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("run")
    make_data(folder)
    said = []
    with start(folder, "--max_iters=100000") as first:
        for line in first.stdout or []:
            said.append(line)
            if line.startswith("iter 9:"):
                # as a terminal does: it also hits W&B's service
                os.killpg(first.pid, signal.SIGINT)
    assert first.returncode == 0, "".join(said)
    assert said[-1] == "  python train.py --init_from=resume\n", "".join(said)
    out = folder / "out"
    *_, before, last = checkpoint.steps(str(out))
    told = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert told[-1]["iter"] == last - 1  # all of which the rest of the run will say again
    shutil.rmtree(out / "checkpoints" / str(last))
    with start(folder, f"--max_iters={last + 3}", "--init_from=resume") as second:
        said = second.stdout.read() if second.stdout else ""
    assert second.returncode == 0, said
    assert f"resuming from out, iteration {before}" in said
    return SimpleNamespace(folder=folder, out=out, before=before, last=last, end=last + 3)


def entries(out: Path) -> list[dict]:
    """What metrics.jsonl tells, without where the run went on, which the others need not know."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{name: x for name, x in line.items() if name != "resumed"} for line in lines]


def is_step(entry: dict) -> bool:
    return "loss" in entry


def test_metrics_jsonl_holds_every_number_of_an_iteration_once_over_a_resume(run):
    steps = [e for e in entries(run.out) if is_step(e)]
    assert [e["iter"] for e in steps] == [*range(run.end)]
    layers = ["wte", "wpe", "h.0", "h.1", "ln_f"]
    names = {
        "iter", "loss", "lr", "grad_norm", "param_norm", "skipped", "tokens", "tokens_per_second",
        "mfu", "time", "host_memory_peak",
        *(f"{kind}_norm/{layer}" for kind in ("grad", "param") for layer in layers),
    }  # fmt: skip
    assert all(e.keys() == names for e in steps)
    assert [e["tokens"] for e in steps] == [(i + 1) * PER_ITER for i in range(run.end)]
    times = [e["time"] for e in entries(run.out)]
    assert times == sorted(times)
    assert times[-1] > times[0] == 0
    assert all(type(e["time"]) is float and type(e["tokens"]) is int for e in steps)
    evals = [e for e in entries(run.out) if not is_step(e)]
    assert all(
        e.keys() == {"iter", "train_loss", "val_loss", "lr", "tokens", "time"} for e in evals
    )
    assert [e["tokens"] for e in evals] == [e["iter"] * PER_ITER for e in evals]
    for e in steps:
        for kind in ("grad_norm", "param_norm"):
            of_layers = [x for name, x in e.items() if name.startswith(f"{kind}/")]
            np.testing.assert_allclose(math.hypot(*of_layers), e[kind], rtol=1e-5)


def test_tensorboard_reads_the_same_numbers_each_once_over_a_resume(run):
    from tensorboard.backend.event_processing import event_accumulator

    assert len([*(run.out / "tensorboard").iterdir()]) == 2
    reader = event_accumulator.EventAccumulator(str(run.out / "tensorboard"), {"scalars": 0})
    reader.Reload()
    found = {
        tag: [(event.step, event.value) for event in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }
    expected: dict[str, list] = {}
    for e in entries(run.out):
        if is_step(e):
            numbers = {name: x for name, x in e.items() if name != "iter"}
            numbers["mfu"] *= 100
        else:
            numbers = {"train/loss": e["train_loss"], "val/loss": e["val_loss"]}
        for name, x in numbers.items():
            expected.setdefault(name, []).append((e["iter"], float(np.float32(x))))
    assert found == expected


def wandb_records(path: Path):
    """Read a .wandb file: LevelDB's log format, of protocol buffers."""
    from wandb.proto import wandb_internal_pb2 as pb

    data, at, record = path.read_bytes(), 7, b""  # after its magic number
    while at < len(data):
        left = 2**15 - at % 2**15  # of the block; a header has 7 bytes and is never cut
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield pb.Record.FromString(record)
            record = b""


def wandb_rows(path: Path) -> dict[int, dict]:
    """The rows of a run, by W&B's own count of them."""
    rows = {}
    for record in wandb_records(path):
        if record.HasField("history"):
            row = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            rows[row.pop("_step")] = {k: x for k, x in row.items() if not k.startswith("_")}
    return rows


def test_weights_and_biases_has_the_same_numbers_under_one_id_over_a_resume(run):
    files = sorted(run.folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    ids = {record.run.run_id for path in files for record in wandb_records(path)} - {""}
    assert len(ids) == 1
    meta = checkpoint.read_meta(str(run.out), run.end)
    assert {meta["wandb_id"]} == ids
    parts = [wandb_rows(path) for path in files]
    for step in parts[0].keys() & parts[1].keys():  # said twice, in the same place
        assert parts[0][step]["iter"] == parts[1][step]["iter"] >= run.before
    rows = [row for _, row in sorted((parts[0] | parts[1]).items())]
    expected, mfu = [], {}
    for e in entries(run.out):
        names = {"train_loss": "train/loss", "val_loss": "val/loss"}
        e = {names.get(name, name): x for name, x in e.items()}
        if "mfu" in e:
            mfu[e["iter"]] = e["mfu"] = e["mfu"] * 100
        elif e["iter"] not in (0, run.before):  # the speed so far is not in the file
            e["mfu"] = mfu[e["iter"] - 1]
        else:
            e["mfu"] = 0.0
        expected.append(e)
    order = [(row["iter"], "loss" in row) for row in rows]
    assert order == sorted(order)  # an evaluation before the update
    by_place = {(e["iter"], "loss" in e): e for e in expected}
    for place, row in zip(order, rows, strict=True):
        assert row == by_place[place]
    evals = [row for row in rows if "val/loss" in row]
    assert {"iter", "train/loss", "val/loss", "lr", "mfu"} <= set(evals[0])  # nanoGPT's


# --- norms


@pytest.fixture(autouse=True, scope="module")
def compiled_in_haste():
    jax.config.update("jax_disable_most_optimizations", True)  # half the time, the same sums
    yield
    jax.config.update("jax_disable_most_optimizations", False)


MODEL = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=32))
LOGS = TrainConfig(log_norms=True)


def fresh_state(tx):
    params = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.array(rng.normal(0, 0.5, x.shape), x.dtype), params)
    return init_state(params, tx)


def batch(B):
    ids = np.random.default_rng(1).integers(0, 32, (2, 2, B, 8), dtype=np.int32)
    return ids[0], ids[1]


def slow_norms(name, tree):
    """Each layer's norm by itself, in float64."""

    def norm(leaves):
        return math.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in leaves))

    result = {f"{name}/{key}": norm(jax.tree.leaves(tree[key])) for key in ("wte", "wpe", "ln_f")}
    for layer in range(MODEL.config.n_layer):
        result[f"{name}/h.{layer}"] = norm([x[layer] for x in jax.tree.leaves(tree["h"])])
    return result


@pytest.fixture(scope="module")
def reference():
    """Norms of a gradient and of the parameters that it makes, by plain gradient descent."""
    state, (tokens, targets) = fresh_state(optax.sgd(1.0)), batch(8)
    before = jax.device_get(state.params)
    step = make_train_step(MODEL, optax.sgd(1.0))
    after = jax.device_get(step(state, tokens, targets)[0].params)
    gradient = jax.tree.map(np.subtract, before, after)
    norms = slow_norms("grad_norm", gradient) | slow_norms("param_norm", after)
    for kind in ("grad_norm", "param_norm"):
        norms[kind] = math.hypot(*(x for name, x in norms.items() if name.startswith(kind)))
    return norms


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=["one device", "data fsdp tensor"])
def test_norms_of_layers_are_those_of_a_slow_reference_on_one_device_and_on_eight(reference, sizes):
    mesh = make_mesh("auto", *sizes)
    state = fresh_state(optax.sgd(1.0))
    state = jax.device_put(state, state_sharding(mesh, state))
    tokens, targets = jax.device_put(batch(8), batch_sharding(mesh, 3))
    step = make_train_step(MODEL, optax.sgd(1.0), mesh, measure=gradient_norms(LOGS))
    state, metrics = step(state, tokens, targets)
    metrics |= parameter_norms(LOGS, mesh)(state.params)
    assert all(x.is_fully_replicated for x in metrics.values())  # each process can read them
    state, _ = step(state, tokens, targets)  # donates what the norms are of
    found = as_floats(jax.device_get(metrics))
    assert {name for name in found if "norm" in name} == reference.keys()
    for name, norm in reference.items():
        np.testing.assert_allclose(found[name], norm, rtol=2e-4, err_msg=name)


def test_without_log_norms_a_step_measures_nothing_and_the_parameters_norm_is_one_number():
    plain = TrainConfig()
    step = make_train_step(MODEL, optax.sgd(1.0), measure=gradient_norms(plain))
    state, metrics = step(fresh_state(optax.sgd(1.0)), *batch(8))
    assert metrics.keys() == {"loss", "grad_norm", "skipped", "skipped_in_a_row"}
    assert parameter_norms(plain, make_mesh())(state.params).keys() == {"param_norm"}


# --- Report


@pytest.fixture
def report(tmp_path):
    """Make a report of a run in tmp_path/out that goes on from ``meta``."""
    made = []

    def make(meta, wandb=None, **changes):
        (tmp_path / "out").mkdir(exist_ok=True)
        config = TrainConfig(out_dir=str(tmp_path / "out"), **changes)
        params = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
        made.append(
            reporting.Report(config, make_mesh(), MODEL, params["params"], 100, meta, wandb)
        )
        return made[-1]

    yield make
    for one in made:
        one.close()


def write_log(tmp_path, *lines) -> Path:
    path = tmp_path / "out" / "metrics.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def meta(iteration, A=2, B=3, T=5):
    sizes = {"gradient_accumulation_steps": A, "batch_size": B, "block_size": T}
    return {"iter": iteration, "config": sizes}


def test_tokens_and_time_go_on_where_a_run_of_another_batch_size_ended(report, tmp_path):
    write_log(
        tmp_path,
        {"iter": 0, "train_loss": 3.0, "val_loss": 3.0, "tokens": 0, "time": 0.0},
        {"iter": 4, "loss": 3.0, "tokens": 150, "time": 7.5, "tokens_per_second": 15.0},
        {"iter": 9, "loss": 3.0, "tokens": 300, "time": 99.0, "tokens_per_second": 15.0},
    )
    one = report(meta(7))  # 5 are told of, 2 of 30 tokens are not
    assert one.place(7) == {"tokens": 210, "time": 7.5 + 60 / 15}
    assert one.place(9)["tokens"] == 210 + 200


def test_an_evaluation_at_the_iteration_that_a_run_goes_on_from_says_its_tokens_and_time(
    report, tmp_path
):
    path = write_log(
        tmp_path,
        {"iter": 4, "loss": 3.0, "tokens": 150, "time": 7.5, "tokens_per_second": 15.0},
        {"iter": 7, "train_loss": 3.0, "val_loss": 3.0, "tokens": 1000, "time": 8.25},
    )
    one = report(meta(7))
    assert one.place(7) == {"tokens": 1000, "time": 8.25}
    assert [json.loads(line)["iter"] for line in path.read_text().splitlines()] == [4]


def test_metrics_of_an_older_version_are_gone_on_from(report, tmp_path):
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "metrics.jsonl"
    shutil.copy(GOLDEN, path)
    before = reporting.entries(GOLDEN)
    assert len(before) == len(GOLDEN.read_text().splitlines())
    last = before[-1][1]["iter"]
    one = report(meta(last))
    assert one.place(last) == {"tokens": last * 30, "time": 0.0}  # the config says the first
    kept = [line for line, entry in before if entry["iter"] < last]
    assert path.read_text().splitlines() == kept


@pytest.mark.parametrize(
    "line",
    [
        {"tokens": "150", "time": 7.5}, {"tokens": -1, "time": 7.5}, {"tokens": 2**99, "time": 7.5},
        {"tokens": 150, "time": float("nan")}, {"tokens": 150, "time": float("inf")},
        {"tokens": 150, "time": -1.0}, {"tokens": True, "time": 7.5}, {"tokens": 150, "time": None},
        {"tokens": 150}, {"time": 7.5},
    ],
)  # fmt: skip
def test_bad_numbers_in_a_line_are_passed_over(report, tmp_path, line):
    write_log(
        tmp_path,
        {"iter": 1, "loss": 3.0, "tokens": 60, "time": 2.0},
        {"iter": 2, "loss": 3.0} | line,
    )
    assert report(meta(3)).place(3) == {"tokens": 60 + 30, "time": 2.0}


@pytest.mark.parametrize("speed", [0.0, float("nan"), "fast", None, -1.0])
def test_a_speed_that_is_none_gives_a_time_that_is_a_number(report, tmp_path, speed):
    write_log(
        tmp_path,
        {"iter": 1, "loss": 3.0, "tokens": 60, "time": 2.0, "tokens_per_second": speed},
    )
    assert math.isfinite(report(meta(3)).place(3)["time"])


@pytest.mark.parametrize("size", [0, "12", None, 2**40, 1.5])
def test_a_saved_config_without_sizes_leaves_the_tokens_to_this_runs(report, size):
    assert report(meta(3, B=size)).place(3)["tokens"] == 3 * 100


def test_a_run_with_nothing_logged_before_counts_its_iterations_of_before(report):
    """nanoGPT's: it has no metrics.jsonl and no such config."""
    assert report({"iter": 5, "best_val_loss": 1.0}).place(5) == {"tokens": 500, "time": 0.0}


def test_only_iterations_that_are_logged_pay_for_the_parameters_norm(report):
    one = report({"iter": 0}, log_interval=5)
    one.norms_of = lambda params: {"param_norm": params}
    assert [i for i in range(12) if one.norms(i, 1.0)] == [0, 5, 10]


def test_memory_is_that_of_the_fullest_device_and_left_out_where_it_is_not_counted():
    def device(**stats):
        return SimpleNamespace(memory_stats=lambda: stats or None)

    full, other = ({"bytes_in_use": n, "peak_bytes_in_use": 2 * n} for n in (50, 10))
    mesh = SimpleNamespace(local_devices=[device(**other), device(**full), device()])
    found = memory(mesh)  # pyright: ignore
    assert (found["device_memory"], found["device_memory_peak"]) == (50, 100)
    assert memory(make_mesh()).keys() <= {"host_memory_peak"}
    if sys.platform != "win32":
        assert memory(make_mesh())["host_memory_peak"] > 2**26  # bytes: JAX alone takes more


# --- Weights & Biases and TensorBoard that are absent, or fail


class FakeRun:
    """What is used of a wandb.Run."""

    def __init__(self, step=0, fails=False):
        self.id, self.step, self.fails, self.rows, self.ended = "abc", step, fails, {}, []

    def define_metric(self, *_, **__):
        pass

    def log(self, row, step, commit):
        if self.fails:
            raise ConnectionResetError("the service\nhas gone")
        assert step >= self.step
        assert commit
        self.rows[step] = row

    def finish(self, exit_code):
        self.ended.append(exit_code)


EVALUATION = {"iter": 4, "train_loss": 2.5, "val_loss": 2.75, "lr": 1e-3, "tokens": 9, "time": 1.0}
STEP = {"iter": 4, "loss": 2.5, "lr": 1e-3, "mfu": 0.25}


def test_rows_that_weights_and_biases_has_already_are_not_sent_again():
    fake = FakeRun(step=9)
    sink = sinks.Wandb(fake)
    for entry in (EVALUATION, STEP, {**EVALUATION, "iter": 5}):
        sink.write(entry)
    assert [(step, row["iter"]) for step, row in fake.rows.items()] == [(9, 4), (10, 5)]
    assert fake.rows[10]["mfu"] == fake.rows[9]["mfu"] == 25  # percent


def test_weights_and_biases_that_fail_in_training_are_told_of_once_and_left_alone(capsys):
    fake = FakeRun(fails=True)
    sink = sinks.Wandb(fake)
    for _ in range(3):
        sink.write(STEP)
    sink.close()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "takes no more (ConnectionResetError: the service has gone): going on without" in said
    assert fake.ended == []


def test_a_weights_and_biases_run_has_failed_where_an_exception_ended_it():
    fine, failed = FakeRun(), FakeRun()
    sinks.Wandb(fine).close()
    try:
        raise RunError("a disk is full")
    except RunError:
        sinks.Wandb(failed).close()
    assert (fine.ended, failed.ended) == ([0], [1])


def command(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, "--max_iters=1", *flags])
    return train.main()


@pytest.mark.parametrize(
    ("package", "flags", "line"),
    [
        ("wandb", ["--tensorboard=False"], "wandb_log=True needs Weights & Biases: pip install "
         "'gpt_jax[wandb]', or --wandb_log=False"),
        ("tensorboardX", ["--wandb_log=False"], "tensorboard=True needs TensorBoard: pip install "
         "'gpt_jax[tensorboard]', or --tensorboard=False"),
    ],
)  # fmt: skip
def test_a_missing_package_is_told_of_in_a_line_before_anything_is_done(
    tmp_path, monkeypatch, capsys, package, flags, line
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    assert command(monkeypatch, *flags) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
    assert [*tmp_path.iterdir()] == []


def test_a_folder_of_weights_and_biases_runs_is_not_the_package(tmp_path, monkeypatch):
    """Its runs lie in ./wandb, which Python takes for a package without an __init__."""
    (tmp_path / "wandb").mkdir()
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match=re.escape("pip install 'gpt_jax[wandb]'")):
        sinks.check_installed(TrainConfig(wandb_log=True))


def test_only_a_process_that_reports_needs_the_packages(monkeypatch):
    for package in ("wandb", "tensorboardX"):
        monkeypatch.setitem(sys.modules, package, None)
    sinks.check_installed(TrainConfig(wandb_log=True, tensorboard=True, eval_only=True))
    monkeypatch.setattr(sinks, "is_first", lambda: False)
    sinks.check_installed(TrainConfig(wandb_log=True, tensorboard=True))
    assert sinks.start_wandb(TrainConfig(wandb_log=True), None) is None


def test_weights_and_biases_that_do_not_start_are_told_of_in_a_line_and_leave_all_as_it_was(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    make_data(tmp_path)
    (tmp_path / "out" / "checkpoints" / "7").mkdir(parents=True)  # of an earlier run

    def init(**_):
        raise ValueError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    assert command(monkeypatch, "--tensorboard=False", "--n_layer=1") == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line == (
        "error: Weights & Biases cannot be started: ValueError: no API key: run `wandb login`, set "
        "WANDB_MODE=offline to send it later, or give --wandb_log=False"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoints"]


def test_a_disk_that_takes_no_more_events_ends_the_run_with_the_reason(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    sink = sinks.TensorBoard(tmp_path / "tensorboard", 0)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sink.writer, "write_event", full)
    with pytest.raises(RunError, match=r"tensorboard cannot be written .*No space left"):
        sink.write(STEP)
    sink.close()
