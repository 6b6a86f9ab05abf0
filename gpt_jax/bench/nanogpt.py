"""``--nanogpt=PATH``: ours and nanoGPT's in turns, each alone on the device in its own process."""

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpt_jax.bench import nanogpt_program
from gpt_jax.bench.children import output, own
from gpt_jax.bench.config import BesideBench, DecodeBench, TrainBench
from gpt_jax.bench.measure import AXES, WARMUP, spread
from gpt_jax.bench.report import say
from gpt_jax.errors import RunError, UserError
from gpt_jax.plan.topology import GIB

# what is for this process, not for ours below it
MINE = ("--nanogpt", "--rounds", "--json", "--timeout")


def in_turns(verb: str, config: BesideBench, argv: list[str]) -> list[dict[str, Any]]:
    """Return our record, nanoGPT's, and that of the ratio; medians over the rounds."""
    checkout = Path(config.nanogpt)
    if not (checkout / "model.py").is_file():
        raise UserError(
            f"nanogpt={config.nanogpt!r:.100} is not a nanoGPT checkout (it has no model.py): "
            "give the folder that git clone made"
        )
    task = {"path": str(checkout.resolve()), "device": config.device}
    theirs_of(config, {**task, "what": "check"})  # before minutes are spent on ours
    argv = [item for item in argv if not item.startswith(MINE)]
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        for n in range(1, config.rounds + 1):
            say(f"round {n} of {config.rounds}: gpt_jax ...")
            ours.append(ours_of(verb, config, argv, Path(folder)))
            if ours[-1]["n_devices"] > 1:
                raise UserError(
                    f"nanoGPT is measured on one device, ours ran on {ours[-1]['n_devices']}: "
                    "name one by --device=cuda:0"
                )
            say(f"round {n} of {config.rounds}: nanoGPT ...")
            theirs.append(theirs_of(config, task_of(config, task, ours[-1])))
    torch = theirs[0]["torch"]
    theirs = [record_of(config, ours[0], result) for result in theirs]
    return [merged(ours), merged(theirs), compared(config, ours, theirs, torch)]


def ours_of(verb: str, config: BesideBench, argv: list[str], folder: Path) -> dict[str, Any]:
    """Return the record of our bench, run in a process of its own."""
    file = folder / "ours.jsonl"
    # later rounds take the program that the first compiled: what is measured is the same
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(folder / "xla")
    output(own(verb, [*argv, f"--json={file}"]), "gpt_jax", config.timeout,
           JAX_COMPILATION_CACHE_DIR=cache)  # fmt: skip
    record = json.loads(file.read_text("utf-8").splitlines()[0])
    file.unlink()
    return record


def theirs_of(config: BesideBench, task: dict[str, Any]) -> dict[str, Any]:
    """Return what nanoGPT's side says of its task."""
    python = config.nanogpt_python or sys.executable
    command = [python, str(Path(nanogpt_program.__file__))]
    out, _ = output(command, "nanoGPT", config.timeout, json.dumps(task))
    try:
        result = json.loads(out.splitlines()[-1])
    except (ValueError, IndexError):
        raise RunError(f"nanoGPT's process ({python}) told no result") from None
    error = result.get("error", "")
    if "No module named 'torch'" in error:
        raise UserError(
            f"{python} has no torch, which nanoGPT needs: pip install torch, or name an "
            "interpreter that has it by --nanogpt_python=PATH"
        )
    if error.startswith(("ImportError", "ModuleNotFoundError", "SyntaxError")):
        raise UserError(f"nanogpt={config.nanogpt!r:.100} cannot be imported ({error})")
    if "OutOfMemoryError" in error:
        raise RunError(
            "nanoGPT's batch does not fit the device's memory: set --nanogpt_batch_size smaller"
        )
    if error:
        raise RunError(f"nanoGPT's process failed: {error}")
    return result


def task_of(config: BesideBench, task: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Return the same work for nanoGPT: on the device and in the dtype that ours had."""
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout")
    device = config.device
    if device in ("auto", "gpu"):
        device = "cpu" if ours["platform"] == "cpu" else "cuda"
    shared = task | {
        "model": {name: getattr(config, name) for name in names} | {"bias": config.bias},
        "dtype": ours["dtype"],
        "device": device,
        "repeats": config.repeats,
    }
    rows = config.nanogpt_batch_size or config.batch_size
    if isinstance(config, DecodeBench):
        return shared | {
            "what": "decode",
            "compile": False,  # as its sample.py
            "shape": [rows, config.prompt_tokens],
            "new_tokens": config.nanogpt_new_tokens,
            "temperature": config.temperature,
            "top_k": config.top_k,
        }
    assert isinstance(config, TrainBench)
    return shared | {
        "what": "train",
        "compile": config.compile,
        "shape": [config.gradient_accumulation_steps, rows, config.block_size],
        "warmup": WARMUP,
        "steps": config.steps,
        "weight_decay": config.weight_decay,
        "learning_rate": config.learning_rate,
        "betas": [config.beta1, config.beta2],
        "grad_clip": config.grad_clip,
    }


def record_of(config: BesideBench, ours: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Return nanoGPT's result as a record, of the same fields as ours."""
    seconds = result["seconds"]
    median = statistics.median(seconds)
    rows = config.nanogpt_batch_size or config.batch_size
    record = ours | {"program": "nanoGPT", "batch_size": rows, "torch": result["torch"]}
    if isinstance(config, DecodeBench):
        n = config.nanogpt_new_tokens
        record |= {"max_new_tokens": n, "ms_per_token": 1000 * median / n}
    else:
        n = config.gradient_accumulation_steps * config.block_size
        record["loss"] = result["loss"]
    rate = rows * n / median
    mfu = ours["mfu"] and ours["mfu"] * rate / ours["tokens_per_second"]
    own = ("activation", "matmul_dtype", "attention", "kernels", "remat", "scan_layers", *AXES,
           "jax", "loss_first", "skipped", "compile_cached")  # fmt: skip
    for name in own:
        record.pop(name, None)
    return record | {
        **spread(seconds),
        "tokens_per_second": rate,
        "mfu": mfu,
        "peak_gib": result["peak"] and result["peak"] / GIB,
        "peak_from": result["peak"] and "device",
        "compile_seconds": max(result["first"] - median, 0) if "loss" in result else None,
    }


def merged(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of the records of all rounds; of the first its compilation, cold."""
    ms = [record["ms"] for record in records]
    middle = statistics.median_low(ms)
    chosen = next(record for record in records if record["ms"] == middle)
    return chosen | {
        "rounds": len(records),
        "ms_min": min(record["ms_min"] for record in records),
        "ms_max": max(record["ms_max"] for record in records),
        "compile_seconds": records[0]["compile_seconds"],
    }


def compared(
    config: BesideBench, ours: list[dict[str, Any]], theirs: list[dict[str, Any]], torch: str
) -> dict[str, Any]:
    """Return the record of how many times nanoGPT's tokens/s ours are, and its peak memory."""
    rates = [[record["tokens_per_second"] for record in side] for side in (ours, theirs)]
    best = [
        max(r["tokens_per_second"] * r["ms"] / r["ms_min"] for r in side) for side in (ours, theirs)
    ]
    peaks = [max(r["peak_gib"] or 0 for r in side) for side in (ours, theirs)]
    same = config.nanogpt_batch_size in (0, config.batch_size)
    on_device = all(record["peak_from"] == "device" for record in (ours[0], theirs[0]))
    return {
        "what": "ratio",
        "of": ours[0]["what"],
        **{name: ours[0][name] for name in ("model", "device", "dtype", "block_size", "date")},
        "batch_sizes": [ours[0]["batch_size"], theirs[0]["batch_size"]],
        "ratio": statistics.median(rates[0]) / statistics.median(rates[1]),
        "ratio_of_best": best[0] / best[1],
        "ratios": [one / other for one, other in zip(*rates, strict=True)],
        "memory_ratio": peaks[0] / peaks[1] if same and on_device else None,
        "jax": ours[0]["jax"],
        "torch": torch,
    }
