"""The command ``python -m gpt_jax.evaluate``: the loss of whole splits, in order."""

import sys
from dataclasses import dataclass
from pathlib import Path

from gpt_jax import checkpoint
from gpt_jax.commandline import notes
from gpt_jax.config import LoadConfig, key, parse
from gpt_jax.data import evaluation_starts, open_split
from gpt_jax.errors import exit_code
from gpt_jax.evaluation import evaluate, make_eval_step
from gpt_jax.prepare.dataset import for_dataset
from gpt_jax.pretrained import load
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
    source = config.out_dir if config.init_from == "resume" else config.init_from
    model, params, tokenizer = load(source, step=config.step, dtype=config.dtype, mesh=mesh)
    dataset = config.dataset
    if not dataset and config.init_from == "resume":
        number = checkpoint.choose(source, config.step)
        dataset = checkpoint.read_meta(source, number)["config"]["dataset"]
        print(f"{source}, iteration {number}, on {dataset}", file=sys.stderr)
    folder = Path(config.data_dir) / (dataset or "openwebtext")
    _, _, dtype = for_dataset(folder)
    eval_step = make_eval_step(model, mesh)
    for name in ("train", "val") if config.split == "all" else (config.split,):
        split = open_split(folder, name, model.config.vocab_size, dtype, model.config.block_size)
        starts = evaluation_starts(split)
        result = evaluate(eval_step, params, split, starts, config.batch_size, mesh, tokenizer)
        bits = "n/a" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
        print(
            f"{name} loss {result.loss:.4f} nats/token, perplexity {result.perplexity:.3f}, "
            f"{bits} bits/byte, {result.tokens:,} tokens"
        )
