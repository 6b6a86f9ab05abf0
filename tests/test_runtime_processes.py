"""Several processes on this machine, joined by JAX's runtime as hosts are by a network."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gpt_jax.config import TrainConfig
from gpt_jax.data import Split, batch_starts
from gpt_jax.errors import UserError
from gpt_jax.integrity.token_file import open_file
from gpt_jax.prepare import prepare
from gpt_jax.runtime import processes

ROOT = Path(__file__).parents[1]
TEXT = "".join(f"line {i}: to be, or not to be, that is the question.\n" for i in range(400))
TINY = [
    "train_shakespeare_char", "--dataset=text", "--n_layer=1", "--n_head=2", "--n_embd=16",
    "--block_size=8", "--batch_size=4", "--gradient_accumulation_steps=2", "--dropout=0",
    "--eval_interval=1000", "--eval_iters=2", "--log_interval=1", "--warmup_iters=2",
    "--always_save_checkpoint=True", "--out_dir=out",
]  # fmt: skip
HASTE = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # less to compile, the same sums
LIMIT = 60  # seconds in which a run that has lost a process must have ended


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """A working directory with a small data set of characters."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT, "utf-8")
    prepare("text", Path("data/text"), input=Path("text.txt"), tokenizer="char", log=lambda _: None)


@pytest.fixture
def start():
    """Start a program as processes of one run; none of them outlives the test."""
    started = []

    def start(n, *argv, own=()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        flags = (
            os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "").strip()
        )
        environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), **HASTE}
        group = [
            subprocess.Popen(
                [sys.executable, *argv, f"--coordinator_address={address}", f"--num_processes={n}",
                 f"--process_id={i}", *(own[i] if own else ())],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for i in range(n)
        ]  # fmt: skip
        started.extend(group)
        return group

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ends(group):
    """The exit code, stdout and last line of stderr of each process."""
    said = [process.communicate(timeout=240) for process in group]
    return [
        (process.returncode, out, err.strip().splitlines()[-1] if err.strip() else "")
        for process, (out, err) in zip(group, said, strict=True)
    ]


def losses(out_dir):
    lines = map(json.loads, Path(out_dir, "metrics.jsonl").read_text().splitlines())
    return {
        (e["iter"], k): e[k] for e in lines for k in ("loss", "train_loss", "val_loss") if k in e
    }


def alone(*argv):
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT), **HASTE}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def connecting(*lines):
    """A command that does the lines as one of the processes of a run."""
    head = """
import sys
from gpt_jax.config import parse
from gpt_jax.errors import UserError, exit_code
from gpt_jax.runtime import agree, barrier, connected

@exit_code
def main(argv):
    config = parse(argv)
    with connected(config, "again"):
"""
    body = "".join(f"        {line}\n" for line in lines)
    program = Path("program.py")
    program.write_text(f"{head}{body}\nsys.exit(main())\n")
    return program


def wait_for(group, path):
    since = time.monotonic()
    while not path.exists():
        assert time.monotonic() - since < 240  # as ends(): a run that hangs must not hang the tests
        codes = [process.poll() for process in group]
        assert codes == [None] * len(group), ends(group)
        time.sleep(0.05)


def test_four_processes_make_the_losses_of_one_and_survive_the_loss_of_one(start):
    """C10, C12: killed, ended, resumed; the numbers are those of a run that was left alone."""
    group = start(4, ROOT / "train.py", *TINY, "--fsdp=2", "--save_interval=3", "--max_iters=99999")
    wait_for(group, Path("out/checkpoints/6"))
    group[2].send_signal(signal.SIGKILL)
    since = time.monotonic()
    codes = [(code, last) for code, _, last in ends(group)]
    assert time.monotonic() - since < LIMIT
    assert codes[2][0] == -signal.SIGKILL
    for code, last in (codes[0], codes[1], codes[3]):
        assert code == 1
        assert re.fullmatch(
            rf"error: process 2 on {re.escape(socket.gethostname())} has not been heard of for "
            r"\d+ s: start the run again with --init_from=resume",
            last,
        )
    kept = max(int(p.name) for p in Path("out/checkpoints").iterdir() if p.name.isdecimal())
    end = kept + 4
    group = start(
        4, ROOT / "train.py", *TINY, "--fsdp=2", "--init_from=resume", f"--max_iters={end}"
    )
    done = ends(group)
    assert [code for code, _, _ in done] == [0] * 4, done
    assert f"resuming from out, iteration {kept}" in done[0][1]
    assert "4 x cpu (data 2, fsdp 2)" in done[0][1]
    for _, out, _ in done[1:]:
        assert "iter" not in out  # one host logs

    alone(*TINY, "--out_dir=alone", f"--max_iters={end}")
    together, one = losses("out"), losses("alone")
    assert {key for key in together if key[1] == "loss"} == {(i, "loss") for i in range(end)}
    assert max(abs(together[key] - one[key]) for key in one) <= 5e-6
    assert one[0, "loss"] - one[end, "val_loss"] > 0.01  # it did learn


def test_when_process_0_dies_the_others_say_so_and_end(start):
    group = start(2, ROOT / "train.py", *TINY, "--save_interval=3", "--max_iters=99999")
    wait_for(group, Path("out/checkpoints/3"))
    group[0].send_signal(signal.SIGKILL)
    since = time.monotonic()
    (_, _, _), (code, _, last) = ends(group)
    assert time.monotonic() - since < LIMIT
    assert code != 0
    assert "process 0" in last
    assert last.endswith("start the run again with --init_from=resume")


def test_a_stop_that_one_process_hears_stops_and_saves_them_all(start):
    """C15: SIGTERM, as SLURM and Kubernetes send it, to one host of several."""
    group = start(2, ROOT / "train.py", *TINY, "--save_interval=3", "--max_iters=99999")
    wait_for(group, Path("out/checkpoints/3"))
    group[1].send_signal(signal.SIGTERM)
    done = ends(group)
    assert [code for code, _, _ in done] == [0, 0], done
    stopped = re.search(r"^stopped at iteration (\d+) and saved", done[0][1], re.M)
    assert stopped
    assert Path("out/checkpoints", stopped[1]).is_dir()


def test_hosts_that_were_started_differently_all_say_what_differs(start):
    own = [[], ["--learning_rate=0.1"]]
    done = ends(start(2, ROOT / "train.py", *TINY, "--max_iters=1", own=own))
    line = (
        "error: process 1 has learning_rate=0.1, but process 0 has learning_rate=0.001: "
        "start all with the same command, on the same files"
    )
    assert [(code, last) for code, _, last in done] == [(2, line)] * 2


def test_hosts_that_see_other_files_all_say_what_differs(start):
    """As where out_dir or data_dir is not on a disk that all share."""
    program = connecting(
        'agree({"the checkpoint to resume from": 20 - 10 * config.process_id, "tokens": 5})'
    )
    line = (
        "error: process 1 has the checkpoint to resume from=10, but process 0 has the checkpoint "
        "to resume from=20: start all with the same command, on the same files"
    )
    done = ends(start(2, program, *TINY))
    assert [(code, last) for code, _, last in done] == [(2, line)] * 2


def test_wrong_input_of_one_host_ends_it_at_once_and_then_the_others(start):
    program = connecting(
        "if config.process_id: raise UserError('the file here is cut off')", "barrier()"
    )
    since = time.monotonic()
    (code, _, last), (wrong, _, why) = ends(start(2, program, *TINY))
    assert time.monotonic() - since < LIMIT
    assert (wrong, why) == (2, "error: the file here is cut off")
    assert code == 1
    assert re.search(r"process 1 on .* has not been heard of for \d+ s: again", last)


def test_an_out_dir_that_is_not_shared_is_refused_before_anything_is_trained(start):
    """Each host would save its part of every checkpoint to its own disk."""
    Path("other").mkdir()
    program = Path("program.py")
    program.write_text("""
import os, sys
if "--process_id=1" in sys.argv:
    os.chdir("other")
import train
sys.exit(train.main())
""")
    line = (
        "error: process 1 does not see what process 0 writes to out_dir=out: "
        "put it on a disk that all hosts share"
    )
    done = ends(start(2, program, *TINY, f"--data_dir={Path('data').absolute()}"))
    assert [(code, last) for code, _, last in done] == [(2, line)] * 2
    assert not Path("out").exists()


def test_a_thousand_batches_are_the_same_however_many_processes_read_them(start):
    """C10: each reads the rows of its own devices; together they are those of one.

    Of a mixture of two files, of which one is read twice as often as the other.
    """
    program = Path("program.py")
    program.write_text("""
import sys
import jax, numpy as np
from dataclasses import replace
from pathlib import Path
from gpt_jax.config import TrainConfig, parse
from gpt_jax.data import Split, batches
from gpt_jax.integrity.token_file import open_file
from gpt_jax.runtime import connected
from gpt_jax.sharding import batch_sharding, make_mesh

with connected(parse(sys.argv[1:]), ""):
    files = [open_file(Path("data/text", name), "uint16") for name in ("train.bin", "val.bin")]
    split = Split((files[0], replace(files[1], part=1)), 96, 8, (0, 0, 1))
    stream = batches(split, (2, 8), 1337, 0, batch_sharding(make_mesh(), 3))
    rows = []
    for _ in range(1000):
        tokens, _ = next(stream)
        rows += [shard.data for shard in tokens.addressable_shards]
    np.save(f"rows{jax.process_index()}", np.stack(rows))
""")
    for n in (2, 4):
        assert [code for code, _, _ in ends(start(n, program, *TINY))] == [0] * n
        read = np.concatenate([np.load(f"rows{i}.npy") for i in range(n)], axis=2)
        files = [open_file(Path("data/text", name), "uint16") for name in ("train.bin", "val.bin")]
        split = Split((files[0], replace(files[1], part=1)), 96, 8, (0, 0, 1))
        for step in range(1000):
            np.testing.assert_array_equal(
                read[step], split.windows(batch_starts(split, (2, 8), 1337, step))
            )


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_the_others_do_not_meet_says_so_in_bounded_time(start, process):
    group = start(2, ROOT / "train.py", *TINY, "--initialization_timeout=3")
    group[1 - process].kill()
    since = time.monotonic()
    code, _, last = ends(group)[process]
    assert time.monotonic() - since < LIMIT
    assert code == 2
    assert re.match(
        r"error: 2 processes have not met at 127.0.0.1:\d+ within initialization_timeout=3 s: "
        "start every one of them",
        last,
    )


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"num_processes": 2, "process_id": 2}, "process_id=2 is out of range: num_processes=2"),
        ({"coordinator_address": "host"}, "coordinator_address='host' is not HOST:PORT"),
        ({"coordinator_address": ":80"}, "coordinator_address=':80' is not HOST:PORT"),
        ({"coordinator_address": "host:http"}, "'host:http' is not HOST:PORT, 10.0.0.1:1234 say"),
        ({"num_processes": 1, "process_id": 1}, "process_id=1 is out of range: num_processes=1"),
        ({"coordinator_address": "host:99999"}, "'host:99999' is not HOST:PORT"),
        ({"num_processes": 2}, "also give --coordinator_address, --process_id"),
        ({"process_id": 0, "num_processes": 2}, "also give --coordinator_address"),
    ],
)
def test_processes_that_are_named_in_part_or_wrongly_are_refused(asked, said, monkeypatch):
    def initialize(**named):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(processes.jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match=re.escape(said)):
        processes.join(TrainConfig(**asked))


def test_a_process_alone_is_the_run(monkeypatch):
    def initialize(**named):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(processes.jax.distributed, "initialize", initialize)
    done = []
    with processes.connected(TrainConfig(), "advice"):
        processes.agree({"a": 1})
        processes.barrier()
        processes.in_turn(lambda: done.append(1))
        assert processes.is_first()
    assert done == [1]


def test_a_cluster_that_cannot_say_who_is_in_it_is_refused_with_its_reason(monkeypatch):
    def initialize(**named):
        raise RuntimeError("In K8s, cluster automatic bootstrap only supports Job/JobSet.\nmore")

    monkeypatch.setattr(processes.jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match=r"only supports Job/JobSet.*--num_processes=1"):
        processes.join(TrainConfig())
    processes.join(TrainConfig(num_processes=1))
