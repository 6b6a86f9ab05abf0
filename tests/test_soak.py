"""The soak of soak.py in short: a few rounds, and that it notices what is wrong."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from soak import Broken, Moment, Soak, compare, environment_of, leftovers

LAST = 80


@pytest.fixture
def soak(tmp_path):
    environment = environment_of(tmp_path)
    environment["XLA_FLAGS"] += " --xla_backend_optimization_level=0"  # half the time to compile
    soak = Soak(tmp_path, seed=1, max_iters=LAST, save_interval=5, environment=environment)
    with soak.processes:
        yield soak


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def change_a_number(out: Path) -> None:
    path = out.absolute() / "checkpoints" / str(LAST) / "params"
    tree = jax.tree.map(np.array, ocp.StandardCheckpointer().restore(path))
    bias = tree["ln_f"]["weight"]
    bias[0] = np.nextafter(bias[0], np.inf, dtype=bias.dtype)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree, force=True)


def tell_twice(out: Path) -> None:
    path = out / "metrics.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")


def tell_another_loss(out: Path) -> None:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    entry = json.loads(lines[7])
    lines[7] = json.dumps({**entry, "loss": entry["loss"] + 1e-6})
    (out / "metrics.jsonl").write_text("\n".join(lines))


def test_a_run_killed_stopped_and_damaged_ends_as_one_that_was_not_and_the_soak_would_notice(soak):
    soak.prepare()
    whole = soak.start("whole", soak.whole)
    soak.await_moment(whole, Moment("iteration"))  # compiled, once for all
    # the save before the one of iteration 15 is whole by then, and that of 5
    print(soak.round("kill", Moment("iteration", 0, 18)))
    step = soak.out / "checkpoints" / str(soak.steps()[-1])
    print(soak.round("term", Moment("iteration", 0, 4), "flip", largest(step / "params")))
    soak.finished(whole)
    soak.finish()
    assert {"kill", "term", "flip", "passed over"} <= soak.counts.keys()
    assert soak.pending is None
    assert any(path.name.startswith("damaged-") for path in soak.out.iterdir())

    for spoil, told in (
        (change_a_number, "params is not the same at step 80: .*ln_f"),
        (tell_twice, "has 86 lines, not 85"),
        (tell_another_loss, "metrics.jsonl says"),
    ):
        other = soak.folder / spoil.__name__
        shutil.copytree(soak.out, other)
        compare(soak.whole, other, LAST)
        spoil(other)
        with pytest.raises(Broken, match=told):
            compare(soak.whole, other, LAST)
    (soak.out / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir()
    with pytest.raises(Broken, match=r"left over: .*7\.orbax"):
        leftovers(soak.out)


class Ended:
    """A process as the soak sees it at its end."""

    name, out, err, resumed, reached = "it", "", "", None, -1

    def __init__(self, **said):
        vars(self).update(said)


@pytest.mark.parametrize(
    ("said", "before", "told"),
    [
        ({"reached": 3}, [10, 20], "it has begun anew beside"),
        ({"resumed": 10}, [10, 20], r"it resumed from 10, not \{20\}"),
        ({"resumed": 20}, [10, 20], "it resumed from 20, below 30"),
        ({"err": "Traceback (most recent call last):"}, [], "it: a traceback"),
    ],
)
def test_the_soak_notices_a_process_that_goes_on_from_elsewhere(said, before, told, tmp_path):
    soak = Soak(tmp_path, seed=1, max_iters=LAST, save_interval=10)
    soak.reached = 49
    with pytest.raises(Broken, match=told):
        soak.check_process(Ended(**said), before)


def test_the_soak_notices_checkpoints_that_are_lost_or_do_not_read(tmp_path):
    soak = Soak(tmp_path, seed=1, max_iters=LAST, save_interval=10)
    (soak.out / "checkpoints" / "20").mkdir(parents=True)
    with pytest.raises(Broken, match=r"step 20: .*metadata cannot be read"):
        soak.check_steps([10, 20])
    with pytest.raises(Broken, match="the newest whole checkpoint was 40, now it is 20"):
        soak.check_steps([30, 40])
