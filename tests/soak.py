"""A soak: train while killing, damaging, filling the disk and resuming at random.

python tests/soak.py --seed=1 --rounds=50 [--only=kill,flip] [--keep-folder]

A run that is never disturbed is held against one that is, in each of many rounds, each a process of
its own with --init_from=auto. The seed draws what is done and when; at which moment of the run that
arrives is the machine's. A line a round says what was done, how the process ended and where it had
resumed. At the first broken promise the soak ends with its reason and keeps its folder.

A round ends in one of: kill (SIGKILL), term, int (one polite signal), twice (two of them), disk
(full; for root on Linux, who can mount a small one). Before it something may befall the newest
checkpoint: flip (a bit of a file), truncate, empty, delete. In its middle a second run may be
started in the same folder: second.
"""

import argparse
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TEXT = "".join(f"line {i}: to be, or not to be, that is the question.\n" for i in range(400))
FLAGS = [
    "train_shakespeare_char", "--dataset=text", "--n_layer=2", "--n_head=2", "--n_embd=16",
    "--block_size=16", "--batch_size=8", "--gradient_accumulation_steps=2", "--dropout=0.1",
    "--eval_iters=2", "--log_interval=1", "--warmup_iters=2", "--always_save_checkpoint=True",
    "--keep=3", "--device=cpu",
]  # fmt: skip
DAMAGES = ("flip", "truncate", "empty", "delete")
ENDS = ("kill", "term", "int", "twice", "disk")
ACTS = (*ENDS, *DAMAGES, "second")
PACE = 40  # iterations of a whole run for each round; a round is drawn to do fewer
DISK = 64 * 2**20  # bytes of the small disk: hundreds of these checkpoints
LIMIT = 300  # seconds that nothing here takes: what hangs is a broken promise
LOOK = 0.002  # seconds between two looks at a process
STAYS = {"checkpoints", "config.json", "loss.png", "metrics.jsonl"}  # all that a run leaves


class Broken(AssertionError):  # noqa: N818
    """A promise that was not kept."""


def promise(kept: Any, otherwise: str) -> None:
    if not kept:
        raise Broken(otherwise)


@dataclass
class Moment:
    """When to act: after seconds, or from an iteration on at what is seen next."""

    what: str  # start, output, iteration, save, commit
    after: float = 0.0  # seconds, from the start or the first line of output, or from what is seen
    iterations: int = 0  # that this process has done

    def __str__(self) -> str:
        delay = f"{self.after:.3f}s after "
        if self.what in ("start", "output"):
            return f"{delay}{self.what}"
        return f"{delay if self.after else ''}{self.what} from +{self.iterations}"


@dataclass
class Process:
    """A process of train.py in a group of its own, and what it has said so far."""

    command: list[str]
    environment: dict[str, str]
    folder: Path
    name: str
    out: str = ""
    code: int | None = None
    spoke_at: float = 0.0
    resumed: int | None = None  # where it has gone on from, None as long as it has not
    reached: int = -1  # the last iteration of which it has told
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self):
        paths = [self.folder / f"{self.name}.{kind}" for kind in ("out", "err")]
        with open(paths[0], "wb") as out, open(paths[1], "wb") as err:
            self.popen = subprocess.Popen(
                self.command, env=self.environment, cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip
        self.said, self.err_path = open(paths[0], encoding="utf-8"), paths[1]  # noqa: SIM115

    def look(self) -> bool:
        """Take in what it has said; return whether it has ended."""
        self.code = self.popen.poll()  # first: what it said before its end is then all there
        new = self.said.read()
        if new:
            self.spoke_at = self.spoke_at or time.monotonic()
            self.out += new
            if found := re.findall(r"^iter (\d+): loss", self.out[-len(new) - 80 :], re.M):
                self.reached = int(found[-1])
            if self.resumed is None and (
                found := re.search(r"^resuming from .*, iteration (\d+)$", self.out, re.M)
            ):
                self.resumed = int(found[1])
        if time.monotonic() - self.started > LIMIT:
            raise Broken(f"{self.name} has not ended in {LIMIT} seconds")
        return self.code is not None

    @property
    def done(self) -> int:
        """How many iterations it has told of."""
        return max(0, self.reached + 1 - (self.resumed or 0))

    @property
    def err(self) -> str:
        return self.err_path.read_text("utf-8")

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error:")]

    def wait(self) -> int:
        while not self.look():
            time.sleep(LOOK)
        assert self.code is not None
        return self.code

    def send(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, number)

    def close(self) -> None:
        if self.popen.poll() is None:
            self.send(signal.SIGKILL)
            self.popen.wait()
        self.said.close()


class Soak:
    """A folder with data, a run that nobody disturbs, and one that is disturbed round by round."""

    def __init__(
        self, folder: Path, seed: int, max_iters: int, save_interval: int = 20,
        environment: dict[str, str] | None = None, disk: Path | None = None,
    ):  # fmt: skip
        self.folder, self.random, self.disk = folder, random.Random(seed), disk
        self.max_iters, self.interval = max_iters, save_interval
        self.environment = environment or environment_of(folder)
        self.whole = folder / "whole"
        self.out = (disk or folder) / "disturbed"
        self.flags = [
            *FLAGS, f"--max_iters={max_iters}", f"--save_interval={save_interval}",
            f"--eval_interval={5 * save_interval}",
        ]  # fmt: skip
        self.number = 0
        self.reached = -1  # the last iteration of which the disturbed run has told
        self.pending: int | None = None  # a step that is damaged, and that no process has met yet
        self.patience = 5.0  # seconds from a start to its first iteration
        self.counts: dict[str, int] = {}
        self.repeated = {"undamaged": 0, "damaged": 0}  # the most iterations done again
        self.processes = ExitStack()

    # ---- The two runs ---------------------------------------------------------------------------

    def prepare(self) -> None:
        from gpt_jax.prepare import prepare

        text = self.folder / "text.txt"
        text.write_text(TEXT, "utf-8")
        prepare(
            "text", self.folder / "data" / "text", input=text, tokenizer="char",
            log=lambda _: None,
        )  # fmt: skip

    def start(self, name: str, out: Path) -> Process:
        command = [
            sys.executable, str(ROOT / "train.py"), *self.flags, f"--out_dir={out}",
            "--init_from=auto",
        ]  # fmt: skip
        process = Process(command, self.environment, self.folder, name)
        self.processes.callback(process.close)
        return process

    def undisturbed(self) -> None:
        process = self.start("whole", self.whole)
        self.finished(process)
        self.check_output(process)

    def finish(self) -> None:
        """Let the disturbed run go on to its end and hold it against the other."""
        before = self.steps()
        process = self.start("end", self.out)
        self.finished(process)
        self.check_process(process, before)
        compare(self.whole, self.out, self.max_iters)
        leftovers(self.out)

    def finished(self, process: Process) -> None:
        code = process.wait()
        promise(code == 0, f"{process.name}: exit code {code}: {process.err[-2000:]}")
        promise(has_finished(process), f"{process.name} has not said that it is done")

    # ---- A round --------------------------------------------------------------------------------

    def draw(self, acts: tuple[str, ...]) -> str:
        """Draw a round, do it and check it; return its line."""
        draw = self.random
        end = draw.choice([name for name in ENDS if name in acts] or ["kill"])
        damages = [name for name in DAMAGES if name in acts]
        damage = draw.choice(damages) if damages and draw.random() < 0.4 else None
        second = "second" in acts and draw.random() < 0.2
        return self.round(end, self.draw_moment(end), damage, second=second)

    def draw_moment(self, end: str) -> Moment:
        draw = self.random
        # before the first line of output a signal meets Python itself: only kills come as early
        early = "start" if end in ("kill", "disk") else "output"
        what = draw.choices([early, "iteration", "save", "commit"], [2, 3, 3, 2])[0]
        iterations = 1 + draw.randrange(int(1.5 * PACE))
        if what == early:
            return Moment(what, draw.uniform(0, self.patience))
        if what == "iteration":
            return Moment(what, 0, iterations)
        return Moment(what, draw.choice([0, draw.uniform(0, 0.05)]), iterations)

    def round(
        self, end: str, moment: Moment, damage: str | None = None, path: Path | None = None,
        second: bool = False,
    ) -> str:  # fmt: skip
        """Disturb the run once, check every promise and return what happened, as a line.

        ``path`` is the file to damage, any one of the newest checkpoint if it is not given.
        """
        self.number += 1
        said = [f"round {self.number}:"]
        if damage:
            said.append(self.damage(damage, path))
        before = self.steps()
        whole = [step for step in before if step != self.pending]
        full_from_start = end == "disk" and moment.what == "start"
        if full_from_start:
            self.fill()
        process = self.start(f"round-{self.number}", self.out)
        if second:
            self.await_moment(process, Moment("output", self.random.uniform(0, self.patience)))
            said.append(self.second(process))
        if not full_from_start:
            self.await_moment(process, moment)
        getattr(self, f"end_by_{end}")(process)
        said.append(f"{end}, {moment}, at iteration {process.reached},")
        resumed = "nowhere" if process.resumed is None else process.resumed
        said.append(f"exit {process.code}, resumed from {resumed},")
        self.count(end)
        self.check_process(process, before)
        said.append(f"steps {self.check_steps(whole)}")
        return " ".join(said)

    def await_moment(self, process: Process, moment: Moment) -> None:
        """Wait until it has come, or the process has ended, or there is nothing to wait for."""
        known = None
        while not process.look():
            now = time.monotonic()
            if moment.what == "start" and now - process.started >= moment.after:
                return
            if process.spoke_at and moment.what == "output":
                if now - process.spoke_at >= moment.after:
                    return
            elif process.done >= max(1, moment.iterations):
                if moment.what == "iteration":
                    break
                names = self.names()
                known = names if known is None else known
                # what is there already has its time before or after: the next one is waited for
                new = [
                    name for name in names - known if name.isdecimal() == (moment.what != "save")
                ]
                if new:
                    break
                known &= names
            if process.done > 3 * PACE or process.reached >= self.max_iters - 2 * self.interval:
                return
            time.sleep(LOOK)
        if moment.after and moment.what in ("save", "commit"):
            time.sleep(moment.after)

    def end_by_kill(self, process: Process) -> None:
        ending = self.near_its_end(process)
        process.send(signal.SIGKILL)
        code = process.wait()
        promise(code == -9 or (code == 0 and ending), f"exit code {code} of a SIGKILL")

    def end_by_term(self, process: Process) -> None:
        self.politely(process, signal.SIGTERM)

    def end_by_int(self, process: Process) -> None:
        self.politely(process, signal.SIGINT)

    def politely(self, process: Process, number: int) -> None:
        ending = self.near_its_end(process)
        process.send(number)
        code = process.wait()
        promise(code == 0, f"exit code {code} of a polite stop: {process.err[-2000:]}")
        found = re.search(r"^stopped at iteration (\d+) and saved; ", process.out, re.M)
        nothing = "stopped before the first"
        said = process.out + process.err
        ended = ending and has_finished(process)
        promise(found or nothing in said or ended, f"it did not say that it stops: {said[-2000:]}")
        if found:
            newest = max(self.steps(), default=None)
            promise(newest == int(found[1]), f"it has saved {found[1]}, and has {newest}")
            process.reached = int(found[1]) - 1  # of the last it tells only at its next start
            self.count("stopped and saved")

    def end_by_twice(self, process: Process) -> None:
        """Send two signals: the same one twice within a moment would be one, sent twice."""
        ending = self.near_its_end(process)
        first, second = self.random.sample([signal.SIGTERM, signal.SIGINT], 2)
        process.send(first)
        time.sleep(self.random.choice([0, self.random.uniform(0, 0.03)]))
        process.send(second)
        code = process.wait()
        said = process.out + process.err
        ended = "stopped before the first" in said or "stopped at" in said
        ended = ended or (ending and has_finished(process))
        promise(code == 130 or (code == 0 and ended), f"exit code {code} of a second signal")

    def near_its_end(self, process: Process) -> bool:
        """Return whether it may have ended before what is done to it now arrives."""
        process.look()
        return max(process.reached, *self.steps(), 0) >= self.max_iters - 3 * self.interval

    def end_by_disk(self, process: Process) -> None:
        while not process.look():
            self.fill()
            time.sleep(LOOK)
        self.ballast.unlink()
        code, errors = process.code, process.errors
        # that it cannot even begin is wrong input
        promise(code in (1, 2), f"exit code {code} of a full disk: {process.err[-2000:]}")
        promise(len(errors) == 1, f"a full disk, and these errors: {process.err[-2000:]}")
        promise(str(self.out) in errors[0], f"the error does not name the path: {errors[0]}")
        free = re.search(r"[\d,]+ bytes are free", errors[0])
        promise(code == 2 or free, f"the error does not name the free bytes: {errors[0]}")

    @property
    def ballast(self) -> Path:
        assert self.disk is not None, "only a disk of its own may be filled"
        return self.disk / "ballast"

    def fill(self) -> None:
        """Fill the disk up to its last page."""
        try:
            with open(self.ballast, "ab", buffering=0) as file:
                while file.write(bytes(2**20)):
                    pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise

    def second(self, process: Process) -> str:
        """Start a second run in the same folder: it must leave at once and touch nothing.

        The first is halted meanwhile, wherever it is: so it gets no further than the round is to,
        and every change there is the second one's.
        """
        if process.look():
            return "(no second: it had ended)"
        process.send(signal.SIGSTOP)
        before = files(self.out)
        other = self.start(f"second-{self.number}", self.out)
        code = other.wait()
        promise(code == 2, f"exit code {code} of a second run in the same folder")
        promise(
            len(other.errors) == 1 and "is in use by" in other.errors[0],
            f"a second run said: {other.err[-2000:]}",
        )
        self.check_output(other)
        after = files(self.out)
        changed = [str(path) for path in {**before, **after} if before.get(path) != after.get(path)]
        promise(not changed, f"a second run has changed {', '.join(changed)}")
        process.send(signal.SIGCONT)
        self.count("second")
        return "second refused;"

    def damage(self, kind: str, path: Path | None = None) -> str:
        """Damage a file of the newest checkpoint, if there is a whole one just before it."""
        have = self.steps()
        if self.pending is not None or len(have) < 2 or have[-1] - have[-2] > self.interval:
            return f"(no {kind}: {have}, damaged {self.pending})"
        step = self.out / "checkpoints" / str(have[-1])
        found = sorted(p for p in step.rglob("*") if p.is_file() and (p.stat().st_size or path))
        path = path or self.random.choice(found)
        data = path.read_bytes()
        if kind == "delete":
            path.unlink()
        elif kind == "flip":
            at, bit = self.random.randrange(len(data)), self.random.randrange(8)
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
        else:
            path.write_bytes(data[: self.random.randrange(1, len(data)) if kind != "empty" else 0])
        self.pending = have[-1]
        self.count(kind)
        return f"{kind} {path.relative_to(self.out / 'checkpoints')};"

    # ---- What is checked after each -------------------------------------------------------------

    def check_output(self, process: Process) -> None:
        for text in (process.out, process.err):
            promise("Traceback" not in text, f"{process.name}: a traceback: {text[-4000:]}")

    def check_process(self, process: Process, before: list[int]) -> None:
        """Check what a process said and where it went on; count what it had to do again."""
        self.check_output(process)
        resumed, name = process.resumed or 0, process.name
        if process.resumed is None and (before or process.reached < 0):
            promise(process.reached < 0, f"{name} has begun anew beside {before}")
            return
        whole = [step for step in before if step != self.pending]
        allowed = {max(whole, default=0)} | ({self.pending} & {*before})
        promise(resumed in allowed, f"{name} resumed from {resumed}, not {allowed}: {process.err}")
        # before the iteration that was told the save of a multiple had begun, and before that the
        # one of the multiple before was whole
        begun = self.reached // self.interval * self.interval
        damaged = self.pending is not None and resumed < self.pending
        lowest = begun - self.interval * (2 if damaged else 1)
        promise(resumed >= lowest, f"{name} resumed from {resumed}, below {lowest}")
        kind = "damaged" if damaged else "undamaged"
        self.repeated[kind] = max(self.repeated[kind], self.reached + 1 - resumed)
        if damaged:
            promise("passed over: " in process.err, f"{name} did not name the damaged checkpoint")
            self.count("passed over")
        elif self.pending is not None:
            self.count("harmless damage")
        self.pending = None
        self.reached = max(resumed - 1, process.reached)

    def check_steps(self, whole: list[int]) -> list[int]:
        """Check that of what was ``whole`` the newest, or newer, is there and reads; return all."""
        from gpt_jax.checkpoint import read_meta

        have = self.steps()
        was, newest = (max({*steps} - {self.pending}, default=0) for steps in (whole, have))
        promise(newest >= was, f"the newest whole checkpoint was {was}, now it is {newest}")
        for step in have:
            if step != self.pending:
                try:
                    read_meta(str(self.out), step)
                except ValueError as error:
                    raise Broken(f"step {step}: {error}") from error
        return have

    def steps(self) -> list[int]:
        return sorted(int(name) for name in self.names() if name.isdecimal())

    def names(self) -> set[str]:
        with suppress(FileNotFoundError):
            return set(os.listdir(self.out / "checkpoints"))
        return set()

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


def has_finished(process: Process) -> bool:
    return bool(re.search(r"^val loss .* nats/token", process.out, re.M))


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return size and time of change of each file below a folder."""
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def compare(whole: Path, other: Path, step: int) -> None:
    """Check that two runs have ended in the same state, bit for bit, and have told the same."""
    for item in ("params", "optimizer"):
        ours, theirs = leaves(whole, step, item), leaves(other, step, item)
        promise(ours.keys() == theirs.keys(), f"{item} has other arrays: {[*theirs]}")
        different = [name for name in ours if ours[name] != theirs[name]]
        promise(not different, f"{item} is not the same at step {step}: {different}")
    ours, theirs = metas(whole, step), metas(other, step)
    promise(ours == theirs, f"the JSON of step {step} says {theirs}, not {ours}")
    ours, theirs = told(whole), told(other)
    promise(
        [entry["iter"] for entry in ours if "loss" in entry] == [*range(step)],
        f"{whole}/metrics.jsonl has not each iteration once",
    )
    for a, b in zip(ours, theirs, strict=False):
        promise(a == b, f"metrics.jsonl says {b}, not {a}")
    promise(len(ours) == len(theirs), f"metrics.jsonl has {len(theirs)} lines, not {len(ours)}")


def leaves(out_dir: Path, step: int, item: str) -> dict[str, tuple[Any, ...]]:
    """Return of each array of a checkpoint what is compared: shape, dtype, bytes."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    tree = ocp.StandardCheckpointer().restore(out_dir.absolute() / "checkpoints" / f"{step}" / item)
    arrays = {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    return {name: (x.shape, str(x.dtype), x.tobytes()) for name, x in arrays.items()}


def metas(out_dir: Path, step: int) -> dict[str, Any]:
    meta = json.loads((out_dir / "checkpoints" / f"{step}" / "meta" / "metadata").read_text())
    return {name: meta[name] for name in ("iter", "val_loss", "best_val_loss", "digests")}


def told(out_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without speed, memory and where the run went on."""
    lines = (out_dir / "metrics.jsonl").read_text("utf-8").splitlines()
    return [
        {
            name: x
            for name, x in json.loads(line).items()
            if name not in ("tokens_per_second", "mfu", "time", "host_memory_peak", "resumed")
        }
        for line in lines
    ]


def leftovers(out_dir: Path) -> None:
    """Check that no file or folder is left of what was interrupted."""
    left = [
        path
        for path in out_dir.iterdir()
        if path.name not in STAYS and not re.match(r"(previous|damaged)-", path.name)
    ]
    left += [p for p in (out_dir / "checkpoints").iterdir() if not p.name.isdecimal()]
    left += [p for p in (out_dir / "checkpoints").rglob("*") if re.search("tmp|[.]new$", p.name)]
    promise(not left, f"left over: {', '.join(map(str, left))}")


def environment_of(folder: Path) -> dict[str, str]:
    """Return the environment of every process: one device, and programs compiled only once."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    one = [flag for flag in flags if "xla_force_host_platform_device_count" not in flag]
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
    return {
        **os.environ, "XLA_FLAGS": " ".join(one), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1",
        "JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip


@contextmanager
def small_disk(path: Path, wanted: bool):
    """Mount a small disk for a while; None, and a line, where that cannot be."""
    mounted = False
    if wanted and sys.platform == "linux" and os.geteuid() == 0:
        path.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "soak", str(path)]
        with suppress(FileNotFoundError):
            mounted = subprocess.run(mount, capture_output=True).returncode == 0
    if wanted and not mounted:
        print("no disk is filled: that takes root on Linux, and the right to mount")
    try:
        yield path if mounted else None
    except BaseException:
        if mounted:
            shutil.copytree(path, path.with_name("disk-as-it-was"))
        raise
    finally:
        if mounted:
            subprocess.run(["umount", str(path)], check=True)


def soak(folder: Path, seed: int, rounds: int, acts: tuple[str, ...]) -> None:
    """Do it all, with a line a round; raise Broken at the first promise that is not kept."""
    began = time.monotonic()
    with small_disk(folder / "disk", "disk" in acts) as disk:
        acts = tuple(name for name in acts if disk or name != "disk")
        max_iters = max(2, rounds) * PACE
        self = Soak(folder, seed, max_iters, disk=disk)
        with self.processes:
            self.prepare()
            self.undisturbed()
            # how long a start takes now that everything is compiled: the moments are drawn from it
            again = self.start("again", self.folder / "again")
            self.await_moment(again, Moment("iteration", 0, 1))
            self.patience = time.monotonic() - again.started
            self.end_by_kill(again)
            print(
                f"an undisturbed run of {max_iters} iterations, started in {self.patience:.1f}s",
                flush=True,
            )
            for _ in range(rounds):
                print(self.draw(acts), flush=True)
            self.finish()
            names = os.listdir(self.out)
        aside = {
            kind: sum(name.startswith(f"{kind}-") for name in names)
            for kind in ("damaged", "previous")
        }
    done = ", ".join(f"{name} {n}" for name, n in sorted(self.counts.items()))
    print(
        f"seed {seed}: {rounds}/{rounds} rounds kept every promise in "
        f"{time.monotonic() - began:.0f}s ({done}); final state bitwise equal at {self.max_iters}, "
        f"each iteration told once, no leftovers; repeated at most {self.repeated['undamaged']} "
        f"iterations ({self.repeated['damaged']} after damage), a checkpoint each {self.interval}; "
        f"{aside['damaged']} damaged-*, {aside['previous']} previous-*"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--only", default=",".join(ACTS), help="of " + ",".join(ACTS))
    parser.add_argument("--keep-folder", action="store_true")
    given = parser.parse_args()
    acts = tuple(given.only.split(","))
    if unknown := [name for name in acts if name not in ACTS]:
        parser.error(f"--only={given.only}: {unknown[0]!r} is not one of {', '.join(ACTS)}")
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"seed {given.seed}, {given.rounds} rounds of {', '.join(acts)}, in {folder}", flush=True)
    # a shell lets its jobs in the background ignore SIGINT, and so would the runs
    signal.signal(signal.SIGINT, signal.default_int_handler)
    keep = True
    try:
        soak(folder, given.seed, given.rounds, acts)
        keep = given.keep_folder
    except Broken as error:
        print(f"seed {given.seed}: BROKEN: {error}\nall of it is in {folder}", file=sys.stderr)
        return 1
    finally:
        if not keep:
            shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
