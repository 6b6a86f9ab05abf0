"""How a run starts: what lies in its folder is gone on with, or set aside, and never lost."""

import json
from contextlib import closing

import jax
import jax.numpy as jnp
import pytest

from gpt_jax import checkpoint
from gpt_jax.checkpoint import Checkpoints
from gpt_jax.start import set_aside
from gpt_jax.train_step import TrainState

META = {"best_val_loss": 1.5, "wandb_id": None, "config": {}, "model": {}, "tokenizer": {}}


def save_all(out_dir, losses):
    """Save a small checkpoint for each loss, at steps 10, 20, ..."""
    zero = jnp.zeros(())
    state = TrainState({"a": zero}, (), zero, jax.random.key(0), zero, zero, zero, zero)
    with closing(Checkpoints(str(out_dir), 9)) as checkpoints:
        for i, loss in enumerate(losses, 1):
            checkpoints.save(state, {**META, "iter": 10 * i, "val_loss": loss})


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_an_old_run_is_moved_aside_whole_as_often_as_need_be(tmp_path, capsys):
    out = tmp_path / "out"
    runs = []
    for loss in (3.0, 2.0):
        save_all(out, [loss])
        (out / "metrics.jsonl").write_text(f"{loss}\n")
        (out / "notes").mkdir()
        (out / "notes" / "mine.txt").write_text("kept")
        runs.append({name: data for name, data in tree(out).items() if "previous-" not in name})
        set_aside(str(out), "scratch")
        assert checkpoint.steps(str(out)) == []
        assert f"{out} held a run: it is in {out / f'previous-{len(runs)}'}" in (
            capsys.readouterr().out
        )
    assert sorted(path.name for path in out.iterdir()) == ["previous-1", "previous-2"]
    assert [tree(out / "previous-1"), tree(out / "previous-2")] == runs
    assert json.loads(
        (out / "previous-2" / "checkpoints" / "10" / "meta" / "metadata").read_text()
    )["val_loss"] == 2.0  # fmt: skip


def test_runs_set_aside_by_number_do_not_meet_when_one_was_deleted(tmp_path):
    out = tmp_path / "out"
    for name in ("previous-2", "previous-of-mine"):
        (out / name).mkdir(parents=True)
        (out / name / "file").write_text(name)
    for _ in range(2):
        save_all(out, [1.0])
        set_aside(str(out), "scratch")
    names = ["previous-1", "previous-2", "previous-3", "previous-of-mine"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert (out / "previous-2" / "file").read_text() == "previous-2"


def test_a_folder_that_holds_no_run_is_left_as_it_is(tmp_path, capsys):
    (tmp_path / "config.py").write_text("x")
    (tmp_path / "checkpoints").mkdir()
    set_aside(str(tmp_path), "scratch")
    set_aside(str(tmp_path / "nothing"), "scratch")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "config.py"]
    assert not capsys.readouterr().out


@pytest.mark.parametrize("source", ["ckpt.pt", "theirs/x.pth", "theirs"])
def test_what_a_new_run_starts_from_stays_where_it_is(tmp_path, source):
    names = ["checkpoints/10", "theirs"]
    for name in names:
        (tmp_path / name).mkdir(parents=True)
    for name in ("ckpt.pt", "theirs/x.pth", "other.txt"):
        (tmp_path / name).touch()
    set_aside(str(tmp_path), str(tmp_path / source))
    assert (tmp_path / source).exists()
    assert sorted(path.name for path in (tmp_path / "previous-1").iterdir()) == sorted(
        {"checkpoints", "other.txt", "theirs"} - {source.partition("/")[0]}
    )
