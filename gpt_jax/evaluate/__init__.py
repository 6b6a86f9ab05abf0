"""The command ``python -m gpt_jax.evaluate``: the loss of whole splits, in order."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from gpt_jax.commandline import notes
from gpt_jax.config import LoadConfig, TrainConfig, key, parse
from gpt_jax.data import evaluation_starts
from gpt_jax.errors import exit_code
from gpt_jax.evaluation import Evaluation, evaluate, make_eval_step
from gpt_jax.interop import nanogpt_checkpoint
from gpt_jax.prepare.checked import open_checked
from gpt_jax.prepare.dataset import for_dataset
from gpt_jax.pretrained import load, load_run
from gpt_jax.runtime import connected, use_platform
from gpt_jax.sharding import make_mesh


@dataclass(frozen=True)
class EvalConfig(LoadConfig):
    """Measure the loss of a trained GPT over whole splits."""

    command = "python -m gpt_jax.evaluate"
    dataset: str = key("", "folder of the data inside data_dir; '': the run's own", "Data")
    split: str = key("val", "what to measure", choices="val|train|all")
    batch_size: int = key(32, "sequences of a forward pass", at_least=1)


@exit_code
def main(argv: list[str]) -> None:
    """Print a line a split: loss, perplexity, bits per byte."""
    config = parse(argv, EvalConfig)
    for note in notes(config):
        print(note, file=sys.stderr)
    with connected(config, "start the evaluation again"):
        measure(config)


def measure(config: EvalConfig) -> None:
    """Evaluate, over all devices of all processes."""
    use_platform(config.device)
    mesh = make_mesh(config.device, config.data, config.fsdp, config.tensor)
    dataset = config.dataset
    if config.init_from == "resume":
        model, params, tokenizer, meta = load_run(config.out_dir, config.step, config.dtype, mesh)
        # the name is checked as one of a training run: the JSON may be someone else's
        dataset = dataset or TrainConfig(dataset=meta["config"].get("dataset")).dataset
        print(f"{config.out_dir}, iteration {meta['iter']}, on {dataset}", file=sys.stderr)
    else:
        model, params, tokenizer = load(
            config.init_from, step=config.step, dtype=config.dtype, mesh=mesh,
            data_dir=config.data_dir,
        )  # fmt: skip
        if nanogpt_checkpoint.is_one(config.init_from):
            theirs = nanogpt_checkpoint.read(config.init_from)
            dataset = dataset or nanogpt_checkpoint.dataset_of(theirs)
            print(f"{theirs.path}, iteration {theirs.iter_num}, on {dataset}", file=sys.stderr)
    folder = Path(config.data_dir) / (dataset or "openwebtext")
    _, _, dtype = for_dataset(folder)
    eval_step = make_eval_step(model, mesh)
    for name in ("train", "val") if config.split == "all" else (config.split,):
        split = open_checked(folder, name, model.config.vocab_size, dtype, model.config.block_size)
        starts = evaluation_starts(split)
        result = evaluate(eval_step, params, split, starts, config.batch_size, mesh, tokenizer)
        bits = "n/a" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
        print(
            f"{name} loss {result.loss:.4f} nats/token, perplexity {perplexity(result):.3f}, "
            f"{bits} bits/byte, {result.tokens:,} tokens"
        )


def perplexity(result: Evaluation) -> float:
    """Return e to the loss: as many tokens as a die would have that is as hard to guess."""
    return math.exp(min(result.loss, 700))  # a float has no more
