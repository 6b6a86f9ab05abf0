"""The command ``python -m gpt_jax.plan``: what a run will take, on hardware that is not there."""

import json
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from gpt_jax.config import GPTConfig, TrainConfig, key, parse
from gpt_jax.errors import exit_code
from gpt_jax.metrics import flops_per_token
from gpt_jax.plan.estimate import RECOMPUTED, assumptions, roofline
from gpt_jax.plan.program import Program, bytes_by_part, compiled_step, n_params
from gpt_jax.plan.remedies import Remedy, remedies, shared_rows
from gpt_jax.plan.report import written
from gpt_jax.plan.topology import Target, attention_for, describe_topology
from gpt_jax.prepare.dataset import GPT2_VOCAB_SIZE, for_dataset
from gpt_jax.prepare.mixture import sets_of
from gpt_jax.pretrained import product_dtype
from gpt_jax.reporting import describe
from gpt_jax.reporting.peak import peak_flops
from gpt_jax.runtime import use_platform
from gpt_jax.sharding import make_mesh, micro_batches, row_shards

PATIENCE = 105  # seconds after which no further settings are compiled, only estimated
DEEP = 24  # layers, beyond which a TPU's compiler is given a rolled loop
DAY = 86400  # seconds
FIRST_SHARE = 0.75  # XLA's own share of a GPU's memory, unless told otherwise


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """Compile the train step for hardware that is not there, and say what a run will take."""

    command, preset = "python -m gpt_jax.plan", "train_gpt2"
    topology: str = key("local", "v5e:4x4|v5p:4x4x4|v6e:4x4|h200:8|... or local", "Plan", name=True)
    vocab_size: int = key(0, "rows of the embedding; 0: the data set's, or GPT-2's", at_least=0)
    json: bool = key(False, "print one JSON object instead of the report")


@exit_code
def main(argv: list[str]) -> None:
    """Print the plan of a run."""
    config = parse(argv, PlanConfig)
    here = config.topology == "local"
    # what is compiled for devices that are not there cannot be loaded here
    use_platform(config.device if here else "cpu", keep_compiled=here)
    target = describe_topology(config.topology)
    found = plan(config, target)
    print(json.dumps(found, indent=1) if config.json else written(found))


def plan(config: PlanConfig, target: Target) -> dict[str, Any]:
    """Return all that the report says, as JSON takes it; sizes in bytes, times in seconds."""
    began = time.monotonic()
    mesh = make_mesh("auto", config.data, config.fsdp, config.tensor, devices=target.devices)
    target = target._replace(devices=list(mesh.devices.flat))
    notes = []
    if instead := shared_rows(config, row_shards(mesh)):
        config = replace(config, **instead)
        rows = config.batch_size * config.gradient_accumulation_steps
        notes += [
            f"train.py would refuse these rows, which {row_shards(mesh)} devices cannot share: "
            f"planned with {flags(instead)}, {rows} rows, the nearest that they can"
        ]
    if target.platform == "tpu" and config.n_layer > DEEP and not config.scan_layers:
        config = replace(config, scan_layers=True)
        notes += [
            f"a TPU's compiler takes minutes over {config.n_layer} layers one by one: planned with "
            "--scan_layers=True, which train.py should be given too"
        ]
    model = network(config, target)
    if not config.vocab_size and not prepared(config) and config.dataset != "openwebtext":
        notes += [f"{config.dataset} is not prepared here: GPT-2's vocabulary is taken for its own"]
    A, B = micro_batches(config, mesh)
    tokens = A * B * config.block_size
    every, counted = n_params(config, model, mesh)
    flops = flops_per_token(model, counted) * tokens
    peak = config.peak_flops or peak_flops(target.devices[0]) or 0.0
    say(f"compiling for {describe(mesh)} ...")
    program = compiled_step(config, model, target, mesh)
    memory = target.chip.memory if target.chip else None
    fits = None if memory is None else program.peak <= memory and not program.refused
    parts = bytes_by_part(config, model, mesh)
    speed = None
    if not program.refused:
        speed = roofline(program, target, flops, peak, A, parts["parameters"], config.remat)
    else:
        notes += ["the compiler refused the program: collectives and time are not known"]
    if target.platform == "tpu" and not program.refused:
        notes += [
            "compiled in haste: the run's own program may need up to a tenth more or less memory, "
            "and fewer collectives"
        ]
    if fits and memory and target.platform == "cuda" and program.peak > FIRST_SHARE * memory:
        notes += [
            f"XLA takes {FIRST_SHARE:.0%} of a GPU's memory unless told otherwise: set "
            "XLA_PYTHON_CLIENT_MEM_FRACTION=.95"
        ]
    if config.remat != "none":
        notes += [f"remat={config.remat}: {RECOMPUTED[config.remat]:.2f} x the formula's products"]
    found: dict[str, Any] = {
        "topology": config.topology,
        "devices": describe(mesh),
        "n_devices": mesh.size,
        "mesh": dict(mesh.shape),
        "model": {name: getattr(model, name) for name in (
            "n_layer", "n_head", "n_embd", "block_size", "vocab_size",
            "dtype", "attention", "remat", "scan_layers")},
        "parameters": every,
        "parameters_without_positions": counted,
        "step": {
            "micro_batches": A,
            "rows": B,
            "rows_of_a_device": B // row_shards(mesh),
            "tokens": tokens,
            "flops": flops,
        },
        "memory_bytes": {
            **{name: round(size) for name, size in parts.items()},
            "arguments": round(program.arguments),
            "outputs": round(program.outputs),
            "donated": round(program.aliased),
            "temporaries": round(program.temporaries),
            "code": round(program.code),
            "peak": round(program.peak),
            "available": None if memory is None else round(memory),
        },
        "fits": fits,
        "refused_by_compiler": program.refused,
        "collectives": program.collectives,
        "time": speed
        and {
            **speed._asdict(),
            "tokens_per_second": tokens / speed.expected,
            "assumptions": assumptions(target),
        },
        "run": {
            "iterations": config.max_iters,
            "tokens": tokens * config.max_iters,
            "days": speed and speed.expected * config.max_iters / DAY,
            "days_at_least": speed and speed.at_least * config.max_iters / DAY,
        },
        "remedies": [],
    }  # fmt: skip
    if fits is False and memory:
        given = remedies(program, config, mesh, model, target.devices, memory)
        left = began + PATIENCE - time.monotonic()
        given = verified(given, program, config, model, target, memory, left)
        found["remedies"] = [
            {
                "settings": flags(remedy.changes),
                "peak_bytes": round(remedy.peak),
                "compiled": remedy.compiled,
            }
            for remedy in given
        ]
        if not given:
            notes += ["no settings with this batch fit: take more devices or a smaller network"]
    found["notes"] = notes
    found["seconds"] = round(time.monotonic() - began, 1)
    return found


def network(config: PlanConfig, target: Target) -> GPTConfig:
    """Return the network that train.py would train on the target's devices."""
    vocab_size = config.vocab_size or GPT2_VOCAB_SIZE
    if not config.vocab_size and prepared(config):
        vocab_size = for_dataset(folder_of(config))[1]
    here = config.topology == "local"
    dtype = "bfloat16" if config.dtype == "auto" and not here else product_dtype(config.dtype)
    # vocab_size is a key here, where train.py takes it from the data
    train = TrainConfig(**{f.name: getattr(config, f.name) for f in fields(TrainConfig)})
    model = train.model_config(vocab_size, dtype)
    return replace(model, attention=attention_for(target, model))


def prepared(config: PlanConfig) -> bool:
    """Return whether the data set's folder says what its vocabulary is."""
    folder = folder_of(config)
    return any((folder / name).exists() for name in ("meta.json", "meta.pkl"))


def folder_of(config: PlanConfig) -> Path:
    """Return the folder of the data set, of a mixture that of the first: their ids are the same."""
    return Path(config.data_dir) / next(iter(sets_of(config.dataset)))


def verified(
    given: list[Remedy],
    program: Program,
    config: PlanConfig,
    model: GPTConfig,
    target: Target,
    memory: float,
    seconds: float,
) -> list[Remedy]:
    """Return the settings that fit, the first of them compiled as far as the seconds allow."""
    likely = program.seconds * (3 if program.refused else 1.2)  # a refusal comes early
    while given and seconds > likely:
        began = time.monotonic()
        (first, *others) = given
        say(f"trying {flags(first.changes)} ...")
        other = replace(config, **first.changes)
        mesh = make_mesh("auto", other.data, other.fsdp, other.tensor, devices=target.devices)
        tried = compiled_step(other, replace(model, remat=other.remat), target, mesh)
        if tried.peak <= memory and not tried.refused:
            return [Remedy(first.changes, tried.peak, True), *others]
        given = others
        seconds -= time.monotonic() - began
    return given


def flags(changes: dict[str, Any]) -> str:
    """Return changes as they are typed: "--remat=dots --batch_size=8"."""
    return " ".join(f"--{name}={value}" for name, value in changes.items())


def say(line: str) -> None:
    """Print a line for whoever is waiting, on stderr."""
    print(line, file=sys.stderr, flush=True)
