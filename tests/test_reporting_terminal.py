"""What a run shows on a terminal, and that it leaves it as it was."""

import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyte
import pytest
from rich.text import Text

import train
from gpt_jax import evaluate
from gpt_jax.config import TrainConfig
from gpt_jax.prepare import prepare
from gpt_jax.reporting import summary, terminal
from gpt_jax.reporting.progress import Progress, duration
from gpt_jax.reporting.terminal import Foot, evaluating, is_live, waiting
from gpt_jax.runtime import processes
from gpt_jax.runtime.signals import Output

ROOT = Path(__file__).parents[1]
TINY = [
    "train_shakespeare_char", "--dataset=text", "--n_layer=1", "--n_head=2", "--n_embd=16",
    "--block_size=16", "--batch_size=8", "--dropout=0", "--eval_interval=4", "--eval_iters=2",
    "--log_interval=1", "--always_save_checkpoint=True", "--max_iters=9", "--out_dir=out",
]  # fmt: skip
HIDES_CURSOR = "\033[?25l"


class Screen:
    """A terminal of some size that has been written to."""

    def __init__(self, columns: int = 80, rows: int = 24):
        self.columns, self.rows = columns, rows
        self.emulated = pyte.HistoryScreen(columns, rows, history=10_000, ratio=0.5)
        self.input = pyte.Stream(self.emulated)

    def feed(self, text: str) -> None:
        self.input.feed(text.replace("\r\n", "\n").replace("\n", "\r\n"))

    def lines(self) -> list[str]:
        """All lines with text, those that have scrolled out of sight too."""
        gone = [
            "".join(line[n].data for n in range(self.columns)) for line in self.emulated.history.top
        ]
        return [line.rstrip() for line in [*gone, *self.emulated.display] if line.strip()]

    @property
    def cursor(self) -> tuple[int, bool]:
        """Its column, and whether it is hidden."""
        return self.emulated.cursor.x, self.emulated.cursor.hidden


class Tty(io.StringIO):
    """A stream that says that it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def screen(self, columns: int = 80) -> Screen:
        screen = Screen(columns)
        screen.feed(self.getvalue())
        return screen


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """As on a usual terminal, whatever runs the tests; and nothing is drawn but when told to."""
    names = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(terminal, "PERIOD", 1000)
    monkeypatch.setattr(terminal, "compiled", set())


def on_terminal(monkeypatch) -> Tty:
    """Have stdout and stderr be a terminal: in a test itself, pytest puts back its own before."""
    stream = Tty()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def foot(*lines: str) -> Foot:
    return Foot(lambda width: [Text(line) for line in lines])


# --- the foot


def test_what_is_printed_goes_above_the_foot_whole(monkeypatch):
    tty = on_terminal(monkeypatch)
    with foot("one", "two"):
        print("a line")
        print("half", end="", flush=True)
        assert tty.screen().lines() == ["a line", "one", "two"]
        print(" a line")
        print("an error", file=sys.stderr)
        shown = tty.screen()
        assert shown.lines()[:3] == ["a line", "half a line", "an error"]
        assert shown.lines()[3:] == ["one", "two"]
        assert shown.cursor == (0, False)  # in the line below, where a shell can go on
        print("no end", end="")
    assert tty.screen().lines()[-1] == "no end"
    assert "one" not in tty.screen().lines()
    assert sys.stdout is tty
    assert sys.stderr is tty


@pytest.mark.parametrize("unbuffered", [False, True])  # by PYTHONUNBUFFERED
def test_a_ctrl_c_that_the_terminal_shows_spoils_no_line(unbuffered, monkeypatch):
    """It writes ^C wherever the cursor is, between two writes or two lines."""
    pieces = []

    class Device(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def isatty(self) -> bool:
            return True

        def write(self, data) -> int:
            pieces.extend(re.findall(".+\n?|\n", bytes(data).decode()))
            return len(data)

    how = {"write_through": True} if unbuffered else {"line_buffering": True}
    device: Any = Device() if unbuffered else io.BufferedWriter(Device())
    stream = io.TextIOWrapper(device, "utf-8", **how)
    monkeypatch.setattr(sys, "stdout", stream)
    whole = [f"iter {n}: loss 3.1415" for n in range(3)]
    with Foot(lambda width: [Text("x" * width), Text("y" * width)]):
        for line in whole:
            print(line)
    assert stream.write_through == unbuffered
    for n in range(1, len(pieces)):
        screen = Screen()
        screen.feed("".join(["^C" * (n == m) + piece for m, piece in enumerate(pieces)]))
        assert screen.lines() == whole, n


def test_a_foot_that_changes_its_height_leaves_nothing_behind(monkeypatch):
    tty = on_terminal(monkeypatch)
    lines = ["one", "two", "three"]
    with Foot(lambda width: [Text(line) for line in lines]) as shown:
        print("a line")
        lines[:] = ["four"]
        shown.refresh()
        assert tty.screen().lines() == ["a line", "four"]
        lines[:] = ["five", "six"]
        shown.refresh()
        assert tty.screen().lines() == ["a line", "five", "six"]
        before = tty.getvalue()
        shown.refresh()
        assert tty.getvalue() == before  # nothing is written that is there


def test_no_line_of_the_foot_wraps_and_none_is_above_the_screen(monkeypatch):
    tty = on_terminal(monkeypatch)
    monkeypatch.setattr(Foot, "size", lambda _: (40, 3))
    with foot("x" * 100, "y" * 40, "z", "w"):
        print("a line")
        assert tty.screen(40).lines() == ["a line", "x" * 39, "y" * 39]


def test_the_foot_goes_before_an_error_is_told_of(monkeypatch):
    tty = on_terminal(monkeypatch)
    with suppress(ZeroDivisionError), foot("one"):
        print("a line")
        raise ZeroDivisionError
    print("error: x", file=sys.stderr)
    shown = tty.screen()
    assert (shown.lines(), shown.cursor) == (["a line", "error: x"], (0, False))


def test_the_foot_goes_before_a_process_leaves_at_once(monkeypatch):
    tty = on_terminal(monkeypatch)

    def leaves(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leaves)
    with foot("one"):
        with pytest.raises(SystemExit):
            processes.leave(1, "error: x")
        assert tty.screen().lines() == ["error: x"]  # there would be nothing more
    assert not processes.before_leaving


def test_a_wrapped_foot_is_taken_away_whole(monkeypatch):
    """Terminals that become narrower wrap what is on them."""
    on_terminal(monkeypatch)
    with foot("x" * 79, "", "y") as shown:
        monkeypatch.setattr(shown, "size", lambda: (40, 24))
        assert shown.drawn() == 4


def test_in_the_background_nothing_is_drawn_and_lines_are_as_they_are(monkeypatch):
    tty = on_terminal(monkeypatch)
    with foot("one") as shown:
        with monkeypatch.context() as patch:
            patch.setattr(shown, "in_foreground", lambda: False)
            tty.truncate(0)
            tty.seek(0)
            shown.lines = lambda width: [Text("two")]
            shown.refresh()
            print("a line")
            assert tty.getvalue() == "a line\n"
        sys.stdout.write("another\n")
        shown.refresh()
        assert tty.screen().lines() == ["a line", "another", "two"]


@pytest.mark.parametrize("first", ["a line", "a drawing", "the end"])
def test_after_a_stop_what_the_shell_has_written_meanwhile_stays(first, monkeypatch):
    """Ctrl-Z, then fg: the terminal is this process's again, but what is above is the shell's."""
    tty, now, lines = on_terminal(monkeypatch), [100.0], ["one", "two"]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Foot(lambda width: [Text(line) for line in lines]) as shown:
        now[0] += terminal.PERIOD + 1  # late, as on a busy machine
        print("a line")
        now[0] += terminal.PERIOD + 60
        tty.write("A\nB\nC\n")
        if first == "a line":
            print("another")
        elif first == "a drawing":
            lines[:] = ["three"]
            shown.refresh()
            print("another")
        if first != "the end":
            drawn = [] if first == "a line" else ["three"]
            assert tty.screen().lines() == [
                "a line",
                "one",
                "two",
                "A",
                "B",
                "C",
                "another",
                *drawn,
            ]
            shown.refresh()
            assert tty.screen().lines()[7:] == lines
    rest = [] if first == "the end" else ["another"]
    assert tty.screen().lines() == ["a line", "one", "two", "A", "B", "C", *rest]


def test_a_terminal_that_is_held_by_ctrl_s_is_no_stop(monkeypatch):
    tty, now = on_terminal(monkeypatch), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with foot("one"):

        def held(text, write=tty.write):
            now[0] += terminal.PERIOD + 60
            return write(text)

        with monkeypatch.context() as patch:
            patch.setattr(tty, "write", held)
            print("a line")
        print("another")
        assert tty.screen().lines() == ["a line", "another", "one"]


def test_a_terminal_of_plain_ascii_gets_plain_bars(monkeypatch):
    tty = on_terminal(monkeypatch)
    monkeypatch.setattr(tty, "encoding", "ascii", raising=False)
    with foot("━━──"):
        assert tty.screen().lines() == ["##--"]


def test_who_listens_to_stdout_hears_lines_alone(monkeypatch):
    """W&B does, from when it starts to when it ends."""
    tty, heard = Tty(), []
    output = Output(tty, threading.Event())
    output.write = lambda text: heard.append(text) or tty.write(text)
    monkeypatch.setattr(sys, "stdout", output)
    with foot("one"):
        print("a line")
    assert heard == ["a line\n"]
    assert "one" in tty.getvalue()


def test_a_terminal_that_is_gone_is_for_the_log_to_tell(monkeypatch):
    tty = on_terminal(monkeypatch)

    def fails(text):
        raise OSError("gone")

    with foot("one") as shown, monkeypatch.context() as patch:
        patch.setattr(tty, "write", fails)
        shown.lines = lambda width: [Text("two")]
        shown.refresh()
        with pytest.raises(OSError, match="gone"):  # which Output, around it, drops in a stop
            print("a line")


@pytest.mark.parametrize("gone", ["TERM=dumb", "a pipe"])
def test_elsewhere_a_wait_is_one_plain_line(gone, monkeypatch):
    stream = io.StringIO() if gone == "a pipe" else Tty()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("TERM", "dumb" if gone == "TERM=dumb" else "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")  # of colours, not of whether this is a terminal
    assert not is_live()
    with waiting("waiting for Godot"), waiting("a moment", piped=False):
        pass
    assert stream.getvalue() == "waiting for Godot ...\n"


def test_a_wait_shows_its_seconds_and_leaves_nothing(monkeypatch):
    tty = on_terminal(monkeypatch)
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with waiting("waiting for Godot"):
        assert tty.screen().lines() == ["waiting for Godot ... 0s"]
        now[0] += 12.3
        with waiting("the boy"):
            assert tty.screen().lines() == ["the boy ... 0s"]
        Foot.shown.refresh()
        assert tty.screen().lines() == ["waiting for Godot ... 12s"]
    assert tty.screen().lines() == []
    assert Foot.shown is None


def test_an_evaluation_tells_of_its_compilation_once_and_how_far_it_is(monkeypatch):
    on_terminal(monkeypatch)
    for first in (True, False):
        with evaluating("val", 2.5, lambda: "asked") as stop:
            assert stop() == "asked"
            text = terminal.waits[-1].what
            assert text.startswith("compiling the evaluation step") is first
            stop()
            assert terminal.waits[-1].what == "evaluating on val: batch 2 of 3"
    assert terminal.waits == []


# --- how far a run is


class Future:
    def __init__(self, done: bool):
        self.done = lambda: done


class Checkpoints:
    saving = Future(True)


@pytest.fixture
def run(monkeypatch):
    """A run of many iterations, at its middle, whose every fact is known and long."""
    now = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    config = TrainConfig(max_iters=600_000, eval_interval=1000)
    memory = {"device_memory_peak": 78 * 2**30, "host_memory_peak": 2**30}
    meta = {"iter": 298_000, "best_val_loss": 12.5}
    run = Progress(config, meta, 491_520, 4e14, 989e12, lambda: memory)
    run.checkpoints = Checkpoints()

    def later(seconds: float) -> None:
        now[0] += seconds

    run.later = later
    run.stepped(298_000, 10.5)
    for n in range(298_001, 299_000):
        later(0.875)
        run.stepped(n, 10.5)
    run.evaluated(299_000, 10.123456)
    later(60)
    run.saving(299_000)
    run.resumed()
    for n in range(299_000, 300_000):
        later(0.875)
        run.stepped(n, 10.5)
    run.evaluated(300_000, 10.1357)
    return run


def plain(lines: list[Text]) -> list[str]:
    return [line.plain for line in lines]


@pytest.mark.parametrize("columns", [80, 120])
def test_all_facts_fit_a_usual_terminal(run, columns):
    first, second, third = plain(run.lines(columns - 1))
    left = 300_000 * 0.875 + 300 * 60  # the evaluation at 300,000 has been made
    assert run.left() == pytest.approx(left)
    assert re.fullmatch(rf"step 300,000/600,000 ━+─+  50%  {duration(left)} left", first)
    assert abs(first.count("━") - first.count("─")) <= 1
    assert len(first) == columns - 1
    assert second == (
        "loss 10.5000   561,737 tokens/s   mfu 46.2%   peak memory 78.00 GiB (device)"
    )
    assert (
        third
        == ("val loss 10.1357 at 300,000   best 10.1235 at 299,000   saved 299,000, 14m 35s ago")[
            : len(third)
        ]
    )
    assert "saved" in third or columns == 80


def test_on_narrow_terminals_facts_are_left_out_and_none_is_cut(run):
    wide = [set(line.split("   ")) for line in plain(run.lines(119))]
    for columns in range(12, 119):
        lines = plain(run.lines(columns))
        assert all(len(line) <= columns for line in lines), columns
        for line, facts in zip(lines[1:], wide[1:], strict=True):
            assert set(line.split("   ")) <= facts | {""}
    assert plain(run.lines(12)) == ["", "loss 10.5000", ""]


def test_what_is_not_known_is_not_shown():
    config = TrainConfig(max_iters=10, eval_interval=4)
    fresh = Progress(config, {"iter": 0, "best_val_loss": None}, 8, 1.0, None, dict)
    assert plain(fresh.lines(29)) == [f"step 0/10 {'─' * 14}   0%", "", ""]
    fresh.stepped(0, 3.0)
    fresh.stepped(1, 2.0)
    said = "".join(plain(fresh.lines(79)))
    assert "loss 2.0000" in said
    assert "tokens/s" in said
    assert "mfu" not in said
    assert "memory" not in said


def test_a_checkpoint_that_is_being_written_is_said_to_be(run):
    run.checkpoints.saving = Future(False)
    run.saving(300_000)
    assert plain(run.lines(119))[2].endswith("saving 300,000")


def test_what_is_waited_for_stands_in_the_place_of_the_last_iteration(run, monkeypatch):
    wait = terminal.Wait("evaluating on val: batch 3 of 200")
    monkeypatch.setattr(terminal, "waits", [wait])
    assert plain(run.lines(79))[1] == "evaluating on val: batch 3 of 200 ... 0s"
    assert len(plain(run.lines(79))) == 3


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0s"), (42, "42s"), (200, "3m 20s"), (18_720, "5h 12m"), (360_000, "4d 4h")],
)
def test_durations_are_said_as_people_say_them(seconds, said):
    assert duration(seconds) == said


def test_the_summary_is_a_table_that_keeps_within_the_terminal(monkeypatch):
    tty = on_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "40")
    facts = {"checkpoints": "a/long/path/" + "x" * 60, "speed": "12 tokens/s [sic]"}
    summary.show(facts, "1.5 nats/token")
    lines = tty.screen(40).lines()
    assert max(map(len, lines)) <= 40
    assert re.match(r" +val loss +1.5 nats/token", lines[1])
    assert "12 tokens/s [sic]" in lines[-2]  # no markup
    assert sum(line.count("x") for line in lines) == 60


# --- real runs


@contextmanager
def pseudo_terminal(columns: int, rows: int = 24):
    """A pseudo-terminal: its file, and what has been written to it, complete when it is closed."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    attributes = termios.tcgetattr(theirs)
    attributes[3] |= termios.NOFLSH  # or Ctrl-C drops what has not been read yet
    termios.tcsetattr(theirs, termios.TCSANOW, attributes)
    shown = bytearray()

    def read():
        with suppress(OSError):  # EIO: all have closed the other end
            while data := os.read(ours, 65536):
                shown.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with os.fdopen(theirs, "w", encoding="utf-8") as file:
            yield file, ours, shown
    finally:
        reader.join()
        os.close(ours)


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A working directory with a small data set of characters."""
    monkeypatch.chdir(tmp_path)
    lines = "".join(f"line {i}: to be, or not to be, that is the question.\n" for i in range(200))
    Path("text.txt").write_text(lines, "utf-8")
    prepare("text", Path("data/text"), input=Path("text.txt"), tokenizer="char", log=lambda _: None)


def frames(shown: bytes, columns: int):
    """The screen each time that something has been drawn, and at the end."""
    screen = Screen(columns)
    for part in re.split("(?<=\033\\[J)", shown.decode()):
        screen.feed(part)
        yield screen


def logged(lines: list[str]) -> list[int]:
    """The iterations of the log lines that are whole."""
    whole = r"iter (\d+): loss \d\.\d{4}, time \d+\.\d\dms, mfu n/a"
    return [int(found[1]) for line in lines if (found := re.fullmatch(whole, line))]


@pytest.mark.parametrize(("columns", "flags"), [(80, []), (120, ["--sample_tokens=5"])])
def test_a_run_says_what_it_waits_for_keeps_its_log_whole_and_ends_in_a_summary(
    columns, flags, text, monkeypatch
):
    if columns == 120:
        monkeypatch.setenv("NO_COLOR", "1")
    stepped, still_waited_for = Progress.stepped, []

    def spied_on(self, *its):
        still_waited_for.extend(terminal.waits)
        stepped(self, *its)

    monkeypatch.setattr(Progress, "stepped", spied_on)
    with pseudo_terminal(columns) as (file, _, shown):
        monkeypatch.setattr(sys, "stdout", file)
        monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *flags])
        assert train.main() == 0
    assert not still_waited_for  # once there is a step to tell of
    told, waited = "", set()
    for screen in frames(bytes(shown), columns):
        told = "\n".join(screen.emulated.display)
        waited |= set(re.findall(r"^(.+?)(?:: batch.*)? \.\.\. \d+s *$", told, re.M))
        assert all(line[-1] == " " for line in screen.emulated.display if line.startswith("step "))
    assert {re.sub(r" \(.*", "", wait) for wait in waited} == {
        "compiling the evaluation step", "compiling the training step", "evaluating on train",
        "evaluating on val", "writing the checkpoint",
        *(["drawing a sample of 5 tokens"] if flags else []),
    }  # fmt: skip
    lines = screen.lines()
    assert logged(lines) == list(range(9))
    assert [line for line in lines if line.startswith("step ")][-1].startswith("step 9: train loss")
    assert not [line for line in lines if "━" in line]
    assert any(re.fullmatch(r" *tokens seen +1,152", line) for line in lines)
    assert "python sample.py" in told
    assert screen.cursor == (0, False)
    assert HIDES_CURSOR not in shown.decode()
    colours = set(re.findall("\033\\[([0-9;]+)m", shown.decode()))
    assert colours <= ({"0", "1", "2"} if columns == 120 else {"0", "1", "2", "32"})


def test_evaluate_says_on_a_terminal_how_far_it_is_and_leaves_its_line(text, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, "--max_iters=1"])
    assert train.main() == 0
    with pseudo_terminal(80) as (file, _, shown):
        monkeypatch.setattr(sys, "stdout", file)
        monkeypatch.setattr(sys, "argv", ["evaluate", "--batch_size=16"])
        assert evaluate.main() == 0
    drawn = ["\n".join(screen.emulated.display) for screen in frames(bytes(shown), 80)]
    assert any(re.search(r"^evaluating on val.* \.\.\. \d+s", lines, re.M) for lines in drawn)
    *_, screen = frames(bytes(shown), 80)
    [line] = screen.lines()
    assert line.startswith("val loss ")


def test_an_error_stands_below_the_log_with_nothing_else(text, monkeypatch):
    with pseudo_terminal(80) as (file, _, shown):
        monkeypatch.setattr(sys, "stdout", file)
        monkeypatch.setattr(sys, "stderr", file)
        spoils = ["--learning_rate=1e30", "--warmup_iters=0", "--max_skipped=2"]
        monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *spoils])
        assert train.main() == 1
    *_, screen = frames(bytes(shown), 80)
    lines = screen.lines()
    [at] = [n for n, line in enumerate(lines) if line.startswith("error: 2 updates in a row")]
    assert logged(lines[:at]) == [0, 1, 2]
    assert lines[at - 1].startswith("iter 2: ")
    assert not [line for line in lines if "─" in line]
    assert screen.cursor == (0, False)


def in_terminal(file, *argv: str, **environment: str) -> subprocess.Popen:
    """Start a command whose terminal is ``file``, so that Ctrl-C there is a signal to it."""
    program = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "").strip()
    return subprocess.Popen(
        [sys.executable, "-c", program, sys.executable, *argv],
        stdin=file, stdout=file, stderr=file, start_new_session=True,
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


def wait_for(text: bytes, shown: bytearray, process: subprocess.Popen) -> None:
    while text not in shown:
        assert process.poll() is None, bytes(shown).decode()
        time.sleep(0.01)


def test_ctrl_c_saves_and_leaves_the_terminal_as_it_was(text):
    with pseudo_terminal(80) as (file, ours, shown):
        process = in_terminal(file, str(ROOT / "train.py"), *TINY, "--max_iters=100000")
        wait_for(b"iter 1:", shown, process)
        os.write(ours, b"\x03")
        assert process.wait() == 0
    *_, screen = frames(bytes(shown), 80)
    lines = screen.lines()
    assert re.fullmatch(r"stopped at iteration \d+ and saved; next:", lines[-2])
    assert lines[-1] == "  python train.py --init_from=resume"
    assert "SIGINT: saving after this iteration (again: stop now)" in lines
    assert logged(lines) == list(range(len(logged(lines))))
    assert not [line for line in lines if "─" in line]
    assert screen.cursor == (0, False)


WAITS = """
import sys, time
from rich.text import Text
from gpt_jax.reporting.terminal import Foot
from gpt_jax.runtime import signals
signals.ECHO = 0
with signals.Stop() as stop, Foot(lambda width: [Text("one"), Text("two")]):
    stop.wait_for_save()
    print("ready")
    time.sleep(600)
"""


@contextmanager
def stopping():
    """A process in a pseudo-terminal that has heard Ctrl-C, and waits."""
    with pseudo_terminal(80) as (file, ours, shown):
        process = in_terminal(file, "-c", WAITS)
        wait_for(b"ready", shown, process)
        os.write(ours, b"\x03")
        wait_for(b"stop now", shown, process)
        yield process, file, ours, shown


def test_a_second_ctrl_c_leaves_a_terminal_that_a_shell_can_go_on_with():
    with stopping() as (process, _, ours, shown):
        os.write(ours, b"\x03")
        assert process.wait() == 130
    *_, screen = frames(bytes(shown), 80)
    assert screen.lines() == [
        "ready", "SIGINT: saving after this iteration (again: stop now)",
        "SIGINT: stopped at once: what was done since the last checkpoint is not saved",
    ]  # fmt: skip
    assert screen.cursor == (0, False)


def test_a_second_ctrl_c_is_not_held_up_by_a_terminal_that_is():
    """Ctrl-S."""
    with stopping() as (process, file, *_):
        termios.tcflow(file.fileno(), termios.TCOOFF)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        termios.tcflow(file.fileno(), termios.TCOON)
