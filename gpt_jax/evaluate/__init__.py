"""The command ``python -m gpt_jax.evaluate``: the loss of whole splits, in order."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
from gpt_jax.prepare.mixture import sets_of
from gpt_jax.pretrained import load, load_run
from gpt_jax.reporting.terminal import evaluating, is_live
from gpt_jax.runtime import connected, use_platform
from gpt_jax.sharding import make_mesh
from gpt_jax.start import refuse_another_tokenizer


@dataclass(frozen=True)
class EvalConfig(LoadConfig):
    """Measure the loss of a trained GPT over whole splits."""

    command = "python -m gpt_jax.evaluate"
    dataset: str = key("", "in data_dir: a; a:0.7,b:0.3; a,b by size; '': the run's", "Data")
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
    dataset = dataset or "openwebtext"
    shares = sets_of(dataset)
    source = config.out_dir if config.init_from == "resume" else config.init_from
    dtypes = {}
    for name in shares:
        its, _, dtypes[name] = for_dataset(folder := Path(config.data_dir, name))
        if folder.is_dir():  # else that is what is told below
            refuse_another_tokenizer(source, tokenizer.to_json(), its)
    eval_step = make_eval_step(model, mesh)
    vocab_size, block_size = model.config.vocab_size, model.config.block_size
    for split_name in ("train", "val") if config.split == "all" else (config.split,):
        results = []
        for name, dtype in dtypes.items():
            folder = Path(config.data_dir, name)
            split = open_checked(folder, split_name, vocab_size, dtype, block_size)
            starts = evaluation_starts(split)
            with telling(split_name, len(starts) / config.batch_size) as told:
                result = evaluate(
                    eval_step, params, split, starts, config.batch_size, mesh, tokenizer, told
                )
            results.append(result)
            print(line(split_name, result) + (f" of {name}" if len(shares) > 1 else ""))
        if len(shares) > 1:
            weights = [
                float(share or r.tokens) for share, r in zip(shares.values(), results, strict=True)
            ]
            print(line(split_name, mean(results, weights)) + f" of {dataset}")


@contextmanager
def telling(split: str, n_batches: float) -> Iterator[Callable[[], bool]]:
    """Show on a terminal how far an evaluation is, and nothing elsewhere, where results are read.

    A context, whose function is to be called before each batch.
    """
    never = lambda: False  # noqa: E731
    with evaluating(split, n_batches, never) if is_live() else nullcontext(never) as told:
        yield told


def mean(results: Sequence[Evaluation], weights: Sequence[float]) -> Evaluation:
    """Return what a mixture's tokens cost, drawn from each set by its weight."""
    nats = [weight * r.loss for weight, r in zip(weights, results, strict=True)]
    # of each set its bytes a token; the natural logarithm of 2 cancels
    n_bytes = [x / r.bits_per_byte for x, r in zip(nats, results, strict=True) if r.bits_per_byte]
    bits_per_byte = sum(nats) / sum(n_bytes) if len(n_bytes) == len(results) else None
    return Evaluation(sum(nats) / sum(weights), sum(r.tokens for r in results), bits_per_byte)


def line(name: str, result: Evaluation) -> str:
    """Return the line that is printed of a split."""
    bits = "n/a" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
    return (
        f"{name} loss {result.loss:.4f} nats/token, perplexity {perplexity(result):.3f}, "
        f"{bits} bits/byte, {result.tokens:,} tokens"
    )


def perplexity(result: Evaluation) -> float:
    """Return e to the loss: as many tokens as a die would have that is as hard to guess."""
    return math.exp(min(result.loss, 700))  # a float has no more
