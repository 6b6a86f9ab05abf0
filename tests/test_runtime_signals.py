"""A stop is heard whatever the main thread does, waits for what is worth saving, and not longer."""

import itertools
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from gpt_jax.runtime import signals
from gpt_jax.runtime.processes import global_state
from gpt_jax.runtime.signals import STOPS, Stop

ROOT = Path(__file__).parents[1]
NUMBERS = [getattr(signal, name) for name in STOPS]
LIMIT = 120  # seconds that no process here takes: one that hangs must not hang the tests
HEAD = """
import ctypes, os, signal, sys, threading
from gpt_jax.runtime import signals
from gpt_jax.runtime.signals import Stop

def lost_in_c():
    # as in a compilation: no bytecode is run any more. Who waits for a condition gives the mutex
    # back, so that the thread gets it only when this one is lost
    c = ctypes.CDLL(None)
    mutex, condition = ctypes.create_string_buffer(256), ctypes.create_string_buffer(256)
    c.pthread_mutex_init(mutex, None)
    c.pthread_cond_init(condition, None)
    c.pthread_mutex_lock(mutex)

    def ready():
        c.pthread_mutex_lock(mutex)
        os.write(1, b"ready\\n")

    print("not flushed")
    threading.Thread(target=ready, daemon=True).start()
    c.pthread_cond_wait(condition, mutex)
"""
SAVES = "stop.wait_for_save()"


@pytest.fixture
def start():
    """Start a process that does the lines in a Stop, and read on until it is ready."""
    started = []

    def start(*lines, **more):
        body = "".join(f"    {line}\n" for line in lines)
        code = f"{HEAD}\nwith Stop() as stop:\n{body}"
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen(
            [*more.pop("before", ()), sys.executable, "-c", code], text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
            **{**pipes, **more},
        )  # fmt: skip
        started.append(process)
        if process.stdout:
            assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                pipe.close()


@pytest.fixture
def exits(monkeypatch):
    """The codes that os._exit was called with: it would end the tests too."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


def ends(process, *words):
    return (*process.communicate("".join(f"{w}\n" for w in words), LIMIT), process.returncode)


@pytest.mark.parametrize("number", NUMBERS)
def test_before_there_is_progress_a_signal_ends_the_process_at_once_with_0(number, start):
    """C15."""
    process = start("lost_in_c()")
    process.send_signal(number)
    line = f"{number.name}: stopped before the first new iteration: nothing to save\n"
    assert ends(process) == ("not flushed\n", line, 0)


@pytest.mark.parametrize("number", NUMBERS)
def test_with_progress_a_first_signal_is_noted_and_the_run_goes_on(number, start):
    """C15."""
    process = start(
        SAVES, "before = stop.asked, stop.at(3)", "print('ready', flush=True)",
        "sys.stdin.readline()", "print(before, stop.asked, stop.at(4))",
    )  # fmt: skip
    process.send_signal(number)
    assert process.stderr.readline() == "\n"
    line = f"{number.name}: saving after this iteration (again: stop now)\n"
    assert process.stderr.readline() == line
    assert ends(process, "go on") == ("(False, False) True True\n", "", 0)


@pytest.mark.parametrize(("first", "second"), [*itertools.product(NUMBERS[:2], repeat=2)])
def test_a_second_signal_leaves_at_once_with_130_whatever_the_main_thread_does(
    first, second, start
):
    """C15."""
    process = start("signals.ECHO = 0", SAVES, "lost_in_c()")
    process.send_signal(first)
    assert [process.stderr.readline() for _ in range(2)][1].startswith(f"{first.name}: saving")
    process.send_signal(second)
    line = (
        f"\n{second.name}: stopped at once: what was done since the last checkpoint is not saved\n"
    )
    assert ends(process) == ("not flushed\n", line, 130)


@pytest.mark.parametrize("name", ["HUP", "INT", "USR1", "TERM"])
def test_a_signal_that_nohup_or_a_shell_has_ignored_stays_ignored(name):
    code = f"{HEAD}\nwith Stop() as stop: signal.raise_signal(signal.SIG{name})\nprint(stop.asked)"
    done = subprocess.run(
        ["sh", "-c", f'trap "" {name}; exec "$@"', "sh", sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr, done.returncode) == ("False\n", "", 0)


@pytest.mark.parametrize("shell", [(), ("bash", "-ic", '"$@"; exit', "bash")])
def test_a_run_whose_terminal_goes_away_is_still_saved(shell, start):
    """As when ssh is dropped: what it prints from then on goes nowhere, and fails."""
    if shell and not shutil.which(shell[0]):
        pytest.skip("there is no bash")
    (ours, its), (end, done) = pty.openpty(), os.pipe()
    with open(ours, "rb") as terminal:
        start(
            SAVES, "print('ready', flush=True)", "stop.noted.wait()",
            "for _ in range(9): print('to no one', flush=True)",
            "print('to no one', file=sys.stderr)",
            f"os.write({done}, b'saved')",
            before=(sys.executable, "-c", IN_TERMINAL, *shell), pass_fds=[done],
            start_new_session=True, stdin=its, stdout=None, stderr=None,
        )  # fmt: skip
        os.close(its)
        os.close(done)
        while terminal.readline().strip() != b"ready":
            pass
    with open(end) as saved:
        assert saved.read() == "saved"


IN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.dup2(0, 1)
os.dup2(0, 2)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def test_a_run_whose_tee_has_died_of_the_same_ctrl_c_is_still_saved(start):
    process = start(
        SAVES, "print('ready', flush=True)", "sys.stdin.readline()",
        "for _ in range(9): print('to no one', flush=True)",
        "print('saved', file=sys.stderr)",
    )  # fmt: skip
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.flush()  # it may fail to print before it hears of its stop
    process.send_signal(signal.SIGINT)
    assert process.wait(LIMIT) == 0
    assert process.stderr.read().endswith("(again: stop now)\nsaved\n")


@pytest.mark.parametrize("cause", ["reader", "disk"])
def test_a_run_outlives_its_log_and_says_so_once(cause, monkeypatch, capfd):
    """`python train.py | head`, a killed `tee`, a full disk under the log."""
    monkeypatch.setattr(signals, "GRACE", 0)
    if cause == "disk":
        if not os.path.exists("/dev/full"):
            pytest.skip("there is no /dev/full")
        writer, reason = os.open("/dev/full", os.O_WRONLY), "No space left on device"
    else:
        reader, writer = os.pipe()
        os.close(reader)
        reason = "Broken pipe"
    with open(writer, "w") as stream, redirect_stdout(stream), Stop():
        for _ in range(3):
            print("x", flush=True)
    said = f"{writer} cannot be written any more ({reason}): the run goes on, and its metrics.jsonl"
    assert capfd.readouterr().err == f"{said}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_same_signal_in_the_same_moment_is_no_second_one(number, exits, monkeypatch):
    """timeout(1) sends SIGTERM to its child and then to the group, of which that is one."""
    monkeypatch.setattr(signals, "ECHO", 1e9)
    with Stop() as stop:
        stop.wait_for_save()
        signal.raise_signal(number)
        signal.raise_signal(number)
    assert stop.asked
    assert not exits
    monkeypatch.setattr(signals, "ECHO", 0)
    with Stop() as stop:
        stop.wait_for_save()
        signal.raise_signal(number)
        signal.raise_signal(number)
    assert exits == [130]


def test_a_hangup_is_no_second_signal(exits, monkeypatch):
    """A terminal goes away once, but says so by its shell and by the kernel."""
    monkeypatch.setattr(signals, "ECHO", 0)
    with Stop() as stop:
        stop.wait_for_save()
        for _ in range(3):
            signal.raise_signal(signal.SIGHUP)
    assert stop.asked
    assert not exits
    with Stop() as stop:
        stop.wait_for_save()
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
    assert exits == [130]


def test_of_several_processes_each_passes_on_to_jax_what_it_hears(exits, monkeypatch):
    """It waits for the others, even with nothing to save; SIGTERM itself is JAX's to hear."""
    monkeypatch.setattr(global_state, "num_processes", 2)
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("by JAX"))
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert heard == ["by JAX"]
        assert not stop.asked
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            with Stop() as stop:
                signal.raise_signal(number)
            assert stop.asked
            assert not stop.now()  # the others would wait for it
        assert len(heard) == 4
        assert not exits
        monkeypatch.setattr(signals, "ECHO", 0)
        with Stop():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        assert exits == [130]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_signals_are_not_heard(exits):
    seen = []
    before = signal.signal(signal.SIGCHLD, lambda *_: seen.append("a child"))
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGCHLD)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert seen
    assert not stop.asked
    assert not exits


def test_all_is_as_before_afterwards(exits):
    def now():
        fd = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(fd)
        handlers = [signal.getsignal(number) for number in NUMBERS]
        threads = [thread.name for thread in threading.enumerate()]
        return fd, handlers, threads, sys.stdout, sys.stderr, sorted(os.listdir("/dev/fd"))

    ear, mouth = socket.socketpair()
    with ear, mouth:
        mouth.setblocking(False)
        signal.set_wakeup_fd(mouth.fileno())
        try:
            before = now()
            with Stop():
                assert all(a != b for a, b in zip(now(), before, strict=True))
            assert now() == before
            with pytest.raises(ZeroDivisionError), Stop():
                raise ZeroDivisionError
            assert now() == before
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        finally:
            signal.set_wakeup_fd(-1)
    assert not exits


def test_each_run_starts_unasked(exits):
    with Stop() as stop:
        stop.wait_for_save()
        signal.raise_signal(signal.SIGTERM)
    assert stop.asked
    assert stop.now()
    with Stop() as stop:
        assert not stop.asked
        assert not stop.now()
    assert not exits


def test_outside_the_main_thread_nothing_is_heard_and_all_works():
    said = []

    def work():
        with Stop() as stop:
            stop.wait_for_save()
            said.append((stop.asked, stop.at(1)))

    handlers = [signal.getsignal(number) for number in NUMBERS]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert said == [(False, False)]
    assert handlers == [signal.getsignal(number) for number in NUMBERS]
