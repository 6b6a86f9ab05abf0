"""Pictures of losses hold the numbers of metrics.jsonl, with units, whatever is in it."""

import json
import os
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from gpt_jax import integrity, plot
from gpt_jax.errors import UserError
from gpt_jax.plot import figure, losses
from gpt_jax.plot.background import LossPicture
from gpt_jax.plot.figure import COLOURS, POINTS, legible, names, rate_label, save, short
from gpt_jax.plot.log import Log
from gpt_jax.plot.losses import comparison_picture, run_picture

GOLDEN = Path(__file__).parent / "golden" / "run"
TOKENS = 256  # of an iteration


def step(i: int, loss: float = 2.0, **more) -> dict:
    return {"iter": i, "loss": loss, "lr": 1e-3, "skipped": 0, "tokens": (i + 1) * TOKENS,
            "time": 0.5 * (i + 1), **more}  # fmt: skip


def evaluation(i: int, loss: float, **more) -> dict:
    return {"iter": i, "train_loss": loss - 0.25, "val_loss": loss, "tokens": i * TOKENS,
            "time": 0.5 * i, **more}  # fmt: skip


def run_of(path: Path, entries: list[dict], **config) -> Path:
    """Write a run's metrics, and its config if some of it is given."""
    path.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    (path / "metrics.jsonl").write_text(text)
    if config:
        (path / "config.json").write_text(json.dumps(config))
    return path


def log_of(path: Path, entries: list[dict], **config) -> Log:
    return Log(run_of(path, entries, **config) / "metrics.jsonl").read()


def without(entry: dict, *keys: str) -> dict:
    return {name: x for name, x in entry.items() if name not in keys}


def curves(axes) -> dict[str, tuple[list, list]]:
    """The lines of a picture, by the first word of their label."""
    return {
        str(line.get_label()).split()[0].rstrip(":"): (
            np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist())
        for line in axes.lines
    }  # fmt: skip


SHORT = [evaluation(0, 3.0), step(0, 2.9), step(1, 2.5), evaluation(2, 2.25), step(2, 2.125),
         step(3, 2.0), evaluation(4, 2.5)]  # fmt: skip


@pytest.mark.parametrize(
    ("x", "label", "scale", "after"),
    [
        ("step", "iteration", 1, 0),
        ("tokens", "tokens seen in training", TOKENS, 1),
        ("time", "training time (seconds)", 0.5, 1),
    ],
)
def test_the_picture_of_a_run_holds_the_numbers_of_its_file(tmp_path, x, label, scale, after):
    upper, lower = run_picture(log_of(tmp_path / "one", SHORT), x).axes
    drawn = curves(upper)
    at = [scale * (i + after) for i in range(4)]
    assert drawn["batch"] == (at, [2.9, 2.5, 2.125, 2.0])
    assert drawn["val"] == ([0, 2 * scale, 4 * scale], [3.0, 2.25, 2.5])
    assert drawn["train"] == ([0, 2 * scale, 4 * scale], [2.75, 2.0, 2.25])
    assert (upper.get_ylabel(), lower.get_ylabel()) == ("loss (nats/token)", "learning rate")
    assert (upper.get_title(), lower.get_xlabel()) == ("one", label)
    np.testing.assert_array_equal(lower.lines[0].get_xydata(), [[i, 1e-3] for i in at])
    legend = [text.get_text() for text in upper.get_legend().get_texts()]
    assert legend == ["batch", "train 2.2500 (best 2.0000)", "val 2.5000 (best 2.2500)"]


@pytest.mark.parametrize(
    ("seconds", "label", "end"),
    [(90, "seconds", 90), (600, "minutes", 10), (5 * 3600, "hours", 5)],
)
def test_time_is_shown_in_the_unit_that_fits(tmp_path, seconds, label, end):
    entries = [evaluation(0, 3.0), evaluation(1, 2.0, time=float(seconds))]
    [axes] = run_picture(log_of(tmp_path, entries), "time").axes  # no step: no learning rate
    assert axes.get_xlabel() == f"training time ({label})"
    assert curves(axes)["val"][0] == [0, end]


def test_a_line_marks_where_a_run_was_resumed_but_not_where_it_ended(tmp_path):
    """A finished run that is started again evaluates once more, and goes on from nothing."""
    entries = [step(0), step(1), step(2, resumed=2), evaluation(3, 2.0, resumed=3),
               step(3), evaluation(4, 2.0, resumed=4)]  # fmt: skip
    upper, lower = run_picture(log_of(tmp_path, entries)).axes
    for axes in (upper, lower):
        marks = [line for line in axes.lines if line.get_linestyle() == ":"]
        assert [line.get_xdata()[0] for line in marks] == [2, 3]
    assert [t.get_text() for t in upper.get_legend().get_texts()].count("resumed") == 1


def test_where_a_run_was_resumed_is_not_where_its_next_line_is(tmp_path):
    """It was stopped after 12 iterations; those that are logged are tens."""
    tokens = lambda n: {"tokens": 100 * n}  # noqa: E731
    entries = [step(0, **tokens(1)), step(10, **tokens(11)), step(20, resumed=12, **tokens(21)),
               step(30, **tokens(31))]  # fmt: skip
    log = log_of(tmp_path, entries)
    for x, at in (("step", 12), ("tokens", 1300)):
        marks = [line for line in run_picture(log, x).axes[0].lines if line.get_linestyle() == ":"]
        assert [line.get_xdata()[0] for line in marks] == [at]


def test_a_run_far_shorter_than_another_is_seen_beside_it(tmp_path):
    long = [evaluation(0, 9.0), *(evaluation(20 * i, 2.6 - 0.005 * i) for i in range(1, 101))]
    short = [evaluation(0, 9.0), *(evaluation(20 * i, 4.2 - 0.1 * i) for i in range(1, 6))]
    [axes] = comparison_picture([log_of(tmp_path / "a", long), log_of(tmp_path / "b", short)]).axes
    low, high = axes.get_ylim()
    assert low < 2.1
    assert 4.1 < high < 9


def test_updates_left_out_and_losses_that_are_not_finite_are_marked(tmp_path):
    entries = [step(0), step(1, float("nan"), skipped=1), step(2, skipped=1), step(3, skipped=3),
               step(4, float("inf"), skipped=3), evaluation(5, float("nan"))]  # fmt: skip
    drawn = curves(run_picture(log_of(tmp_path, entries)).axes[0])
    assert drawn["updates"][0] == [1, 3]
    assert sorted(drawn["loss"][0]) == [1, 4, 5, 5]  # of the evaluation, train and val
    assert drawn["batch"][1][0::2] == pytest.approx([2, 2, np.nan], nan_ok=True)


def test_the_axis_shows_the_end_of_a_run_and_says_what_lies_above(tmp_path):
    entries = [step(i, 3 + 8 * 0.9**i) for i in range(400)]
    entries += [evaluation(i, 3.1 + 8 * 0.9**i) for i in range(0, 401, 50)]
    axes = run_picture(log_of(tmp_path, entries)).axes[0]
    low, high = axes.get_ylim()
    assert 2.5 < low < 2.85  # train's last loss is 2.85
    assert high < 4.5
    assert axes.get_title(loc="right") == "\u2191 losses up to 11.10"


def test_a_spike_does_not_flatten_the_rest_and_a_diverged_run_is_shown(tmp_path):
    spike = [step(i, 3.0 + 0.001 * (i % 50) + 50 * (i == 300)) for i in range(1000)]
    assert run_picture(log_of(tmp_path / "spike", spike)).axes[0].get_ylim()[1] < 3.1
    diverged = [step(i, 3.0 if i < 900 else 7.5) for i in range(1000)]
    assert run_picture(log_of(tmp_path / "gone", diverged)).axes[0].get_ylim()[1] > 7.5


@pytest.mark.parametrize(
    "entries",
    [
        [step(0)],
        [evaluation(0, 2.0)],
        [evaluation(0, 3.0), evaluation(7, 2.0)],
        [step(0), step(1)],
        [step(0, float("nan"))],
        [evaluation(0, float("inf"))],
        [step(0, 1e300), step(1, -1e300), step(2)],
        [step(0, lr=0.0, skipped="x", tokens=10**400, time=None)],
        [step(2**31 - 1)],
    ],
    ids=str,
)
def test_few_or_odd_points_are_drawn(tmp_path, entries):
    log = log_of(tmp_path, entries)
    for picture in (run_picture(log), comparison_picture([log, log])):
        assert save(picture, tmp_path / "x.png").stat().st_size > 1000
        for axes in picture.axes:
            assert axes.get_xlabel() or axes.get_ylabel()
            assert np.abs(axes.get_ylim()).max() < 1e3


def test_a_long_run_is_drawn_with_few_points_and_no_spike_lost(tmp_path):
    n = 20 * POINTS
    entries = [step(i, 3.0 + (i == 12345) - 0.5 * (i == 54)) for i in range(n)]
    axes = run_picture(log_of(tmp_path, entries)).axes[0]
    batch, median = axes.lines[:2]
    assert median.get_label() == "batch, running median"
    assert len(batch.get_xdata()) == 2 * POINTS
    assert (np.max(batch.get_ydata()), np.min(batch.get_ydata())) == (4.0, 2.5)
    assert len(median.get_xdata()) == POINTS
    assert set(median.get_ydata()) == {3.0}


def test_the_running_median_follows_the_first_fall_and_leaves_out_what_is_not_finite():
    x, y = np.arange(200.0), 10.0 * 0.5 ** np.arange(200)
    y[100] = np.nan
    at, median = figure.running_median(x, y)
    assert 100 not in at
    assert median[:2].tolist() == [10, 5]
    np.testing.assert_array_equal(median[10], y[10])  # of what falls, the middle


# ---- several runs


def test_a_comparison_has_a_line_a_run_over_each_x(tmp_path):
    a = log_of(tmp_path / "a" / "out", SHORT)
    b = log_of(tmp_path / "b" / "out", [evaluation(0, 3.5), evaluation(8, 1.5)])
    scales = {"step": 1, "tokens": TOKENS, "time": 0.5}
    for x, scale in scales.items():
        [axes] = comparison_picture([a, b], x).axes
        drawn = curves(axes)
        assert drawn["a/out"] == ([0, 2 * scale, 4 * scale], [3.0, 2.25, 2.5])
        assert drawn["b/out"] == ([0, 8 * scale], [3.5, 1.5])
        assert axes.get_ylabel() == "loss (nats/token)"
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend[:2] == ["a/out: 2.5000 (best 2.2500)", "b/out: 1.5000"]
    strong = [line for line in axes.lines if str(line.get_label())[1:5] == "/out"]
    assert len({line.get_color() for line in strong}) == len({x.get_marker() for x in strong}) == 2


def test_a_comparison_says_what_lies_above_its_axis(tmp_path):
    logs = [log_of(tmp_path / name, [evaluation(i, 3 + 8 * 0.5**i) for i in range(100)])
            for name in "ab"]  # fmt: skip
    [axes] = comparison_picture(logs).axes
    assert axes.get_ylim()[1] < 4
    assert axes.get_title(loc="right") == "\u2191 losses up to 11.00"
    assert axes.get_title(loc="left") == ""


@pytest.mark.parametrize("last", [98_500_000, 100_000_000, 122_600])
def test_the_last_label_of_an_axis_is_whole(tmp_path, last):
    logs = [log_of(tmp_path / n, [evaluation(i, 2.0, tokens=i * last) for i in (0, 1)])
            for n in "ab"]  # fmt: skip
    for picture in (run_picture(logs[0], "tokens"), comparison_picture(logs, "tokens")):
        picture.canvas.draw()
        ends = [text.get_window_extent().x1 for text in picture.axes[-1].get_xticklabels()]
        low, high = picture.axes[-1].get_xlim()
        ticks = picture.axes[-1].get_xticks()
        shown = [end for end, tick in zip(ends, ticks, strict=True) if low <= tick <= high]
        assert max(shown) < picture.bbox.width - 5  # pixels


def trained_run(path: Path, **tokenizer) -> Path:
    """The golden run, with another tokenizer in its checkpoint if one is given."""
    shutil.copytree(GOLDEN, path)
    [meta] = path.glob("checkpoints/*/meta/metadata")
    if tokenizer:
        integrity.amend(meta, {"tokenizer": tokenizer})
    return path


def test_runs_of_other_data_or_tokenizers_are_not_comparable(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = {
        "char": trained_run(Path("char")),
        "gpt2": trained_run(Path("gpt2"), kind="tiktoken", name="gpt2"),
        "with_file": trained_run(Path("with_file"), kind="tiktoken", name="gpt2", merges="a b"),
        "other": run_of(Path("other"), SHORT, dataset="openwebtext"),
        "unknown": run_of(Path("unknown"), SHORT),
        "broken": run_of(Path("broken"), SHORT),
    }
    (runs["broken"] / "config.json").write_text("{")
    for names_, found in {
        "char unknown broken": {},
        "gpt2 with_file": {},
        "gpt2 char": {"tokenizers": ["gpt2", "char"]},
        "other char unknown": {"data sets": ["openwebtext", "text"]},
        "other char gpt2": {"data sets": ["openwebtext", "text"], "tokenizers": ["char", "gpt2"]},
    }.items():
        logs = plot.read([runs[name] for name in names_.split()])
        assert losses.differing(logs) == found
        title = comparison_picture(logs).axes[0].get_title(loc="left")
        assert title == (f"not comparable: {' and '.join(found)} differ" if found else "")
    assert command(monkeypatch, "other", "char", "gpt2") == 0
    said = capsys.readouterr()
    assert said.out == "comparison.png\n"
    assert said.err == (
        "note: data sets differ (openwebtext, text), tokenizers differ (char, gpt2): "
        "their losses cannot be compared\n"
    )


def test_a_run_named_twice_is_drawn_once_and_that_is_said(runs, monkeypatch, capsys):
    for argv, picture in ((["a", "a/"], "a/loss.png"), (["a", "b", "a"], "comparison.png")):
        assert command(monkeypatch, *argv) == 0
        said = capsys.readouterr()
        assert said.out == f"{picture}\n"
        assert said.err == "note: a run that is named twice is drawn once\n"


def test_fourteen_runs_are_told_apart_by_more_than_colour(tmp_path):
    logs = [log_of(tmp_path / f"run{i}", SHORT) for i in range(14)]
    drawn = [x for x in comparison_picture(logs).axes[0].lines if str(x.get_label())[:3] == "run"]
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in drawn}
    assert len(looks) == 14
    assert {color for color, _, _ in looks} == set(COLOURS)


def test_a_run_not_yet_evaluated_is_compared_by_its_batches(tmp_path):
    a, b = log_of(tmp_path / "a", SHORT), log_of(tmp_path / "b", [step(0, 3.0), step(1, 2.0)])
    axes = comparison_picture([a, b]).axes[0]
    assert "b: (not evaluated yet)" in [t.get_text() for t in axes.get_legend().get_texts()]
    assert ([0, 1], [3, 2]) in [
        (x.get_xdata().tolist(), x.get_ydata().tolist()) for x in axes.lines[:-1]
    ]


def test_runs_are_named_by_the_shortest_end_that_tells_them_apart(tmp_path):
    paths = [tmp_path / x for x in ("a/x", "b/x", "y", "_z", "p$q$", "\u4f60")]
    assert names(paths) == ["a/x", "b/x", "y", "./_z", r"p\$q\$", "\\u4f60"]


def test_numbers_are_written_as_people_say_them():
    assert [short(x) for x in (0, 5000, 600e3, 1.5e6, 3e11)] == [
        "0",
        "5000",
        "600k",
        "1.5M",
        "300B",
    ]
    assert [rate_label(x) for x in (0, 6e-4, 1.5e-5, 1)] == ["0", "6e-4", "1.5e-5", "1e0"]
    assert legible("a b\n$\u2423") == "a b\\n\\$\u2423"


# ---- older files


def test_tokens_of_an_older_run_come_from_its_config():
    steps, evals = Log(GOLDEN / "metrics.jsonl").read().over("tokens")
    config = json.loads((GOLDEN / "config.json").read_text())
    tokens = config["gradient_accumulation_steps"] * config["batch_size"] * config["block_size"]
    assert steps["x"].tolist() == [tokens * (i + 1) for i in range(6)]
    assert evals["x"].tolist() == [0, 6 * tokens]


def test_what_a_file_says_of_tokens_goes_before_its_config(tmp_path):
    entries = [without(step(0), "tokens"), step(1), evaluation(2, 3.0)]
    config = {"gradient_accumulation_steps": 1, "batch_size": 2, "block_size": 50}
    steps, evals = log_of(tmp_path, entries, **config).over("tokens")
    assert (steps["x"].tolist(), evals["x"].tolist()) == ([100, 2 * TOKENS], [2 * TOKENS])


def test_a_file_is_read_on_from_where_it_ended(tmp_path):
    path = run_of(tmp_path, SHORT) / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    log = Log(path).read()
    assert log.evals["iter"].tolist() == [0, 2]
    with path.open("ab") as file:
        file.write(whole[-10:])
    path.write_bytes(b"{}\n[1]\nx\n" + path.read_bytes())
    log = Log(path).read()
    assert log.read().evals["iter"].tolist() == [0, 2, 4]
    assert log.steps["loss"].tolist() == [2.9, 2.5, 2.125, 2.0]


def test_a_line_is_taken_once_when_it_is_whole(tmp_path):
    path = run_of(tmp_path, SHORT) / "metrics.jsonl"
    whole = path.read_bytes()
    log = Log(path)
    for end in range(0, len(whole) + 1, 7):
        path.write_bytes(whole[:end])
        log.read()
    path.write_bytes(whole)
    assert log.read().steps["iter"].tolist() == [0, 1, 2, 3]
    assert log.evals["iter"].tolist() == [0, 2, 4]


# ---- the command


def command(monkeypatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["plot", *argv])
    return plot.main()


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A working directory with the runs a, b and, of an older version, old."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        run_of(Path(name), SHORT)
    run_of(Path("old"), [without(entry, "tokens", "time") for entry in SHORT])
    Path("empty").mkdir()
    Path("empty/metrics.jsonl").touch()


@pytest.mark.parametrize(
    ("argv", "picture", "magic"),
    [
        (["a"], "a/loss.png", b"\x89PNG"),
        (["a/metrics.jsonl"], "a/loss.png", b"\x89PNG"),
        (["a", "--x=tokens"], "a/loss.png", b"\x89PNG"),
        (["a", "x.svg"], "x.svg", b"<?xml"),  # as before there were flags
        (["a", "b"], "comparison.png", b"\x89PNG"),
        (["a", "b", "x.PNG"], "x.PNG", b"\x89PNG"),
        (["--x=time", "a", "b", "--out=x.pdf"], "x.pdf", b"%PDF"),
        (["old", "b", "--out=x.png"], "x.png", b"\x89PNG"),
        (["a", "a/", "--out=x.png"], "x.png", b"\x89PNG"),  # one run
    ],
)
def test_the_command_writes_the_picture_and_says_where(
    runs, monkeypatch, capsys, argv, picture, magic
):
    assert command(monkeypatch, *argv) == 0
    assert capsys.readouterr().out == f"{picture}\n"
    assert Path(picture).read_bytes().startswith(magic)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "no run is named; usage: "),
        (["--x=time"], "no run is named; usage: "),
        (["c"], "c/metrics.jsonl is not there: name the out_dir of a run"),
        (["a", "c.png", "x.svg"], "c.png/metrics.jsonl is not there"),
        (["a", "empty"], "empty/metrics.jsonl holds no metrics yet: train first"),
        (["a", "--x=epoch"], "x='epoch' is not one of step|tokens|time"),
        (["a", "--y=time"], "unknown key 'y'"),
        (["a", "--out"], "--out has no value"),
        (["a", "--out=x.jpg"], "x.jpg is no picture's name: let it end in .png, .svg, .pdf"),
        (["a", "--out=none/x.png"], "none/x.png cannot be written: there is no folder none: "),
        (["a", "--out=a/metrics.jsonl/x.png"], "there is no folder a/metrics.jsonl: make it, or "),
        (["a", "old", "--x=tokens"], "put the run's config.json beside it, or use --x=step"),
        (["old", "--x=time"], "does not say the time of its lines, an older version wrote it: use"),
    ],
)  # fmt: skip
def test_wrong_input_is_told_in_a_line(runs, monkeypatch, capsys, argv, said):
    assert command(monkeypatch, *argv) == 2
    said_all = capsys.readouterr()
    assert said_all.out == ""
    assert said_all.err.count("\n") == 1
    assert said_all.err.startswith("error: ")
    assert said in said_all.err


def test_help_names_every_key(monkeypatch, capsys):
    assert command(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    assert "--x=step" in out
    assert "--out=''" in out
    assert "RUN [RUN ...]" in out


# ---- while a run goes on


def test_a_picture_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    log, path = log_of(tmp_path, SHORT), tmp_path / "loss.png"
    save(run_picture(log), path)
    old = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("plug pulled")))
    with pytest.raises(UserError, match="plug pulled"):
        save(comparison_picture([log]), path)
    assert path.read_bytes() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_what_is_asked_for_while_a_picture_is_drawn_becomes_one(tmp_path, monkeypatch):
    begun, go_on, drawn = threading.Event(), threading.Event(), []

    def slow(log):
        drawn.append(log.evals["iter"].tolist())
        begun.set()
        go_on.wait(60)
        return run_picture(log)

    monkeypatch.setattr("gpt_jax.plot.background.run_picture", slow)
    path = run_of(tmp_path, SHORT[:1]) / "metrics.jsonl"
    picture = LossPicture(str(tmp_path))
    picture.draw()
    assert begun.wait(60)
    for entry in SHORT[1:]:
        with path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        picture.draw()
    go_on.set()
    picture.close()
    assert drawn == [[0], [0, 2, 4]]
    assert (tmp_path / "loss.png").is_file()
    assert picture.complaint() == ""


def test_a_picture_that_cannot_be_drawn_is_a_line_said_once(tmp_path, monkeypatch):
    run_of(tmp_path, SHORT)
    picture = LossPicture(str(tmp_path))

    def drawn() -> str:
        picture.draw()
        picture.thread.submit(int).result()
        return picture.complaint()

    with monkeypatch.context() as patch:
        patch.setattr("gpt_jax.plot.background.run_picture", lambda _: 1 / 0)
        assert drawn() == "no loss.png was drawn: ZeroDivisionError: division by zero"
        assert drawn() == ""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        assert "ModuleNotFoundError" in drawn()
    assert drawn() == ""
    assert (tmp_path / "loss.png").is_file()
    picture.close()


def test_the_constants_of_a_picture_agree():
    assert len(losses.MARKERS) == len(COLOURS)
