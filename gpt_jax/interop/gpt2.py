"""GPT-2 as Hugging Face keeps it, read from the hub or a folder: no torch, no transformers.

Their Conv1D holds (in, out), as our linear layers do, so nothing is transposed: a parameter of
theirs is a view of ours. What transformers computes and this network does not is refused by name.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gpt_jax.checkpoint import steps
from gpt_jax.config import GPTConfig
from gpt_jax.errors import UserError
from gpt_jax.interop import tokenizer_files
from gpt_jax.interop.safetensors_file import open_tensors
from gpt_jax.model import GPT
from gpt_jax.sharding import state_sharding
from gpt_jax.tokenizer import Tokenizer, tiktoken_tokenizer

HUB = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
HUB_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
FETCHED = [  # all that is looked at
    "config.json", WEIGHTS, INDEX, "model-*-of-*.safetensors", "tokenizer.json", "vocab.json",
    "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
]  # fmt: skip
GPT2_TOKENS = 50257
LONGEST_JSON = 10**7  # bytes
PREFIX = "transformer."

# GPT2Config's names for our sizes, each with its default
SIZES = {
    "n_layer": ("n_layer", 12), "n_head": ("n_head", 12), "n_embd": ("n_embd", 768),
    "n_positions": ("block_size", 1024), "vocab_size": ("vocab_size", GPT2_TOKENS),
}  # fmt: skip
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# what else decides what GPT2LMHeadModel computes: our value, which is also its default
FIXED = {
    "layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "tie_word_embeddings": True,
    "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "pruned_heads": {},
    "quantization_config": None,
}  # fmt: skip


def is_theirs(source: str | Path) -> bool:
    """Return whether a source means a model of Hugging Face's: a folder with one, or a hub's name.

    A name such as "gpt2" always means the hub's: "./gpt2" is the folder. "owner/name" is looked
    for on the hub where no such folder is; a Path never is.
    """
    if source in HUB:
        return True
    if os.path.isdir(source) and steps(str(source)):
        return False  # a run of ours, whatever else was put there
    if os.path.exists(source):
        files = (WEIGHTS, INDEX, *PICKLED)
        return any(os.path.lexists(os.path.join(source, name)) for name in files)
    named = isinstance(source, str) and re.fullmatch(HUB_NAME, source, re.ASCII)
    return bool(named) and not str(source).endswith(".pt")


def load(source: str | Path, dtype: str, mesh: Mesh) -> tuple[GPT, dict[str, Any], Tokenizer]:
    """Return (model, params, tokenizer) of a folder or of a name on the hub, laid out on a mesh."""
    local = source not in HUB and os.path.exists(source)
    folder = Path(source) if local else fetch(str(source))
    model, params = load_network(folder, dtype, mesh)
    tokenizer = read_tokenizer(folder, model.config)
    return GPT(replace(model.config, n_tokens=tokenizer.n_tokens)), params, tokenizer


def load_network(folder: Path, dtype: str, mesh: Mesh) -> tuple[GPT, dict[str, Any]]:
    """Return (model, params) of a folder; the host never holds more than one parameter of it."""
    config = read_config(folder / "config.json", dtype)
    parameters = unread(read_tensors(folder), config, folder)

    def array(parameter: Parameter, sharding: Any) -> jax.Array:
        blocks: dict[str, np.ndarray] = {}  # several devices may want the same

        def block(index: Any) -> np.ndarray:
            if str(index) not in blocks:
                blocks[str(index)] = parameter[index]
            return blocks[str(index)]

        result = jax.make_array_from_callback(parameter.shape, sharding, block)
        result.block_until_ready()  # else the next one's blocks would be there beside these
        return result

    return GPT(config), jax.tree.map(array, parameters, state_sharding(mesh, parameters))


def fetch(source: str) -> Path:
    """Return the folder, in Hugging Face's cache, of a model of the hub, fetched if need be."""
    is_ours = source in HUB
    what = f"init_from={source}" if is_ours else f"init_from={source}: no such folder here, and it"
    try:
        from huggingface_hub import snapshot_download  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"{what} would be fetched from Hugging Face's hub: pip install 'gpt_jax[hub]' brings "
            "what that needs, or name a folder that holds the model"
        ) from None
    try:
        return Path(snapshot_download(HUB.get(source, source), allow_patterns=FETCHED))
    except Exception as error:  # whatever the network, the hub or the disk has to say
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{what} cannot be fetched from Hugging Face's hub ({reason:.150}): offline, name a "
            f"folder with its config.json and {WEIGHTS}, or set HF_HOME to a cache that has it"
        ) from None


def read_tokenizer(folder: Path, config: GPTConfig) -> Tokenizer:
    """Return the tokenizer of a model's folder: of its files, else GPT-2's for GPT-2's vocabulary.

    Raises UserError where there is neither, or it has ids that the network does not.
    """
    if not tokenizer_files.are_in(folder) and config.vocab_size == GPT2_TOKENS:
        return tiktoken_tokenizer("gpt2")
    tokenizer = tokenizer_files.read(folder)
    if tokenizer.n_tokens > config.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.n_tokens:,} ids and vocab_size is "
            f"{config.vocab_size:,} in its config.json: they do not belong together"
        )
    return tokenizer


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file that others have made; UserError where there is none."""
    try:
        if not path.is_file():
            raise ValueError("it is not there" if not os.path.lexists(path) else "it is no file")
        if path.stat().st_size > LONGEST_JSON:
            raise ValueError(f"it has more than {LONGEST_JSON:,} bytes")
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
        return found
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason!s:.200}): get it anew") from None


def read_config(path: Path, dtype: str) -> GPTConfig:
    """Return the network that a config.json describes, to compute in ``dtype``.

    Raises UserError, with name and value, for one that this package's network is not.
    """
    theirs = read_json(path)
    sizes = {ours: theirs.get(name, default) for name, (ours, default) in SIZES.items()}
    width = 4 * sizes["n_embd"] if isinstance(sizes["n_embd"], int) else None
    activation = theirs.get("activation_function", "gelu_new")
    allowed = {
        "model_type": ["gpt2"], "activation_function": [*ACTIVATIONS],
        "n_inner": [None, width], "n_ctx": [None, sizes["block_size"]],
        **{name: [value] for name, value in FIXED.items()},
    }  # fmt: skip
    present = {"model_type": None, **theirs}  # the one without a default
    for name, values in allowed.items():
        if name in present and present[name] not in values:
            raise UserError(
                f"{path}: {name}={present[name]!r:.60}, and this network is GPT-2 with "
                f"{name}={' or '.join(map(repr, values))}: it cannot compute that model"
            )
    try:
        return GPTConfig(**sizes, bias=True, activation=ACTIVATIONS[activation], dtype=dtype)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a folder's safetensors file or files, by name; see open_tensors."""
    if (folder / WEIGHTS).exists():
        return open_tensors(folder / WEIGHTS)
    if not os.path.lexists(folder / INDEX):
        problem = f"{folder} has no {WEIGHTS}"
        if any((folder / name).exists() for name in PICKLED):
            problem += f", and {PICKLED[0]} is a pickle, which could run code when it is read"
        raise UserError(f"{problem}: save the model anew with save_pretrained of transformers")
    places = read_json(folder / INDEX).get("weight_map")
    if not (isinstance(places, dict) and all(isinstance(x, str) for x in places.values())):
        raise UserError(f"{folder / INDEX} has no weight_map of names to files: get it anew")
    tensors: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(places.values()):
        if not re.fullmatch(r"[\w.-]{1,99}\.safetensors", name):
            raise UserError(f"{folder / INDEX} names the file {name!r:.60}: it must lie beside it")
        found = open_tensors(folder / name)
        for tensor in found:
            if places.get(tensor) != name:
                where = f"by {INDEX} not there" if tensor in places else f"not in {INDEX}"
                raise UserError(
                    f"{folder / name} has {tensor!r:.60}, which is {where}: get it anew"
                )
        tensors |= found
    missing = next((name for name in places if name not in tensors), None)
    if missing is not None:
        raise UserError(f"{folder}: {missing!r:.60} is in {INDEX} and in no file: get it anew")
    return tensors


@dataclass(frozen=True, eq=False)
class Parameter:
    """A parameter that still lies in its file: an index gives a slice of it, read, in float32."""

    parts: list[np.ndarray]  # of each layer, if it is stacked, else itself alone
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts),) * self.stacked + self.parts[0].shape

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        layers, rest = (index[0], index[1:]) if self.stacked else (slice(None), index)
        views = [part[rest] for part in self.parts[layers]]
        result = np.empty((len(views), *views[0].shape), np.float32)
        for i, view in enumerate(views):
            copy(result[i : i + 1], view)
        return result if self.stacked else result[0]


def copy(there: np.ndarray, view: np.ndarray) -> None:
    """Read a view of a file into memory: the only place where weights are."""
    there[...] = view


def layout(config: GPTConfig) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Yield our name of each parameter, with the shape of a layer's in their form and in ours."""
    C, H = config.n_embd, config.n_head
    D = C // H
    unfolded = {
        "h.attn.c_attn.weight": (C, 3, H, D),
        "h.attn.c_attn.bias": (3, H, D),
        "h.attn.c_proj.weight": (H, D, C),
    }
    for module, shape in {
        "wte": (config.vocab_size, C), "wpe": (config.block_size, C), "h.ln_1": (C,),
        "h.attn.c_attn": (C, 3 * C), "h.attn.c_proj": (C, C), "h.ln_2": (C,),
        "h.mlp.c_fc": (C, 4 * C), "h.mlp.c_proj": (4 * C, C), "ln_f": (C,),
    }.items():  # fmt: skip
        for kind in ("weight",) if module in ("wte", "wpe") else ("weight", "bias"):
            name, theirs = f"{module}.{kind}", shape if kind == "weight" else shape[-1:]
            yield name, theirs, unfolded.get(name, theirs)


def unread(tensors: dict[str, np.ndarray], config: GPTConfig, folder: Path) -> dict[str, Any]:
    """Return the tree of parameters, each a Parameter, of GPT2LMHeadModel's or GPT2Model's names.

    Raises UserError naming what is missing, unknown, or of another shape or dtype.
    """
    left: dict[str, np.ndarray] = {}
    for name, x in tensors.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the causal mask, not a parameter
        if name.removeprefix(PREFIX) in left:
            raise UserError(f"{folder} has {name!r:.60} with and without {PREFIX!r}: get it anew")
        left[name.removeprefix(PREFIX)] = x
    if config.n_layer > len(left):
        raise UserError(f"{folder} has {len(left)} tensors, too few for n_layer={config.n_layer}")
    head = left.pop("lm_head.weight", None)

    def take(name: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> np.ndarray:
        if name not in left:
            raise UserError(f"{folder} has no '{name}', which its config.json asks for")
        x = left.pop(name)
        if x.shape != theirs:
            raise UserError(
                f"{folder}: '{name}' has shape {x.shape}, its config.json says {theirs}"
            )
        if x.dtype.name not in ("float32", "float16", "bfloat16"):
            raise UserError(
                f"{folder}: '{name}' holds {x.dtype}, and weights are float32, float16 or bfloat16"
            )
        return x.reshape(ours)

    params: dict[str, Any] = {}
    for name, theirs, ours in layout(config):
        stacked, rest = name.startswith("h."), name.removeprefix("h.")
        names = [f"h.{i}.{rest}" for i in range(config.n_layer)] if stacked else [name]
        *modules, kind = name.split(".")
        node = params
        for module in modules:
            node = node.setdefault(module, {})
        node[kind] = Parameter([take(name, theirs, ours) for name in names], stacked)
    for name in left:
        raise UserError(
            f"{folder} has {name!r:.60}, which is no parameter of GPT-2's language model"
        )
    if head is not None and not same(head, params["wte"]["weight"].parts[0]):
        raise UserError(f"{folder}: 'lm_head.weight' is not 'wte.weight': they must be tied")
    return params


def same(a: np.ndarray, b: np.ndarray, rows: int = 1024) -> bool:
    """Return whether two tensors of a file hold the same, bit by bit, some rows at a time."""
    return (a.shape, a.dtype) == (b.shape, b.dtype) and all(
        a[i : i + rows].tobytes() == b[i : i + rows].tobytes() for i in range(0, len(a), rows)
    )
