"""C27: a run compiles each of its programs once, and its loop sends nothing unasked."""

import sys
from pathlib import Path

import jax
import pytest
from jax import monitoring

import train
from gpt_jax.prepare import prepare

TEXT = "".join(f"line {i}: to be, or not to be, that is the question.\n" for i in range(200))
# evaluations of a last batch that is not full, saves, an evaluation and a save at one iteration
FLAGS = [
    "train_shakespeare_char", "--dataset=text", "--n_layer=2", "--n_head=2", "--n_embd=16",
    "--block_size=16", "--batch_size=16", "--gradient_accumulation_steps=2", "--dropout=0.1",
    "--eval_interval=4", "--eval_iters=5", "--log_interval=1", "--save_interval=3",
    "--always_save_checkpoint=True", "--out_dir=out",
]  # fmt: skip


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT, "utf-8")
    prepare("text", Path("data/text"), input=Path("text.txt"), tokenizer="char", log=lambda _: None)


@pytest.fixture
def compiled():
    """The names of the programs that are compiled, or loaded from the cache, in order."""
    names = []

    def note(event, seconds, **more):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(more["fun_name"])

    monitoring.register_event_duration_secs_listener(note)
    yield names
    monitoring.unregister_event_duration_listener(note)


def run(monkeypatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["train.py", *FLAGS, *flags])
    return train.main()


@pytest.mark.parametrize("devices", [1, 8])
def test_a_run_and_one_that_goes_on_compile_each_of_their_programs_once(
    monkeypatch, compiled, devices
):
    for flags in (["--max_iters=10"], ["--max_iters=15", "--init_from=resume"]):
        compiled.clear()
        assert run(monkeypatch, f"--data={devices}", *flags) == 0
        assert compiled.count("jit(train_step)") == compiled.count("jit(eval_step)") == 1


def test_from_one_iteration_to_the_next_nothing_is_sent_that_was_not_asked_for(monkeypatch):
    """An implicit transfer waits for the device, or has it wait; the guard is the main thread's."""
    steps = []

    def guarded(real):
        def batches(*args):
            guard = None
            for batch in real(*args):
                if len(steps) == 1:  # what the first iteration compiles and sets up is over
                    guard = jax.transfer_guard("disallow")
                    guard.__enter__()
                steps.append(batch)
                if len(steps) == 7:
                    guard.__exit__(None, None, None)
                yield batch

        return batches

    monkeypatch.setattr(train, "batches", guarded(train.batches))
    assert run(monkeypatch, "--max_iters=8", "--eval_interval=100", "--save_interval=0") == 0
    assert len(steps) == 8
