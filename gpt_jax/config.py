"""Every key of every command: nanoGPT's names, meaning and defaults, and ours."""

import re
from dataclasses import dataclass, field, fields, replace
from operator import ge, gt, le, lt
from typing import Any, TypeVar

from gpt_jax.errors import UserError

TYPES = {int: "an int", float: "a float", bool: "a bool (True or False)", str: "a str"}
LIMITS = {"at_least": ge, "above": gt, "at_most": le, "below": lt}
LARGEST = {int: 2**31 - 1, float: 1e300}  # JAX counts in int32; nan and inf are not sizes
DEVICES = "auto|cpu|gpu|cuda|cuda:N|tpu"
DTYPES = "auto|float32|bfloat16|float16"
T = TypeVar("T", bound="Checked")


def key(default: Any, help: str, group: str = "", **limits: Any) -> Any:
    """Declare a key: its default, its help, the group it opens, its `LIMITS`, choices or name."""
    return field(default=default, metadata={"help": help, "group": group, **limits})


@dataclass(frozen=True)
class Checked:
    """A config whose values are of the types and within the limits of its keys, or UserError."""

    command, preset = "", ""  # how it is called, and the config if none is named

    def __post_init__(self) -> None:
        for f in fields(self):
            value = typed(f.name, getattr(self, f.name), f.type)
            object.__setattr__(self, f.name, value)
            limits = {"at_most": LARGEST.get(f.type), **f.metadata}
            for word, holds in LIMITS.items():
                if limits.get(word) is not None and not holds(value, limits[word]):
                    bound = f"{word.replace('_', ' ')} {limits[word]}"
                    raise UserError(f"{f.name}={value!r:.60} is out of range: it must be {bound}")
            pattern = limits.get("choices", "").replace("N", "[0-9]+")
            if pattern and not re.fullmatch(pattern, value):
                hint = " (JAX has no Metal backend: use --device=cpu)" if value == "mps" else ""
                raise UserError(f"{f.name}={value!r:.60} is not one of {limits['choices']}{hint}")
            if "name" in limits and not (value.strip() and value.isprintable()):
                raise UserError(f"{f.name}={value!r:.60} is empty or unprintable: give it a name")
            if f.name == "dataset" and ".." in re.split(r"[\\/,:]", value):
                raise UserError(f"dataset={value!r:.60} leaves data_dir: set --data_dir instead")


def check_network(c: "GPTConfig | TrainConfig") -> None:
    """Refuse sizes and kernels that do not go together."""
    if c.n_embd % c.n_head:
        fits = ", ".join(str(n) for n in range(1, 129) if c.n_embd % n == 0)
        problem = f"n_embd={c.n_embd} is not a multiple of n_head={c.n_head}"
        raise UserError(f"{problem}: choose n_head from {fits}")
    if c.attention == "cudnn" and (c.dropout > 0 or c.dtype == "float32"):
        problem = f"attention='cudnn' has no dropout and no float32, but dropout={c.dropout}"
        raise UserError(f"{problem} and dtype={c.dtype!r}: use --attention=auto")


@dataclass(frozen=True)
class GPTConfig(Checked):
    """The network: nanoGPT's seven sizes and switches, then how it is computed."""

    block_size: int = key(1024, "tokens of context", at_least=1)
    vocab_size: int = key(50304, "rows of the embedding: GPT-2's 50257, padded", at_least=1)
    n_layer: int = key(12, "transformer blocks", at_least=1)
    n_head: int = key(12, "attention heads of a block", at_least=1)
    n_embd: int = key(768, "embedding size", at_least=1)
    dropout: float = key(0.0, "share of activations dropped in training", at_least=0, below=1)
    bias: bool = key(True, "biases in the linear layers and LayerNorms")
    activation: str = key("gelu", "exact as nanoGPT, or OpenAI's tanh", choices="gelu|gelu_tanh")
    dtype: str = key("float32", "of matrix products", choices="float32|bfloat16|float16")
    matmul_dtype: str = key("auto", "of the layers' products; auto: dtype", choices="auto|float8")
    attention: str = key("auto", "attention kernel", choices="auto|reference|xla|cudnn")
    kernels: str = key("auto", "our own for GPUs, or plain code", choices="auto|reference|pallas")
    remat: str = key("none", "recomputed in the backward pass", choices="none|dots|full")
    scan_layers: bool = key(False, "True: one rolled loop compiles faster; False: trains faster")
    n_tokens: int = key(0, "ids from here up are padding, never sampled; 0: none", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_network(self)
        if self.n_tokens > self.vocab_size:
            raise UserError(f"n_tokens={self.n_tokens} is above vocab_size={self.vocab_size}")


@dataclass(frozen=True)
class Hardware(Checked):
    """What every command that computes is asked: on which devices, and on how many hosts."""

    device: str = key("auto", "gpu is cuda", "System", choices=DEVICES)
    dtype: str = key("auto", "auto: bfloat16 where fast", choices=DTYPES)
    compile: bool = key(True, "accepted; JAX always compiles")
    data: int = key(-1, "copies of the model; -1: all that the devices allow", "Mesh", at_least=-1)
    fsdp: int = key(1, "devices that share a copy and split its batch", at_least=-1)
    tensor: int = key(1, "devices that split each layer's heads and MLP", at_least=-1)
    coordinator_address: str = key("", "HOST:PORT of process 0; '': found", "Several hosts")
    num_processes: int = key(0, "of the run; 0: found; 1: alone", at_least=0, at_most=65536)
    process_id: int = key(-1, "which of them this is; -1: found", at_least=-1)
    initialization_timeout: int = key(120, "seconds to wait for the others", at_least=1)


@dataclass(frozen=True)
class TrainConfig(Hardware):
    """Train a GPT, or finetune or evaluate one."""

    command, preset = "python train.py", "quickstart"
    out_dir: str = key("out", "folder of the run", "Run", name=True)
    eval_interval: int = key(2000, "iterations from one evaluation to the next", at_least=1)
    log_interval: int = key(1, "iterations from one log line to the next", at_least=1)
    eval_iters: int = key(200, "batches of each split in an evaluation", at_least=1)
    eval_only: bool = key(False, "evaluate once and stop")
    always_save_checkpoint: bool = key(True, "save at every evaluation, not only the best yet")
    save_interval: int = key(0, "also save every N iterations; 0: at evaluations", at_least=0)
    keep: int = key(2, "newest checkpoints kept, beside the best", at_least=1)
    keep_every: int = key(0, "also keep those of every N iterations; 0: none", at_least=0)
    fallback: bool = key(True, "resume from an earlier checkpoint if the newest is damaged")
    init_from: str = key("scratch", "scratch|resume|auto (either)|gpt2|OWNER/NAME|PATH", name=True)
    sample_tokens: int = key(0, "tokens of a sample shown when the run ends", at_least=0)
    log_norms: bool = key(False, "log each layer's gradient and parameter norms", "Metrics")
    tensorboard: bool = key(False, "log to OUT_DIR/tensorboard too")
    wandb_log: bool = key(False, "log to Weights & Biases too")
    wandb_project: str = key("owt", "its project")
    wandb_run_name: str = key("gpt2", "its run")
    dataset: str = key("openwebtext", "in data_dir: a; a:0.7,b:0.3; a,b by size", "Data", name=True)
    data_dir: str = key("data", "folder of the datasets", name=True)
    gradient_accumulation_steps: int = key(40, "micro-batches of an iteration", at_least=1)
    batch_size: int = key(12, "sequences of a micro-batch", at_least=1)
    block_size: int = key(1024, "tokens of a sequence", at_least=1)
    n_layer: int = key(12, "transformer blocks", "Model", at_least=1)
    n_head: int = key(12, "attention heads of a block", at_least=1)
    n_embd: int = key(768, "embedding size", at_least=1)
    dropout: float = key(0.0, "0 to pretrain, 0.1 or more to finetune", at_least=0, below=1)
    bias: bool = key(False, "biases in the linear layers and LayerNorms")
    activation: str = key("gelu", "exact as nanoGPT, or OpenAI's tanh", choices="gelu|gelu_tanh")
    learning_rate: float = key(6e-4, "highest rate", "Optimizer (AdamW)", above=0, at_most=1e30)
    max_iters: int = key(600000, "iterations of the run", at_least=0)
    weight_decay: float = key(1e-1, "decay of matrices and embeddings", at_least=0)
    beta1: float = key(0.9, "decay of the mean of gradients", at_least=0, at_most=1 - 1e-6)
    beta2: float = key(0.95, "decay of the mean of their squares", at_least=0, at_most=1 - 1e-6)
    grad_clip: float = key(1.0, "highest norm of the gradient; 0: no limit", at_least=0)
    max_skipped: int = key(10, "updates left out in a row (nan, inf) that end a run", at_least=1)
    spike_zscore: float = key(0.0, "leave out updates so far above the last 128; 0: no", at_least=0)
    decay_lr: bool = key(True, "warm up, then decay along a cosine", "Learning rate")
    warmup_iters: int = key(2000, "iterations of the warmup", at_least=0)
    lr_decay_iters: int = key(600000, "iteration that reaches min_lr", at_least=0)
    min_lr: float = key(6e-5, "lowest learning rate: about a tenth of the highest", at_least=0)
    backend: str = key("nccl", "accepted; JAX picks the transport itself", "Speed and seed")
    seed: int = key(1337, "of weights, batches and dropout", at_least=0, at_most=2**32 - 1)
    matmul_dtype: str = key("auto", "of the layers' products; auto: dtype", choices="auto|float8")
    attention: str = key("auto", "attention kernel", choices="auto|reference|xla|cudnn")
    kernels: str = key("auto", "our own for GPUs, or plain code", choices="auto|reference|pallas")
    remat: str = key("none", "recomputed in the backward pass", choices="none|dots|full")
    scan_layers: bool = key(False, "True: one rolled loop compiles faster; False: trains faster")
    deterministic: bool = key(False, "the same bits in every run on a GPU; auto attention is plain")
    peak_flops: float = key(0.0, "FLOP/s of one device, for mfu; 0: from a table", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_network(self)
        if self.deterministic and self.attention == "cudnn":
            raise UserError("attention='cudnn' is not deterministic: use --attention=auto")

    def model_config(self, vocab_size: int, dtype: str, n_tokens: int = 0) -> GPTConfig:
        """Return the network to train, for a vocabulary and a dtype of the matrix products."""
        shared = {f.name for f in fields(self)} & {f.name for f in fields(GPTConfig)} - {"dtype"}
        its: dict[str, Any] = {n: getattr(self, n) for n in shared} | {"n_tokens": n_tokens}
        return self.continued(GPTConfig(**its, vocab_size=vocab_size, dtype=dtype))

    def continued(self, model: GPTConfig) -> GPTConfig:
        """Return a trained network's config, as this run goes on training it."""
        ours = "block_size dropout matmul_dtype attention kernels remat scan_layers".split()  # noqa: SIM905
        model = replace(model, **{name: getattr(self, name) for name in ours})
        plain = self.deterministic and self.attention == "auto"  # which may be cuDNN's
        return replace(model, attention="reference") if plain else model


@dataclass(frozen=True)
class LoadConfig(Hardware):
    """Which trained GPT to load."""

    init_from: str = key("resume", "resume (out_dir)|gpt2|OWNER/NAME|PATH", "Run", name=True)
    out_dir: str = key("out", "folder of the run", name=True)
    step: str = key("", "'': best if only those were kept, or latest", choices="|best|latest|N")
    data_dir: str = key("data", "folder of the datasets", name=True)


@dataclass(frozen=True)
class SampleConfig(LoadConfig):
    """Write text with a trained GPT."""

    command = "python sample.py"
    start: str = key("\n", "prompt, or FILE:prompt.txt", "Text")
    num_samples: int = key(10, "samples drawn", at_least=1)
    max_new_tokens: int = key(500, "tokens of a sample", at_least=1)
    temperature: float = key(0.8, "below 1: less random; 0: always the likeliest", at_least=0)
    top_k: int = key(200, "draw from the k likeliest; 0 (nanoGPT's None): all", at_least=0)
    top_p: float = key(1.0, "draw from the likeliest with this mass", above=0, at_most=1)
    stop: str = key("", "text at which a sample ends; '': none")
    seed: int = key(1337, "of the draws", at_least=0, at_most=2**32 - 1)
    data: int = key(1, "copies of the model; -1: all that the devices allow", "Mesh", at_least=-1)


def typed(name: str, value: Any, kind: Any, where: str = "") -> Any:
    """Return a key's value in the key's type: whole floats are ints, ints are floats."""
    if kind is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not kind:
        found = TYPES.get(type(value), type(value).__name__)
        raise UserError(f"{where}{name}={value!r:.60} is {found}, it must be {TYPES[kind]}")
    return value


def parse(argv: list[str], kind: type[T] = TrainConfig) -> T:
    """Return the config of a command line: defaults < saved run < config files < --key=value.

    Raises UserError for what cannot be understood; ``--help`` prints every key and exits.
    """
    from gpt_jax.commandline import parse  # an edge: it knows this module, not we it

    return parse(argv, kind)
