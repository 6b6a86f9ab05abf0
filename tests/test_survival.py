"""Runs that meet with a fault: what was saved stays, they end in a line, and they go on."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from test_end_to_end import TINY, command, entries, environment, losses, run, same_run
from test_end_to_end import work as work

import train
from gpt_jax import checkpoint, load
from gpt_jax.config import TrainConfig
from gpt_jax.integrity import token_file
from gpt_jax.runtime import Stop
from gpt_jax.start import make_room

ROOT = Path(__file__).parents[1]
TRAIN = str(ROOT / "train.py")
SAVING = [*TINY, "--save_interval=2", "--eval_interval=100", "--keep=9"]


def damage(out_dir, step, item="params"):
    """Flip a bit of each byte of what Orbax keeps arrays in: some of the files are never read."""
    folder = Path(out_dir, "checkpoints", str(step), item)
    for path in [folder / "metadata"] if item == "meta" else folder.rglob("d/*"):
        path.write_bytes(bytes(byte ^ 16 for byte in path.read_bytes()))


def steps(out_dir):
    return checkpoint.steps(out_dir)


# --- damaged checkpoints


@pytest.fixture
def whole(monkeypatch):
    """An undisturbed run, and another that was stopped after iteration 6."""
    assert run(train, monkeypatch, *SAVING, "--out_dir=whole") == 0
    assert run(train, monkeypatch, *SAVING, "--max_iters=6") == 0


RESUME = [*SAVING, "--init_from=resume"]


@pytest.mark.parametrize("item", ["params", "optimizer", "meta"])
def test_a_damaged_checkpoint_is_named_and_set_aside_and_the_run_goes_on_from_the_one_before(
    whole, monkeypatch, capsys, item
):  # C17
    damage("out", 6, item)
    assert run(train, monkeypatch, *RESUME) == 0
    said = capsys.readouterr()
    assert re.fullmatch(r"passed over: \S+/out/checkpoints/6/.* .*\n", said.err)
    assert "resuming from out, iteration 4" in said.out
    same_run("whole", "out", 10)
    assert steps("out") == [2, 4, 6, 8, 10]
    assert Path("out/damaged-6/params").is_dir()


def test_several_are_passed_over_until_one_is_whole(whole, monkeypatch, capsys):
    damage("out", 6)
    damage("out", 4, "meta")
    assert run(train, monkeypatch, *RESUME) == 0
    assert "resuming from out, iteration 2" in capsys.readouterr().out
    same_run("whole", "out", 10)
    assert {path.name for path in Path("out").glob("damaged-*")} == {"damaged-4", "damaged-6"}


@pytest.mark.parametrize("item", ["params", "meta"])
def test_with_no_fallback_a_damaged_checkpoint_is_refused_and_left(
    whole, monkeypatch, capsys, item
):
    damage("out", 6, item)
    assert run(train, monkeypatch, *RESUME, "--fallback=False") == 2
    error = capsys.readouterr().err
    assert "--fallback=True would go on from an earlier checkpoint" in error
    assert error.count("\n") == 1
    assert steps("out") == [2, 4, 6]


@pytest.mark.parametrize("start", ["resume", "auto"])
@pytest.mark.parametrize("item", ["params", "meta"])
def test_a_run_with_no_whole_checkpoint_is_refused_and_not_begun_anew(
    whole, monkeypatch, capsys, start, item
):
    for step in (2, 4, 6):
        damage("out", step, item)
    assert run(train, monkeypatch, *SAVING, f"--init_from={start}") == 2
    error = capsys.readouterr().err
    assert "no checkpoint in out is whole: --init_from=scratch starts anew" in error
    assert steps("out") == [2, 4, 6]


def test_an_evaluation_alone_moves_nothing(whole, monkeypatch, capsys):
    damage("out", 6)
    assert run(train, monkeypatch, *RESUME, "--eval_only") == 0
    assert "step 4: train loss" in capsys.readouterr().out
    assert steps("out") == [2, 4, 6]


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--dtype=bfloat16", "dtype='bfloat16', but the run in out has dtype='float32'"),
        ("--dtype=auto", ""),  # what the hardware is fast in
    ],
)
def test_a_run_does_not_change_its_dtype_unasked(monkeypatch, capsys, flag, told):  # C19
    assert run(train, monkeypatch, *SAVING, "--max_iters=2", "--dtype=float32") == 0
    assert run(train, monkeypatch, *RESUME, flag) == (2 if told else 0)
    assert told in capsys.readouterr().err


def test_milestones_stay(monkeypatch):
    flags = ("--save_interval=1", "--keep=1", "--keep_every=4", "--eval_interval=100")
    assert run(train, monkeypatch, *TINY, *flags) == 0
    assert steps("out") == [4, 8, 10]


# --- numbers that go wrong


def test_a_run_that_diverges_ends_with_a_report_and_its_checkpoints(monkeypatch, capsys):  # C22
    """A learning rate of 1e17: the second loss is no number."""
    flags = ("--learning_rate=1e17", "--warmup_iters=0", "--max_skipped=3", "--save_interval=1")
    assert run(train, monkeypatch, *TINY, *flags, "--grad_clip=0", "--dropout=0") == 1
    said = capsys.readouterr()
    report = said.err.splitlines()
    assert report[0].startswith(
        "error: 3 updates in a row were left out, the last of iteration 3: their loss or gradient"
    )
    assert any(re.match(r"  not finite in loss: micro-batch 0, row 0: tokens \d+ to \d+ of ", r)
               for r in report)  # fmt: skip
    assert re.fullmatch(r"    and at least \d+ more", report[7])
    assert report[8].startswith("  not finite in gradient: ")
    assert "--init_from=resume" in report[-1]
    assert "iter 1: update left out: loss nan, gradient norm nan (1 so far)" in said.out
    assert [e["skipped"] for e in entries("out") if "loss" in e] == [0, 1, 2, 3]
    assert steps("out")
    for step in steps("out"):
        for leaf in jax.tree.leaves(load("out", step=str(step))[1]):
            assert np.isfinite(leaf).all()


def test_an_update_left_out_is_told_of_from_the_very_first_on(monkeypatch, capsys):
    """A resumed run has not yet heard how many there were before.

    An update that large leaves numbers, of which the next iteration's loss is none.
    """
    flags = ("--learning_rate=1e30", "--warmup_iters=0", "--max_skipped=9", "--data=1")
    assert run(train, monkeypatch, *TINY, *flags, "--max_iters=3") == 0
    assert run(train, monkeypatch, *TINY, *flags, "--max_iters=4", "--init_from=resume") == 0
    told = re.findall(
        r"^iter (\d+): update left out: .* \((\d) so far\)$", capsys.readouterr().out, re.M
    )
    assert told == [("1", "1"), ("2", "2"), ("3", "3")]


def test_the_report_names_the_layer_whose_gradient_is_not_finite(monkeypatch, capsys):  # C22
    """The second layer's MLP is poisoned in the backward pass of one micro-batch's loss."""
    from gpt_jax.model import GPT

    whole_loss = GPT.total_loss

    @jax.custom_vjp
    def poison(x):
        return x

    poison.defvjp(lambda x: (x, None), lambda _, g: (g.at[1, 3, 5].set(np.nan),))

    def poisoned(self, *args, **kwargs):
        total, n = whole_loss(self, *args, **kwargs)
        weight = self.variables["params"]["h"]["mlp"]["c_fc"]["weight"]
        return total + 0 * poison(weight).sum(), n

    monkeypatch.setattr(GPT, "total_loss", poisoned)
    assert run(train, monkeypatch, *TINY, "--max_skipped=2", "--data=1") == 1
    said = capsys.readouterr().err
    assert "  not finite in gradient: micro-batch 0, h/mlp/c_fc/weight, layer 1\n" in said
    assert "loss: micro-batch" not in said
    assert "layer 0" not in said


def test_a_loss_that_is_no_number_is_never_the_best(monkeypatch):  # C22
    seen = iter([3.0, float("nan"), 2.0, 2.5])

    def evaluation(*_, **__):
        loss = next(seen) if evaluation.val else 1.0
        evaluation.val = not evaluation.val
        return train.Evaluation(loss, 1)

    evaluation.val = False
    monkeypatch.setattr(train, "evaluate", evaluation)
    flags = ("--eval_interval=3", "--max_iters=9", "--keep=1")
    assert run(train, monkeypatch, *TINY, *flags) == 0
    assert checkpoint.val_losses("out") == {6: 2.0, 9: 2.5}
    assert checkpoint.read_meta("out", 9)["best_val_loss"] == 2.0


# --- data that changes


@pytest.mark.parametrize("eval_interval", [100, 6])  # noticed in training, in an evaluation
def test_data_replaced_under_a_run_end_it_saved_and_named(eval_interval, monkeypatch, capsys):
    assert run(train, monkeypatch, *TINY, "--out_dir=whole") == 0
    stamp, batches, changed = token_file.stamp, train.batches, []

    def until_the_fifth(*args):
        for n, batch in enumerate(batches(*args)):
            changed.extend([True] * (n == 5))
            yield batch

    monkeypatch.setattr(token_file, "stamp", lambda path: () if changed else stamp(path))
    monkeypatch.setattr(train, "batches", until_the_fifth)
    assert run(train, monkeypatch, *TINY, f"--eval_interval={eval_interval}") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: data/text/train.bin was replaced, written to or removed")
    assert error.count("\n") == 1
    changed.clear()
    monkeypatch.setattr(train, "batches", batches)
    [last] = steps("out")
    assert last == max(losses("out")) + 1
    assert run(train, monkeypatch, *TINY, "--init_from=resume") == 0
    same_run("whole", "out", 10)


# --- disks that are full


def test_a_save_that_fails_ends_the_run_and_the_checkpoint_before_goes_on(monkeypatch):  # C16
    """A file can be no larger than what a limit allows: as on a full disk, but without root."""
    sized = [*TINY, "--n_embd=64", "--eval_interval=100", "--save_interval=20", "--max_iters=60"]
    whole = command(TRAIN, *sized, "--out_dir=whole")
    subprocess.run(whole, env=environment(), check=True, capture_output=True)
    first = command(TRAIN, *sized, "--max_iters=20")
    subprocess.run(first, env=environment(), check=True, capture_output=True)
    largest = max(p.stat().st_size for p in Path("out").rglob("*") if p.is_file())

    resume = [*sized, "--init_from=resume"]
    Path("limited.py").write_text(f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({largest // 2}, {largest // 2}))
import train
sys.exit(train.main())
""")
    done = subprocess.run(
        command("limited.py", *resume), env=environment(), text=True, capture_output=True
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"{Path('out/checkpoints').absolute()} cannot be written" in line
    assert "File too large" in line
    assert re.search(r"[\d,]+ bytes are free there", line)
    assert steps("out") == [20]
    subprocess.run(command(TRAIN, *resume), env=environment(), check=True, capture_output=True)
    same_run("whole", "out", 60)
    assert not list(Path("out/checkpoints").glob("*tmp*"))


@pytest.mark.parametrize("file", ["metrics.jsonl", "config.json"])
def test_a_small_file_that_cannot_be_written_ends_the_run_in_a_line(file, monkeypatch, capsys):
    """C16: where it would be, there is a folder."""
    Path("out", file).mkdir(parents=True)
    assert run(train, monkeypatch, *TINY) == 1
    error = capsys.readouterr().err
    assert f"error: out{'/metrics.jsonl' if 'metrics' in file else ''} cannot be written" in error
    assert error.count("\n") == 1


# --- signals


def follow(process, line):
    """Read what a run prints up to a line that starts so."""
    said = []
    for text in process.stdout:
        said.append(text)
        if text.startswith(line):
            return said
    raise AssertionError("".join(said) + process.stderr.read())


@pytest.mark.parametrize(
    ("number", "line", "told"),
    [
        (signal.SIGTERM, "1 x cpu", "nothing to save"),  # while it compiles
        (signal.SIGINT, "step 0:", "nothing to save"),
        (signal.SIGTERM, "saving checkpoint", "stopped at iteration"),  # while it saves
        (signal.SIGINT, "iter 17:", "stopped at iteration"),
    ],
)
def test_a_stop_at_any_time_is_polite_and_the_run_goes_on_to_the_same_end(
    number, line, told, monkeypatch
):  # C15
    flags = [*TINY, "--max_iters=40", "--eval_interval=15"]
    one = [*flags, "--data=1", "--out_dir=whole"]
    assert run(train, monkeypatch, *one) == 0
    stopped = subprocess.Popen(
        command(TRAIN, *flags), env=environment(), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    follow(stopped, line)
    stopped.send_signal(number)
    sent = time.monotonic()
    out, err = stopped.communicate(timeout=60)
    assert stopped.returncode == 0, err
    assert told in out + err
    assert "Traceback" not in err
    print(f"{time.monotonic() - sent:.1f} s")  # a figure for who reads the log, not a test
    done = subprocess.run(
        command(TRAIN, *flags, "--init_from=auto"),
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    if told == "stopped at iteration":
        at = re.search(r"stopped at iteration (\d+) and saved", out).group(1)
        assert f"resuming from out, iteration {at}" in done.stdout
    same_run("whole", "out", 40)
    assert not list(Path("out/checkpoints").glob("*tmp*"))


def test_a_run_that_has_come_to_its_end_says_so_and_keeps_its_config(monkeypatch, capsys):
    """Begun again with the preset's max_iters, which its own flag was above."""
    assert run(train, monkeypatch, *TINY, "--max_iters=12") == 0
    capsys.readouterr()
    assert run(train, monkeypatch, *TINY, "--init_from=auto", "--max_iters=6") == 0
    said = capsys.readouterr().out
    assert "out is at iteration 12, max_iters=6: nothing is left to train; --max_iters=24" in said
    assert "python train.py --init_from=resume --max_iters=24" in said
    assert json.loads(Path("out/config.json").read_text())["max_iters"] == 12


@pytest.mark.parametrize("newest", [6, 4])  # that can be read
def test_a_run_whose_config_json_is_gone_goes_on_with_its_checkpoints(
    whole, monkeypatch, capsys, newest
):
    if newest == 4:
        damage("out", 6, "meta")
    Path("out/config.json").unlink()
    assert run(train, monkeypatch, "--init_from=resume", "--max_iters=10") == 0
    assert f"resuming from out, iteration {newest}" in capsys.readouterr().out
    same_run("whole", "out", 10)
    Path("out/config.json").write_text("{bad")
    assert run(train, monkeypatch, "--init_from=resume", "--max_iters=12") == 2
    assert "move it away, for checkpoints hold it too" in capsys.readouterr().err


def test_a_stopped_run_begun_again_with_fewer_iterations_is_not_lost(monkeypatch, capsys):
    assert run(train, monkeypatch, *TINY, "--max_iters=12") == 0
    path = Path("out/config.json")
    saved = json.loads(path.read_text()) | {"max_iters": 40}
    path.write_text(json.dumps(saved))
    meta = {"iter": 12, "config": saved}
    make_room(replace(TrainConfig(**saved), init_from="auto", max_iters=6), meta)
    assert json.loads(path.read_text()) == saved
    told = "nothing is left to train; --init_from=resume without a config goes on to its own "
    assert f"{told}max_iters=40\n" in capsys.readouterr().out


@pytest.mark.parametrize("log", ["reader", "disk", "closed"])
def test_a_run_goes_on_to_its_end_without_its_log(log):
    """`| true`, `> /dev/full`, `>&-`."""
    if log == "disk" and not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    if log == "disk":
        stdout = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, stdout = os.pipe()
        os.close(reader)
    closed = ["bash", "-c", '"$@" >&-', "bash"] if log == "closed" else []
    done = subprocess.run(
        [*closed, *command(TRAIN, *TINY)],
        env=environment(), stdout=stdout, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(stdout)
    assert done.returncode == 0, done.stderr
    gone = "" if log == "closed" else "stdout cannot be written any more"
    assert done.stderr.startswith(gone)
    assert done.stderr.count("\n") == bool(gone)
    assert steps("out")[-1] == 10


def test_a_stop_in_an_evaluation_breaks_it_off_and_it_is_made_up_for(monkeypatch, capsys):  # C15
    """The checkpoint of the stop has no loss yet; the resumed run gives it its own."""
    assert run(train, monkeypatch, *TINY, "--out_dir=whole") == 0
    real, calls = Stop.now, []

    def now(stop):
        calls.append(stop)
        # 2 splits of 1 batch an evaluation: those of iterations 0 and 4, then the one of 8
        stop.noted.set() if len(calls) == 6 else None
        return real(stop)

    monkeypatch.setattr(Stop, "now", now)
    assert run(train, monkeypatch, *TINY) == 0
    monkeypatch.setattr(Stop, "now", real)
    assert "stopped at iteration 8 and saved" in capsys.readouterr().out
    assert checkpoint.read_meta("out", 8)["val_loss"] is None
    assert max(e["iter"] for e in entries("out") if "val_loss" in e) == 4
    assert run(train, monkeypatch, *TINY, "--init_from=resume", "--max_iters=10") == 0
    same_run("whole", "out", 10)
    assert checkpoint.val_losses("out")[8] == checkpoint.val_losses("whole")[8]


def test_a_second_run_on_the_same_folder_is_refused_and_disturbs_nothing(monkeypatch):
    flags = [*TINY, "--max_iters=100000", "--eval_interval=100000"]
    first = subprocess.Popen(
        command(TRAIN, *flags), env=environment(), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    follow(first, "iter 0:")
    second = subprocess.run(
        command(TRAIN, *flags), env=environment(), capture_output=True, text=True
    )
    assert second.returncode == 2
    assert f"error: out_dir=out is in use by process {first.pid} on" in second.stderr
    assert second.stderr.count("\n") == 1
    first.send_signal(signal.SIGINT)
    out, _ = first.communicate(timeout=60)
    assert first.returncode == 0
    assert "stopped at iteration" in out
    assert not Path("out/previous-1").exists()


# --- what an older version has saved

GOLDEN = Path(__file__).parent / "golden"


def test_a_checkpoint_of_this_version_loads_and_goes_on_in_all_later_ones(
    tmp_path, monkeypatch, capsys
):  # C36
    expected = json.loads((GOLDEN / "expected.json").read_text())
    shutil.copytree(GOLDEN / "run", "old")
    model, params, tokenizer = load("old")
    tokens = np.array([tokenizer.encode("line 7: to be")])
    logits = np.asarray(model.apply({"params": params}, tokens))[0, -1]
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)
    for mesh in ("--data=1", "--fsdp=2"):
        shutil.copytree("old", f"old{mesh}")
        goes_on = (f"--out_dir=old{mesh}", "--init_from=resume", "--max_iters=8", mesh)
        assert run(train, monkeypatch, *goes_on) == 0
        found = [losses(f"old{mesh}")[n] for n in range(6, 8)]
        np.testing.assert_allclose(found, expected["losses"], atol=1e-5)
    assert os.path.isdir("old/checkpoints/6")
