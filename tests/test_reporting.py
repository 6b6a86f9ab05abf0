"""Who writes what a run tells of itself."""

import os
import re
import shutil
import time
from contextlib import closing

import jax
import jax.numpy as jnp
import pytest

from gpt_jax import reporting
from gpt_jax.commandline import save_config, saved_run
from gpt_jax.config import GPTConfig, TrainConfig
from gpt_jax.model import GPT
from gpt_jax.reporting import summary
from gpt_jax.sharding import make_mesh

MODEL = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=11))


def report_of(out, iteration: int, **keys) -> reporting.Report:
    """The report of a run in ``out`` that goes on from an iteration."""
    params = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    config = TrainConfig(out_dir=str(out), **keys)
    return reporting.Report(config, make_mesh(), MODEL, params, 8, {"iter": iteration})


@pytest.mark.parametrize("first", [True, False])
def test_the_first_process_alone_writes_files(tmp_path, monkeypatch, first):
    """Even os.devnull: renamed over by root, it is a regular file for the whole machine."""
    monkeypatch.setattr(reporting, "is_first", lambda: first)
    nowhere = tmp_path / "null"
    nowhere.touch()
    monkeypatch.setattr(os, "devnull", str(nowhere))
    before = nowhere.stat()
    out = tmp_path / "out"
    out.mkdir()
    report = report_of(out, 3)
    report.evaluation(3, 2.5, 2.75, 1e-3)
    report.close()
    written = ["loss.png", "metrics.jsonl"] if first else []
    assert sorted(path.name for path in out.iterdir()) == written
    assert nowhere.stat()[:7] == before[:7]  # the same inode, as long as it was
    assert sorted(path.name for path in tmp_path.iterdir()) == ["null", "out"]


def test_the_next_line_of_a_resumed_run_says_so_and_so_do_those_before(tmp_path):
    for begins in (0, 2, 4, 3):  # the checkpoint of 4 was damaged
        with closing(report_of(tmp_path, begins)) as report:
            for iteration in (begins, begins + 1, begins + 2):
                report.evaluation(iteration, 2.5, 2.75, 1e-3)
    found = [entry for _, entry in reporting.entries(tmp_path / "metrics.jsonl")]
    assert [entry["iter"] for entry in found] == [0, 1, 2, 3, 4, 5]
    assert [entry.get("resumed") for entry in found] == [None, None, 2, 3, None, None]


def test_the_speed_of_a_line_is_that_of_all_iterations_since_the_last_without_evaluations(
    tmp_path, monkeypatch, capsys
):
    passed = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: passed)
    with closing(report_of(tmp_path, 0, log_interval=4)) as report:
        for iteration in range(9):
            if iteration % 3 == 0:
                passed += 100
                report.evaluation(iteration, 2.5, 2.75, 1e-3)
                report.resume_clock()
            passed += 1 + iteration
            numbers = {"loss": 2.5, "grad_norm": 1.0, "skipped": 0, "skipped_in_a_row": 0}
            report.step(iteration, jax.tree.map(jnp.float32, numbers), 1e-3)
    times = re.findall(r"^iter \d+: .* time (.*)ms,", capsys.readouterr().out, re.M)
    assert times == ["1000.00", "3500.00", "7500.00"]


def test_updates_left_out_before_a_resume_do_not_end_the_run_that_goes_on(tmp_path):
    with closing(report_of(tmp_path, 5)) as report:
        for n, said in ((9, 1), (10, 2), (0, 0), (1, 1)):
            numbers = {"loss": 2.5, "grad_norm": 1.0, "skipped": n, "skipped_in_a_row": n}
            assert report.step(5, jax.tree.map(jnp.float32, numbers), 1e-3) == said


def test_a_folder_removed_under_a_run_is_made_again(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    save_config(TrainConfig(out_dir=str(out), n_layer=3))
    with closing(report_of(out, 0, n_layer=3)) as report:
        report.evaluation(0, 2.5, 2.75, 1e-3)
        shutil.rmtree(out)
        report.evaluation(1, 2.5, 2.75, 1e-3)
    assert saved_run(str(out))["n_layer"] == 3
    assert [entry["iter"] for _, entry in reporting.entries(out / "metrics.jsonl")] == [1]
    said = f"{out}/config.json was removed under this run: it is written again\n"
    assert capsys.readouterr().out.count(said) == 1


def test_commands_that_are_printed_name_any_folder_to_a_shell():
    command = "python train.py --init_from=resume"
    assert summary.resuming(TrainConfig()) == command
    assert summary.resuming(TrainConfig(out_dir="my run")) == f"{command} --out_dir='my run'"


def test_a_picture_that_cannot_be_drawn_is_a_line_and_the_run_goes_on(tmp_path, capsys):
    (tmp_path / "loss.png").mkdir()
    with closing(report_of(tmp_path, 0)) as report:
        report.evaluation(0, 2.5, 2.75, 1e-3)
        report.evaluation(1, 2.5, 2.75, 1e-3)
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if "loss.png" in line]
    assert len(said) == 1
    assert said[0].startswith("no loss.png was drawn: UserError: ")
    assert len(reporting.entries(tmp_path / "metrics.jsonl")) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]
