"""One run at a time in a folder, which is made when it can be and left as it was when not."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gpt_jax.config import TrainConfig
from gpt_jax.errors import UserError
from gpt_jax.runtime.running import LOCK, running

module = sys.modules[running.__module__]  # gpt_jax.runtime has the function by that name
ROOT = Path(__file__).parents[1]
LIMIT = 120  # seconds that no process here takes: one that hangs must not hang the tests
HOST = re.escape(socket.gethostname())
OUT = TrainConfig(out_dir="out")
PROGRAM = """
import sys
from gpt_jax.config import parse
from gpt_jax.errors import exit_code
from gpt_jax.runtime import connected
from gpt_jax.runtime.running import running

@exit_code
def main(argv):
    config = parse(argv)
    with connected(config, "again"), running(config):
        print("ready", flush=True)
        sys.stdin.readline()

sys.exit(main())
"""


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def start():
    """Start a process that is running in out until it has read a line."""
    started = []

    def start(*flags):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "--out_dir=out", *flags], text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


def says(pid):
    since = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    return (
        rf"out_dir=out is in use by process {pid} on {HOST} since {since}: wait for it, stop it "
        rf"\(kill {pid}\), or give another --out_dir"
    )


def test_a_second_run_is_refused_until_the_first_has_ended(start):
    first, second = start(), start()
    lines = {process: process.stdout.readline() for process in (first, second)}
    if lines[first] != "ready\n":
        first, second = second, first
    assert [lines[first], lines[second]] == ["ready\n", ""]
    out, err = second.communicate(timeout=LIMIT)
    assert (out, second.returncode) == ("", 2)
    assert re.fullmatch(f"error: {says(first.pid)}\n", err)
    with pytest.raises(UserError, match=says(first.pid)), running(OUT):
        pass
    assert json.loads(Path("out", LOCK).read_text())["pid"] == first.pid
    _, err = first.communicate("end\n", timeout=LIMIT)
    assert (err, first.returncode) == ("", 0)
    assert not os.listdir("out")
    with running(OUT):
        pass


def test_a_run_that_was_killed_bars_no_one(start):
    killed = start()
    assert killed.stdout.readline() == "ready\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait(LIMIT)
    assert json.loads(Path("out", LOCK).read_text())["pid"] == killed.pid
    with running(OUT):
        [line] = Path("out", LOCK).read_text().splitlines()
        assert json.loads(line)["pid"] == os.getpid()
        assert json.loads(line)["host"] == socket.gethostname()
    assert not os.listdir("out")
    Path("out", LOCK).write_text("more than a line\n" * 99)
    with running(OUT):
        assert json.loads(Path("out", LOCK).read_text())["pid"] == os.getpid()


def test_the_dead_are_not_named_as_the_holder(start, monkeypatch):
    """Between a lock and the line of who holds it there is the line of a run that was killed."""
    monkeypatch.setattr(module, "PATIENCE", 0)
    killed = start()
    assert killed.stdout.readline() == "ready\n"
    dead = Path("out", LOCK).read_text()
    killed.kill()
    killed.wait(LIMIT)
    with running(OUT):
        for text in (dead, "", "[]", "{}", '{"pid": "a", "host": "b"}'):
            Path("out", LOCK).write_text(text)
            with pytest.raises(UserError, match="in use by another process: wait"), running(OUT):
                pass
        elsewhere = {"pid": json.loads(dead)["pid"], "host": "elsewhere", "time": "today"}
        Path("out", LOCK).write_text(json.dumps(elsewhere))
        with pytest.raises(UserError, match=r"process \d+ on elsewhere since today"), running(OUT):
            pass


def test_who_asks_too_early_waits_for_the_line_of_the_holder(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", LIMIT)
    with running(OUT):
        text = Path("out", LOCK).read_text()
        Path("out", LOCK).write_text("")
        monkeypatch.setattr(module.time, "sleep", lambda _: Path("out", LOCK).write_text(text))
        with pytest.raises(UserError, match=says(os.getpid())), running(OUT):
            pass


def test_of_eight_that_start_at_once_one_runs():
    gate, all_tried, said = threading.Barrier(8), threading.Barrier(8), []

    def work():
        gate.wait(LIMIT)
        try:
            with running(OUT):
                said.append("ran")
                all_tried.wait(LIMIT)
        except UserError as error:
            said.append(str(error))
            all_tried.wait(LIMIT)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said.remove("ran")
    assert len(said) == 7
    assert all(re.fullmatch(says(os.getpid()), line) for line in said)


def test_a_lock_that_was_removed_while_it_was_taken_is_taken_again(monkeypatch):
    """Its holder removes it as it ends: two could each hold a file of that name."""
    flock = module.fcntl.flock

    def late(file, how):
        monkeypatch.setattr(module.fcntl, "flock", flock)
        os.unlink(f"out/{LOCK}")
        if next(made_anew):
            Path("out", LOCK).touch()
        flock(file, how)

    made_anew = iter((False, True))
    for _ in range(2):
        monkeypatch.setattr(module.fcntl, "flock", late)
        with running(OUT), pytest.raises(UserError, match=says(os.getpid())), running(OUT):
            pass


def test_a_lock_that_is_anothers_by_now_is_left_alone():
    with running(OUT):
        os.unlink(f"out/{LOCK}")
        Path("out", LOCK).write_text("another's")
    assert Path("out", LOCK).read_text() == "another's"


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.EINVAL, errno.ENOSYS, None])
def test_where_there_are_no_locks_a_run_goes_on_without(number, monkeypatch):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    if number is None:
        monkeypatch.setattr(module, "fcntl", None)
    else:
        monkeypatch.setattr(module.fcntl, "flock", flock)
    with running(OUT), running(OUT):
        assert not os.listdir("out")
    assert not os.listdir("out")


def test_an_evaluation_alone_makes_nothing_locks_nothing_and_hears_nothing():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with running(TrainConfig(out_dir="out", eval_only=True)) as stop:
        assert not os.path.exists("out")
        assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
        assert stop.at(1) is False
    with running(OUT), running(TrainConfig(out_dir="out", eval_only=True)):
        assert os.listdir("out") == [LOCK]


def test_with_nothing_to_resume_from_nothing_is_made():
    with running(TrainConfig(out_dir="out", init_from="resume")) as stop:
        assert not os.path.exists("out")
        assert stop.at(1) is False
    os.mkdir("out")
    with running(TrainConfig(out_dir="out", init_from="resume")):
        assert os.listdir("out") == [LOCK]
    with running(TrainConfig(out_dir="new", init_from="auto")):
        assert os.listdir("new") == [LOCK]


def test_signals_are_heard_from_the_first_moment_to_the_last():
    with running(OUT) as stop:
        stop.wait_for_save()
        signal.raise_signal(signal.SIGTERM)
        assert stop.noted.wait(LIMIT)
        assert stop.at(1)


def test_an_empty_folder_that_a_failed_run_has_made_is_removed_again():
    with pytest.raises(ZeroDivisionError), running(TrainConfig(out_dir="a/b/c")):
        raise ZeroDivisionError
    assert not os.listdir()
    with running(TrainConfig(out_dir="a/b/c")):
        pass
    os.rmdir("a/b/c")
    with (
        pytest.raises(FileExistsError),
        running(TrainConfig(out_dir="a/b/c/d")),
        open("a/b/kept", "x"),
    ):
        os.mkdir("a/b")
    assert os.listdir("a/b") == ["kept"]
    os.mkdir("a/b/c")  # not by the run
    with pytest.raises(ZeroDivisionError), running(TrainConfig(out_dir="a/b/c")):
        raise ZeroDivisionError
    assert os.path.isdir("a/b/c")
    with running(OUT):
        pass
    assert os.path.isdir("out")


def test_a_folder_that_cannot_be_made_or_written_is_refused():
    Path("file").touch()
    for out_dir in ("file", "file/out"):
        refused = f"^out_dir={out_dir} cannot be made: file is a file: name a folder$"
        with pytest.raises(UserError, match=refused), running(TrainConfig(out_dir=out_dir)):
            pass
    os.makedirs(f"out/{LOCK}")
    with pytest.raises(UserError, match=r"^out_dir=out cannot be written: .*\.lock"), running(OUT):
        pass


def test_every_one_of_several_processes_says_why_they_are_refused(start):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    named = (f"--coordinator_address={address}", "--num_processes=2", "--device=cpu")
    with running(OUT):
        group = [start(*named, f"--process_id={i}") for i in range(2)]
        for process in group:
            _, err = process.communicate(timeout=LIMIT)
            assert process.returncode == 2
            assert re.search(f"^error: {says(os.getpid())}\n", err, re.M)
        assert os.listdir("out") == [LOCK]
