"""What each bench is asked, and the networks that it knows by name."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gpt_jax.commandline.files import suggest
from gpt_jax.config import TrainConfig, key, parse
from gpt_jax.errors import UserError
from gpt_jax.prepare.dataset import GPT2_VOCAB_SIZE

GPT2 = {"vocab_size": GPT2_VOCAB_SIZE, "block_size": 1024, "bias": False, "dropout": 0.0}
CHAR = {"vocab_size": 65, "bias": False}
# nanoGPT's networks, as flags that those of the command line come after; how many rows: what a GPU
# of 80 GB holds
MODELS = {
    "124M": {"n_layer": 12, "n_head": 12, "n_embd": 768, "batch_size": 64, **GPT2},
    "350M": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "batch_size": 32, **GPT2},
    "774M": {"n_layer": 36, "n_head": 20, "n_embd": 1280, "batch_size": 16, **GPT2},
    "XL": {"n_layer": 48, "n_head": 25, "n_embd": 1600, "batch_size": 8, **GPT2},
    "char": {"n_layer": 6, "n_head": 6, "n_embd": 384, "batch_size": 64, "block_size": 256,
             "dropout": 0.2, **CHAR},
    # of the README's command line for a CPU, which switches torch.compile off
    "char_cpu": {"n_layer": 4, "n_head": 4, "n_embd": 128, "batch_size": 12, "block_size": 64,
                 "dropout": 0.0, "dtype": "float32", "compile": False, **CHAR},
}  # fmt: skip
T = TypeVar("T", bound="BenchConfig")


@dataclass(frozen=True)
class BenchConfig(TrainConfig):
    """Measure speed; of a training run's keys those count that its step knows."""

    preset = ""
    model: str = key("", "'': the config's, or 124M", "Bench", choices="|".join(["", *MODELS]))
    vocab_size: int = key(GPT2_VOCAB_SIZE, "rows of the embedding", at_least=1)
    repeats: int = key(3, "measurements, of which the median is told", at_least=1)
    json: str = key("", "file to add the JSON lines to; '': they are printed")
    timeout: int = key(1800, "seconds that a process of its own may take", at_least=1)
    gradient_accumulation_steps: int = key(1, "micro-batches of a step", at_least=1)


@dataclass(frozen=True)
class LoaderBench(BenchConfig):
    """Measure the step with the real loader, of made-up tokens, against one batch that stays."""

    command = "python -m gpt_jax.bench loader"
    steps: int = key(20, "steps of a measurement", at_least=1)


@dataclass(frozen=True)
class BesideBench(BenchConfig):
    """Measure a thing alone, or in turns with a nanoGPT checkout."""

    profile: str = key("", "folder for a trace, whose kernels are listed; '': none")
    nanogpt: str = key("", "nanoGPT checkout to measure in turns with ours; '': none", "nanoGPT")
    nanogpt_python: str = key("", "interpreter that has torch; '': this one")
    nanogpt_batch_size: int = key(0, "its rows; 0: as many as ours", at_least=0)
    rounds: int = key(2, "turns of each", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.profile and self.nanogpt:
            raise UserError("profile and nanogpt do not go together: run the bench twice")


@dataclass(frozen=True)
class TrainBench(BesideBench):
    """Measure the training step: tokens/s, mfu, memory, compile time."""

    command = "python -m gpt_jax.bench train"
    steps: int = key(20, "steps of a measurement", at_least=1)


@dataclass(frozen=True)
class DecodeBench(BesideBench):
    """Measure text generation: generate() from prompts of random tokens."""

    command = "python -m gpt_jax.bench decode"
    batch_size: int = key(1, "texts written together", at_least=1)
    prompt_tokens: int = key(1, "tokens of a prompt", "Text", at_least=1)
    max_new_tokens: int = key(512, "tokens of a text", at_least=1)
    temperature: float = key(0.8, "0: always the likeliest", at_least=0)
    top_k: int = key(200, "draw from the k likeliest; 0: all", at_least=0)
    nanogpt_new_tokens: int = key(64, "of nanoGPT, which is slow", at_least=1)
    data: int = key(1, "copies of the model; -1: all that the devices allow", "Mesh", at_least=-1)


@dataclass(frozen=True)
class CompileBench(BenchConfig):
    """Measure imports, compilation and the way to the first iteration, cold and warm."""

    command = "python -m gpt_jax.bench compile"
    # train.py's data set has a symbol each, from the code points above 0x10000
    vocab_size: int = key(GPT2_VOCAB_SIZE, "rows of the embedding", at_least=1, at_most=2**20)


def configured(argv: list[str], kind: type[T]) -> T:
    """Return the config of a bench's command line: the named network's flags, then the others."""
    given = [item.removeprefix("--model=") for item in argv if item.startswith("--model=")]
    files = [item for item in argv if not item.startswith("-")]
    name = given[-1] if given else "" if files else "124M"
    if name and name not in MODELS:
        raise UserError(f"unknown model {suggest(name, MODELS)} (there are {', '.join(MODELS)})")
    for file in files:
        if file in MODELS and not Path(file).exists():
            raise UserError(f"{file!r} is a network, not a config file: use --model={file}")
    sizes = dict(MODELS.get(name, {}))
    if kind is DecodeBench:
        sizes.pop("batch_size", None)
    first = [f"--{key}={value}" for key, value in sizes.items()]
    named = [f"--model={name}"] if name else []
    config = parse([*first, *named, *argv], kind)
    if config.model != name:
        raise UserError(f"model={config.model!r} in a config file: name it on the command line")
    return config
