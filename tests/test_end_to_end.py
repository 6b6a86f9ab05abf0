"""The commands, from a text to a sample, as a user runs them."""

import json
import logging
import os
import pickle
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import sample
import train
from gpt_jax import evaluate
from gpt_jax.prepare import prepare

ROOT = Path(__file__).parents[1]
TEXT = "".join(f"line {i}: to be, or not to be, that is the question.\n" for i in range(400))
TINY = [
    "train_shakespeare_char", "--dataset=text", "--n_layer=2", "--n_head=2", "--n_embd=16",
    "--block_size=16", "--batch_size=8", "--gradient_accumulation_steps=2", "--dropout=0.1",
    "--eval_interval=4", "--eval_iters=2", "--log_interval=1", "--warmup_iters=2",
    "--always_save_checkpoint=True", "--max_iters=10", "--out_dir=out",
]  # fmt: skip


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """A working directory with a small data set of characters."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT, "utf-8")
    prepare("text", Path("data/text"), input=Path("text.txt"), tokenizer="char", log=lambda _: None)


def run(script, monkeypatch, *argv: str) -> int:
    """Run a command in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["command", *argv])
    return script.main()


def command(*argv: str) -> list[str]:
    return [sys.executable, *argv]


def environment() -> dict[str, str]:
    # one device: what is tested in a process of its own is what a user has
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "").strip()
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def entries(out_dir: str) -> list[dict]:
    return [json.loads(line) for line in Path(out_dir, "metrics.jsonl").read_text().splitlines()]


def losses(out_dir: str) -> dict[int, float]:
    return {e["iter"]: e["loss"] for e in entries(out_dir) if "loss" in e}


def leaves(out_dir: str, step: int, item: str = "params") -> list[np.ndarray]:
    path = Path(out_dir, "checkpoints", str(step), item).absolute()
    tree = ocp.StandardCheckpointer().restore(path)
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def same_run(a: str, b: str, step: int) -> None:
    assert losses(a) == losses(b)
    for item in ("params", "optimizer"):
        for x, y in zip(leaves(a, step, item), leaves(b, step, item), strict=True):
            np.testing.assert_array_equal(x, y)


def test_a_run_logs_as_nanogpt_saves_draws_and_says_what_is_next(monkeypatch, capsys):
    assert run(train, monkeypatch, *TINY, "--sample_tokens=20") == 0
    out = capsys.readouterr().out
    assert "tokens per iteration will be: 256" in out
    assert re.search(r"^number of parameters: \d+\.\d\dM$", out, re.M)
    assert re.search(r"^num decayed parameter tensors: 10, with [\d,]+ parameters$", out, re.M)
    assert re.search(r"^step 4: train loss \d\.\d{4}, val loss \d\.\d{4}$", out, re.M)
    assert re.search(r"^iter 9: loss \d\.\d{4}, time \d+\.\d\dms, mfu n/a$", out, re.M)
    assert re.search(r"^val loss \d\.\d{4} nats/token, \d\.\d{4} bits/byte$", out, re.M)
    assert "iter 10:" not in out  # T23: exactly max_iters updates
    assert "a sample:" in out
    assert "python sample.py" in out
    assert Path("out/loss.png").read_bytes().startswith(b"\x89PNG")
    steps, evals = losses("out"), {e["iter"] for e in entries("out") if "val_loss" in e}
    assert sorted(steps) == list(range(10))
    assert evals == {0, 4, 8, 10}  # T15, and the last step always
    assert {"loss", "lr", "grad_norm", "tokens_per_second"} <= set(entries("out")[1])
    saved = json.loads(Path("out/config.json").read_text())
    assert (saved["n_embd"], saved["dataset"]) == (16, "text")


def test_a_checkpoint_is_read_by_orbax_alone(monkeypatch):
    run(train, monkeypatch, *TINY)
    params = ocp.StandardCheckpointer().restore(Path("out/checkpoints/10/params").absolute())
    assert set(params) == {"wte", "wpe", "h", "ln_f"}
    assert set(params["h"]) == {"ln_1", "attn", "ln_2", "mlp"}
    assert params["h"]["attn"]["c_attn"]["weight"].shape == (2, 16, 3, 2, 8)


@pytest.mark.parametrize("stopped_at", [3, 8])
def test_a_run_stopped_and_resumed_equals_one_that_was_not(stopped_at, monkeypatch):
    run(train, monkeypatch, *TINY, "--out_dir=whole")
    run(train, monkeypatch, *TINY, "--out_dir=parts", f"--max_iters={stopped_at}")
    # no config is named: the saved one is taken
    again = ("--init_from=resume", "--out_dir=parts", "--max_iters=10", "--eval_interval=5")
    assert run(train, monkeypatch, *again) == 0
    same_run("whole", "parts", 10)


def test_an_interrupted_run_saves_says_so_and_resumes_to_the_same_end():
    train_py = str(ROOT / "train.py")
    tiny = [*TINY, "--max_iters=60", "--eval_interval=50"]
    subprocess.run(
        command(train_py, *tiny, "--out_dir=whole"), env=environment(), check=True,
        capture_output=True,
    )  # fmt: skip
    process = subprocess.Popen(
        command(train_py, *tiny, "--out_dir=cut"), env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("iter 1:"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate()
    assert process.returncode == 0
    assert "SIGINT: saving" in err
    assert "saved; next:\n  python train.py --init_from=resume --out_dir=cut\n" in out
    assert 1 <= len(os.listdir("cut/checkpoints")) <= 2
    subprocess.run(
        command(train_py, "--out_dir=cut", "--init_from=resume"), env=environment(), check=True,
        capture_output=True,
    )  # fmt: skip
    same_run("whole", "cut", 60)


def test_evaluation_at_any_interval_leaves_training_as_it_was(monkeypatch):
    run(train, monkeypatch, *TINY, "--out_dir=often", "--eval_interval=1")
    run(train, monkeypatch, *TINY, "--out_dir=seldom", "--eval_interval=100", "--save_interval=5")
    same_run("often", "seldom", 10)
    assert set(os.listdir("seldom/checkpoints")) == {"5", "10"}


def test_eval_only_evaluates_a_resumed_run_and_leaves_it_alone(monkeypatch, capsys):
    run(train, monkeypatch, *TINY)
    before = sorted((str(p), p.stat().st_mtime_ns) for p in Path("out").rglob("*"))
    capsys.readouterr()
    assert run(train, monkeypatch, "--out_dir=out", "--init_from=resume", "--eval_only") == 0
    assert re.search(r"^step 10: train loss .*, val loss ", capsys.readouterr().out, re.M)
    assert before == sorted((str(p), p.stat().st_mtime_ns) for p in Path("out").rglob("*"))


def test_nothing_is_compiled_twice(monkeypatch, caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        run(train, monkeypatch, *TINY, "--save_interval=3")
    compiled = [r.getMessage() for r in caplog.records if "Finished XLA compilation" in r.message]
    for name in ("train_step", "eval_step"):
        assert sum(f"jit({name})" in message for message in compiled) == 1, compiled


def test_an_earlier_run_is_set_aside_and_not_lost(monkeypatch, capsys):
    run(train, monkeypatch, *TINY, "--max_iters=4")
    run(train, monkeypatch, *TINY, "--max_iters=2")
    assert "out held a run: it is in out/previous-1 now" in capsys.readouterr().out
    assert set(os.listdir("out/previous-1/checkpoints")) == {"4"}
    assert set(os.listdir("out/checkpoints")) == {"2"}


def test_a_run_goes_on_training_another_models_weights_with_a_shorter_context(monkeypatch):
    run(train, monkeypatch, *TINY)
    tuned = (*TINY, "--init_from=out", "--out_dir=tuned", "--block_size=8", "--max_iters=3")
    assert run(train, monkeypatch, *tuned) == 0
    config = json.loads(Path("tuned/checkpoints/3/meta/metadata").read_text())["model"]
    assert (config["block_size"], config["n_embd"]) == (8, 16)
    again = ("--init_from=resume", "--out_dir=tuned", "--max_iters=4")
    assert run(train, monkeypatch, *again) == 0


def test_nanogpts_own_folder_trains_unchanged(monkeypatch):
    folder = Path("data/theirs")
    folder.mkdir()
    symbols = sorted(set(TEXT))
    meta = {"vocab_size": len(symbols), "itos": dict(enumerate(symbols)),
            "stoi": {c: i for i, c in enumerate(symbols)}}  # fmt: skip
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    for name in ("train.bin", "val.bin"):
        (folder / name).write_bytes(Path("data/text", name).read_bytes())
    run(train, monkeypatch, *TINY, "--out_dir=ours")
    assert run(train, monkeypatch, *TINY, "--dataset=theirs", "--out_dir=theirs") == 0
    assert losses("ours") == losses("theirs")


def test_the_quickstart_makes_its_own_data(monkeypatch, capsys):
    small = ("--n_layer=1", "--n_embd=16", "--max_iters=2", "--eval_iters=1", "--sample_tokens=5")
    assert run(train, monkeypatch, *small) == 0
    assert Path("data/pystdlib/train.bin").stat().st_size > 1_000_000
    assert 'python sample.py --start="def "' in capsys.readouterr().out
    assert run(sample, monkeypatch, "--num_samples=1", "--max_new_tokens=5", "--start=def ") == 0
    assert run(train, monkeypatch, *small, "--max_iters=3") == 0  # goes on, no flag needed
    assert "resuming from out, iteration 2" in capsys.readouterr().out


def test_samples_are_nanogpts_and_the_same_on_a_terminal(monkeypatch, capsys):
    run(train, monkeypatch, *TINY)
    capsys.readouterr()
    Path("prompt.txt").write_text("line 1", "utf-8")
    flags = ("--start=FILE:prompt.txt", "--num_samples=2", "--max_new_tokens=30")
    assert run(sample, monkeypatch, *flags) == 0
    piped = capsys.readouterr().out
    assert len(re.findall(r"^-{15}$", piped, re.M)) == 2
    assert piped.startswith("line 1")
    assert run(sample, monkeypatch, *flags) == 0
    assert capsys.readouterr().out == piped  # same seed, same text

    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert run(sample, monkeypatch, *flags) == 0
    shown = b""
    while len(shown.replace(b"\r", b"")) < len(piped):
        shown += os.read(ours, 10_000)
    os.close(ours)
    assert shown.decode().replace("\r\n", "\n") == piped


def test_a_run_on_a_mesh_is_sampled_and_evaluated_on_one_as_on_a_single_device(monkeypatch, capsys):
    mesh = ["--fsdp=2", "--tensor=2"]
    assert run(train, monkeypatch, *TINY, *mesh, "--dropout=0") == 0
    assert "8 x cpu (data 2, fsdp 2, tensor 2)" in capsys.readouterr().out
    assert run(train, monkeypatch, *TINY, "--data=1", "--dropout=0", "--out_dir=one") == 0
    together, one = losses("out"), losses("one")
    assert max(abs(together[i] - one[i]) for i in range(10)) <= 5e-6
    capsys.readouterr()
    said = []
    for flags in ([], mesh, ["--fsdp=4"], ["--fsdp=8"]):
        text = ["--start=line", "--num_samples=2", "--max_new_tokens=20"]
        assert run(sample, monkeypatch, *text, *flags) == 0
        assert run(evaluate, monkeypatch, *flags) == 0
        said.append(capsys.readouterr().out)
    assert len(set(said)) == 1


def test_evaluate_prints_one_line_a_split(monkeypatch, capsys):
    run(train, monkeypatch, *TINY)
    capsys.readouterr()
    assert run(evaluate, monkeypatch, "--out_dir=out", "--split=all") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line, name in zip(lines, ("train", "val"), strict=True):
        number = r"\d+\.\d+"
        form = (
            f"{name} loss {number} nats/token, perplexity {number}, {number} bits/byte, .* tokens"
        )
        assert re.fullmatch(form, line)


def test_data_of_another_tokenizer_are_not_evaluated(monkeypatch, capsys):
    """By ids alone the loss would be a number like any other."""
    run(train, monkeypatch, *TINY)
    Path("other.txt").write_text(TEXT.swapcase(), "utf-8")
    prepare("text", Path("data/other"), input="other.txt", tokenizer="char", log=lambda _: None)
    capsys.readouterr()
    assert run(evaluate, monkeypatch, "--out_dir=out", "--dataset=other") == 2
    said = capsys.readouterr()
    assert not said.out
    assert said.err.splitlines()[-1].startswith(
        "error: out was trained with a char tokenizer unlike this data set's (char, "
    )


class Marker:
    def __reduce__(self):
        return (os.mkdir, ("marker",))


def damage(name: str, data: bytes):
    def make():
        Path("data/text", name).write_bytes(data)

    return make


def hostile_meta():
    Path("data/text/meta.json").unlink()
    Path("data/text/meta.pkl").write_bytes(pickle.dumps({"stoi": Marker()}))


BAD = {
    "typo in a key": (["--max_itres=5"], None, "did you mean 'max_iters'?"),
    "wrong type": (["--max_iters=ten"], None, "max_iters='ten' is a str, it must be an int"),
    "heads": (["--n_head=3"], None, "n_embd=16 is not a multiple of n_head=3"),
    "no such config": (["train_gtp2"], None, "train_gpt2"),
    "missing data": (["--dataset=none"], None, "data/none"),
    "empty file": ([], damage("train.bin", b""), "data/text/train.bin is empty"),
    "odd file": ([], damage("val.bin", b"\0" * 101), "data/text/val.bin: 101 bytes"),
    "short file": ([], damage("val.bin", b"\0" * 20), "data/text/val.bin has 10 tokens"),
    "unknown token": ([], damage("train.bin", b"\xff\0" * 99), "token 0 is 255, but vocab_size="),
    "hostile meta.pkl": ([], hostile_meta, "meta.pkl"),
    "unwritable out_dir": (["--out_dir=text.txt/out"], None, "text.txt is a file: name a"),
    "nothing to resume": (["--init_from=resume", "--out_dir=no"], None, "no checkpoint"),
    "unknown device": (["--device=abacus"], None, "device='abacus' is not one of"),
    "too many devices": (["--fsdp=16"], None, "--fsdp=16 does not fit the number of dev"),
    "two sizes open": (["--fsdp=-1"], None, "or one -1 for the rest"),
    "heads on devices": (["--tensor=8"], None, "--tensor=8 does not divide n_head=2 (h/attn/c_"),
    "another mesh of hosts": (["--process_id=4", "--num_processes=2"], None, "process_id=4 is out"),
    "indivisible": (["--batch_size=3"], None, "batch_size=3 x gradient_accumulation_steps=2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, monkeypatch, capsys):
    flags, spoil, told = BAD[case]
    if spoil:
        spoil()
    assert run(train, monkeypatch, *TINY, *flags) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not Path("marker").exists()
    assert not Path("out/checkpoints").exists()


def test_a_checkpoint_that_does_not_match_is_refused_and_kept(monkeypatch, capsys):
    run(train, monkeypatch, *TINY)
    before = Path("out/config.json").read_text()
    for flag, told in (
        ("--n_layer=3", "n_layer=3, but the run in out has n_layer=2"),
        ("--n_head=4", "n_head=4, but the run in out has n_head=2"),
        ("--n_embd=32", "n_embd=32, but the run in out has n_embd=16"),
        ("--block_size=8", "block_size=8, but the run in out has block_size=16"),
        ("--bias=True", "bias=True, but the run in out has bias=False"),
    ):
        assert run(train, monkeypatch, *TINY, "--init_from=resume", flag) == 2
        assert told in capsys.readouterr().err
    Path("text.txt").write_text(TEXT + "@" * 400, "utf-8")
    prepare("text", Path("data/text"), input=Path("text.txt"), tokenizer="char", log=lambda _: None)
    assert run(train, monkeypatch, *TINY, "--init_from=resume") == 2
    assert "out was trained with a char tokenizer unlike this data set's" in capsys.readouterr().err
    assert Path("out/config.json").read_text() == before


def test_an_automatic_start_does_not_go_on_with_another_data_set(monkeypatch, capsys):
    run(train, monkeypatch, *TINY)
    assert run(train, monkeypatch, *TINY, "--init_from=auto", "--dataset=other") == 2
    assert "dataset='other', but the run in out has dataset='text'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--start=€"], "character '€' (U+20AC) at position 0"),
        (["--start="], "the prompt has no tokens"),
        (
            ["--start=FILE:none.txt"],
            "'none.txt' cannot be read (No such file or directory): give a",
        ),
        (["--start=FILE:latin-1.txt"], "'latin-1.txt' cannot be read (it is not UTF-8): give a"),
        (["--stop=to"], "stop='to' is 2 tokens"),
        (["--step=77"], "out has no checkpoint of step 77, only of"),
        (["--out_dir=none"], "no checkpoint in none"),
        (["--top_p=0"], "top_p=0"),
    ],
)
def test_a_sample_that_cannot_be_is_refused_in_one_line(flags, told, monkeypatch, capsys):
    run(train, monkeypatch, *TINY, "--max_iters=1", "--eval_interval=9")
    Path("latin-1.txt").write_bytes(b"caf\xe9")
    capsys.readouterr()
    assert run(sample, monkeypatch, *flags) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_an_interrupt_is_told_of_below_what_was_printed(monkeypatch, capsys):
    """And below the terminal's own ^C."""

    def interrupted(*_):
        print("half a li", end="", flush=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "write", interrupted)
    assert run(sample, monkeypatch) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_a_platform_that_is_not_there_is_refused_in_one_line():
    found = subprocess.run(
        command(str(ROOT / "train.py"), *TINY, "--device=tpu"), env=environment(), text=True,
        capture_output=True,
    )  # fmt: skip
    assert found.returncode == 2
    assert "error: device=tpu is not there" in found.stderr
    assert "Traceback" not in found.stderr
