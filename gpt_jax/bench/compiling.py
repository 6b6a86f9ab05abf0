"""``bench compile``: what a run waits for before its first step, cold and from the cache."""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from gpt_jax.bench.children import end, kill, output, own
from gpt_jax.bench.config import CompileBench
from gpt_jax.bench.measure import AXES, NETWORK
from gpt_jax.bench.report import say
from gpt_jax.config import TrainConfig
from gpt_jax.errors import RunError
from gpt_jax.scripts import script

IMPORT = "import time; t = time.perf_counter(); import gpt_jax; print(time.perf_counter() - t)"
SCRIPT = script("train")
MINE = ("--json", "--repeats", "--timeout")


def start_up(config: CompileBench, argv: list[str]) -> list[dict[str, Any]]:
    """Return the record of imports, of the train step's compilation and of train.py's start."""
    argv = [item for item in argv if not item.startswith(MINE)]
    python = [sys.executable, "-c", IMPORT]
    imports = [
        float(output(python, "import gpt_jax", config.timeout)[0]) for _ in range(config.repeats)
    ]
    found: dict[str, Any] = {"import_seconds": statistics.median(imports)}
    ours: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "records.jsonl"
        command = own("train", [*argv, "--steps=1", "--repeats=1", f"--json={file}"])
        for kind in ("cold", "warm"):
            say(f"compiling the train step, {kind} ...")
            output(command, "gpt_jax", config.timeout, **cache(folder / "step"))
            ours = json.loads(file.read_text("utf-8").splitlines()[-1])
            found[f"compile_{kind}_seconds"] = ours["compile_seconds"]
        made_up(config, folder / "data" / "made_up")
        for kind in ("cold", "warm"):
            say(f"train.py to its first iteration, {kind} ...")
            found[f"first_iteration_{kind}_seconds"] = first_iteration(config, folder, kind)
    names = ("model", "batch_size", *NETWORK, *AXES, "platform", "device", "n_devices", "jax",
             "date")  # fmt: skip
    about = {name: ours[name] for name in names}
    return [{"what": "compile", "program": "gpt_jax", **about, **found}]


def cache(folder: Path) -> dict[str, str]:
    """Return the environment in which JAX keeps what it compiles in a folder, small things too."""
    return {
        "JAX_ENABLE_COMPILATION_CACHE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def made_up(config: CompileBench, folder: Path) -> None:
    """Write a data set of random ids, whose vocabulary is the network's."""
    import numpy as np

    from gpt_jax.prepare.dataset import GPT2_VOCAB_SIZE

    folder.mkdir(parents=True)
    V = config.vocab_size
    dtype = "uint16" if V <= 2**16 else "uint32"
    if V != GPT2_VOCAB_SIZE:  # which is that of a folder that says nothing
        symbols = "".join(map(chr, range(0x10000, 0x10000 + V)))
        tokenizer = {"kind": "char", "symbols": symbols}
        meta = {"tokenizer": tokenizer, "vocab_size": V, "dtype": dtype}
        (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    n = max(2**18, 4 * config.block_size)
    for name in ("train", "val"):
        ids = np.random.default_rng(0).integers(V if V != GPT2_VOCAB_SIZE else 50257, size=n)
        ids.astype(np.dtype(dtype).newbyteorder("<")).tofile(folder / f"{name}.bin")


def first_iteration(config: CompileBench, folder: Path, kind: str) -> float:
    """Return the seconds from the start of train.py to the line of its first iteration."""
    asked = {f.name: (getattr(config, f.name), f.default) for f in fields(TrainConfig)}
    flags = [f"--{name}={value}" for name, (value, default) in asked.items() if value != default]
    (folder / "run.py").touch()  # a config of nothing but defaults
    command = [
        sys.executable, str(SCRIPT), str(folder / "run.py"), *flags, "--dataset=made_up",
        f"--data_dir={folder / 'data'}", f"--out_dir={folder / kind}", "--init_from=scratch",
        "--max_iters=1", "--eval_iters=1", "--eval_only=False", "--log_interval=1",
        "--wandb_log=False",
    ]  # fmt: skip
    environment = {**os.environ, **cache(folder / "run"), "PYTHONUNBUFFERED": "1"}
    began = time.perf_counter()
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment, start_new_session=True,
    )  # fmt: skip
    late = threading.Timer(config.timeout, kill, [child])
    late.start()
    try:
        assert child.stdout
        for line in child.stdout:
            if line.startswith("iter 0:"):
                return time.perf_counter() - began
        _, err = child.communicate()
        if child.returncode == -signal.SIGKILL:
            raise RunError(f"train.py took more than --timeout={config.timeout} seconds")
        last = (err.strip().splitlines() or ["it ended before its first iteration"])[-1]
        raise RunError(f"train.py: {last.removeprefix('error: ')[:300]}")
    finally:
        late.cancel()
        end(child)  # the checkpoint that it would save is of no use
