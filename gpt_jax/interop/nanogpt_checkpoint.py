"""nanoGPT's ckpt.pt: read to go on from, and written for nanoGPT to go on from. Without PyTorch.

It holds model (a state_dict), optimizer (torch.optim.AdamW's: two groups, decayed or not, their
parameters numbered through), model_args, iter_num, best_val_loss and config.
"""

import math
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gpt_jax import checkpoint
from gpt_jax.config import GPTConfig, TrainConfig, typed
from gpt_jax.errors import DamageError, UserError
from gpt_jax.integrity import check_sizes, refuse_to_overwrite
from gpt_jax.interop import torch_file
from gpt_jax.interop.nanogpt import PREFIX, check_shapes, from_state_dict, shapes, state_dict_array
from gpt_jax.interop.torch_file import Tensor
from gpt_jax.model import GPT
from gpt_jax.optimizer import learning_rate, make_optimizer
from gpt_jax.prepare.dataset import for_dataset
from gpt_jax.prepare.mixture import sets_of
from gpt_jax.sharding import make_mesh, placed, state_sharding
from gpt_jax.tokenizer import Tokenizer, from_json
from gpt_jax.train_step import init_state

SIZES = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")  # resume keeps these
# train.py's settings, in its order
KEYS = """
    out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from
    wandb_log wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size block_size
    n_layer n_head n_embd dropout bias learning_rate max_iters weight_decay beta1 beta2 grad_clip
    decay_lr warmup_iters lr_decay_iters min_lr backend device dtype compile
""".split()  # noqa: SIM905
# not for a file to say: what to do, where to write, whom to tell, what this machine has
OURS = ("out_dir", "eval_only", "init_from", "wandb_log", "backend", "device", "dtype", "compile")
# the rest of a parameter group of torch.optim.AdamW
ADAMW = {
    "amsgrad": False, "maximize": False, "foreach": None, "capturable": False,
    "differentiable": False, "fused": None, "decoupled_weight_decay": True,
}  # fmt: skip
FLOAT32 = np.dtype("float32")
AS_OURS = {"eps": 1e-8, "amsgrad": False, "maximize": False}  # as optimizer.py has it
NEVER = 1e9  # nanoGPT's best_val_loss before its first evaluation
LARGEST = 2**31 - 1
MOST_PADDING = 1024  # rows of the embedding beyond the tokenizer's ids
LONGEST_NAME = 100  # characters of a tensor's name
MASK = ".attn.bias"  # no parameter; there where PyTorch had no scaled_dot_product_attention
PLAIN = (int, float, bool, str, type(None))


def is_one(source: str | os.PathLike[str]) -> bool:
    """Return whether a source of weights is named as a file of PyTorch's, as ckpt.pt is."""
    return os.fspath(source).endswith((".pt", ".pth")) and not os.path.isdir(source)


@dataclass(frozen=True)
class Checkpoint:
    """What a ckpt.pt says; its tensors are still in the file."""

    path: str
    model: dict[str, Tensor]  # by nanoGPT's names
    optimizer: Any
    network: dict[str, Any]  # model_args
    config: dict[str, Any]  # train.py's settings as far as they are the run's
    iter_num: int
    best_val_loss: float | None

    def model_config(self, dtype: str, n_tokens: int) -> GPTConfig:
        """Return the network's config; nanoGPT's GELU is the exact one."""
        return GPTConfig(**self.network, activation="gelu", dtype=dtype, n_tokens=n_tokens)

    def params(self) -> dict[str, Any]:
        """Return the parameters, numpy float32; UserError where they are not of model_args."""
        return self.tree(self.model)

    def moments(self) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
        """Return AdamW's count of updates, and its two moments by nanoGPT's names.

        `tree` makes parameters of each. Raises UserError where they are another optimizer's.
        """
        if self.optimizer is None:
            raise UserError(f"{self.path} has no optimizer: it can be sampled, not trained on")
        names = in_groups(self.model_config("float32", 0))
        try:
            groups, state = self.optimizer["param_groups"], self.optimizer["state"]
            numbers = [group["params"] for group in groups]
            if list(map(len, numbers)) != list(map(len, names)):
                raise ValueError("its groups are of other sizes")
            for group, (key, value) in product(groups, AS_OURS.items()):
                found = group.get(key, value)
                if type(found) not in PLAIN or found != value:
                    raise ValueError(f"{key} is not {value}")
            entries = [state[number] for number in chain(*numbers)]
            counts = {number_of("step", entry["step"]) for entry in entries}
            [count] = counts if len(counts) == 1 else [-1.0]
            if not (0 <= count <= LARGEST and count.is_integer()):
                raise ValueError("there is no one count of updates")
            first, second = (
                dict(zip(chain(*names), [entry[key] for entry in entries], strict=True))
                for key in ("exp_avg", "exp_avg_sq")
            )
            return int(count), first, second
        except UserError:
            raise
        except Exception as error:  # of what lies in the place of something else
            raise UserError(
                f"{self.path}: its optimizer is not nanoGPT's AdamW ({reason(error)}): it can be "
                "sampled, not trained on"
            ) from None

    def tree(self, arrays: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return tensors by nanoGPT's names as our parameters are, numpy float32."""
        config = self.model_config("float32", 0)
        try:
            refuse_other_dtypes(arrays)
            tree = from_state_dict(arrays, config)
        except UserError as error:
            raise of_file(self.path, error) from None
        # its own copy of all: XLA may write over what it is given
        return jax.tree.map(lambda x: x.astype(np.float32, copy=not x.flags.owndata), tree)


def read(path: str) -> Checkpoint:
    """Return what a ckpt.pt says, its sizes held against its tensors, of which none is read.

    Raises UserError for any other file.
    """
    saved = torch_file.load(path)
    try:
        state, network, iter_num = saved["model"], saved["model_args"], saved["iter_num"]
        config = {k: x for k, x in saved.get("config", {}).items() if k in KEYS and k not in OURS}
        for name, x in [*network.items(), *config.items(), ("iter_num", iter_num)]:
            if type(x) not in PLAIN:  # of others, made to have no end, not even the repr is safe
                raise ValueError(f"{name!r:.60} is a {type(x).__name__}")
        kinds = {f: GPTConfig.__dataclass_fields__[f].type for f in (*SIZES, "dropout")}
        unknown = [name for name in network if name not in kinds]
        if unknown:
            raise ValueError(f"model_args has {unknown[0]!r:.60}, which nanoGPT's network has not")
        network = {n: typed(n, network[n], kind) for n, kind in kinds.items() if n in network}
        missing = [name for name in SIZES if name not in network]
        if missing:
            raise ValueError(f"model_args has no {missing[0]!r}")
        odd = [n for n in state if not str(n).isprintable() or len(str(n)) > LONGEST_NAME]
        if odd:  # it would be quoted
            raise ValueError(f"it has a tensor {odd[0]!r:.60}")
        model = {str(n).removeprefix("_orig_mod."): x for n, x in state.items()}
        model = {n: x for n, x in model.items() if not n.endswith(MASK)}
        best = number_of("best_val_loss", saved["best_val_loss"])
        if type(iter_num) is not int or not 0 <= iter_num <= LARGEST:
            raise ValueError(f"iter_num={iter_num!r:.60}")
        # before anything is made for so many layers as are claimed
        if network["n_layer"] > len(model):
            raise ValueError(f"n_layer={network['n_layer']}, and it has {len(model)} tensors")
        rated = math.isfinite(best) and best < NEVER
        result = Checkpoint(
            path, model, saved.get("optimizer"), network, config, iter_num, best if rated else None
        )
        refuse_other_dtypes(model)
        untied = {n: x for n, x in model.items() if n != "lm_head.weight"}
        check_shapes(untied, result.model_config("float32", 0))
        return result
    except UserError as error:
        raise of_file(path, error) from None
    except Exception as error:  # of what lies in the place of something else
        raise UserError(
            f"{path} is not a checkpoint of nanoGPT's train.py ({reason(error)}): name its ckpt.pt"
        ) from None


def of_file(path: str, error: UserError) -> UserError:
    """Return an error that names the file it is of."""
    return error if str(error).startswith(path) else UserError(f"{path}: {error}")


def reason(error: Exception) -> str:
    """Return what is wrong with a file, in a part of a line."""
    ours = type(error) is ValueError
    text = str(error) if ours else f"{type(error).__name__}: {error!s:.80}"
    return f"{text if text.isprintable() else ascii(text):.200}"


def number_of(name: str, x: Any) -> float:
    """Return a number, or that of a tensor of one: PyTorch before 1.12 counted without tensors."""
    if isinstance(x, Tensor):
        if math.prod(x.shape) != 1:
            raise ValueError(f"{name} is of shape {x.shape}")
        return float(np.asarray(x).reshape(()))
    if type(x) not in (int, float):
        raise ValueError(f"{name} is a {type(x).__name__}")
    return float(x)


def refuse_other_dtypes(arrays: Mapping[str, Any]) -> None:
    """Raise UserError for the first that is no tensor, or would lose something as float32."""
    for name, x in arrays.items():
        if not (isinstance(x, Tensor) and x.dtype in ("float32", "bfloat16", "float16")):
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise UserError(f"'{name}' is {found}, not float32")


def in_groups(config: GPTConfig) -> list[list[str]]:
    """Return nanoGPT's names as its two groups have them: with weight decay, then without."""
    named = shapes(config)
    return [[n for n in named if (len(named[n]) >= 2) == decays] for decays in (True, False)]


def settings(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a run's settings, and those that its checkpoint forces, as TrainConfig has them."""
    saved = read(path)
    kinds = {f: TrainConfig.__dataclass_fields__[f].type for f in saved.config}
    config = {k: typed(k, x, kinds[k], f"{path}: ") for k, x in saved.config.items()}
    dataset_of(saved)
    forced = {name: saved.network[name] for name in SIZES if name != "vocab_size"}
    return config, {**forced, "activation": "gelu"}


def dataset_of(saved: Checkpoint) -> str:
    """Return the data set that a checkpoint was trained on; "openwebtext" where it does not say."""
    name = saved.config.get("dataset", "openwebtext")
    if any(Path(part).is_absolute() for part in re.split("[,:]", str(name))):
        raise UserError(f"{saved.path}: dataset={name!r:.60} leaves data_dir: prepare it there")
    return TrainConfig(dataset=name).dataset  # checked


def refuse_other_ids(saved: Checkpoint, tokenizer: Tokenizer, folder: Path) -> None:
    """Raise UserError where a checkpoint's ids cannot be those of a data set's tokenizer."""
    rows = saved.network["vocab_size"]
    # nanoGPT has a row for each symbol; it rounds GPT-2's vocabulary up
    most = 0 if tokenizer.spec["kind"] == "char" else MOST_PADDING
    if not 0 <= rows - tokenizer.n_tokens <= most:
        raise UserError(
            f"{saved.path} has vocab_size={rows}, but the {tokenizer.spec['kind']} tokenizer of "
            f"{folder} has {tokenizer.n_tokens} ids: put the meta.pkl that it was trained with "
            "there, or name another --data_dir"
        )


def place(mesh: Mesh, arrays: Any) -> Any:
    """Return parameters, or a moment of theirs, numpy arrays, laid out on a mesh."""
    return jax.tree.map(
        lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, x.__getitem__),
        arrays, state_sharding(mesh, arrays),
    )  # fmt: skip


def load(
    path: str, dtype: str, mesh: Mesh, data_dir: str = "data"
) -> tuple[GPT, dict[str, Any], Tokenizer]:
    """Return (model, params, tokenizer) of a ckpt.pt, the params laid out on a mesh.

    A ckpt.pt holds no tokenizer. As for nanoGPT's sample.py it is that of DATA_DIR/DATASET, where
    there is a meta.json or meta.pkl, and else GPT-2's.
    """
    saved = read(path)
    folder = Path(data_dir) / next(iter(sets_of(dataset_of(saved))))  # a mixture's have one
    tokenizer, _, _ = for_dataset(folder)
    refuse_other_ids(saved, tokenizer, folder)
    model = GPT(saved.model_config(dtype, tokenizer.n_tokens))
    return model, place(mesh, saved.params()), tokenizer


# ---- for nanoGPT to go on from


def export(out_dir: str, step: str, destination: Path, *, optimizer: bool = True) -> list[str]:
    """Write a run's checkpoint as nanoGPT's ckpt.pt; return what to say of it, in lines.

    ``step`` is "best", "latest", a number or "", as load's. ``destination`` is a folder, for
    nanoGPT an out_dir; or the file itself, named .pt. By characters, the run's symbols go beside it
    as meta.pkl. Without ``optimizer`` sample.py can use it, but train.py cannot resume. Raises
    UserError where a file is there already, or nanoGPT has no such network.
    """
    file = destination if destination.suffix == ".pt" else destination / "ckpt.pt"
    refuse_to_overwrite(file)
    for number in (candidates := checkpoint.choose(out_dir, step)):
        try:
            meta, network, state = restored(out_dir, number, optimizer)
            break
        except DamageError as error:
            if number == candidates[-1]:
                raise
            print(f"passed over: {error}", file=sys.stderr)
    else:
        raise AssertionError
    config, tokenizer = run_config(meta), from_json(meta["tokenizer"])
    char = tokenizer.spec["kind"] == "char"
    symbols_file = file.with_name("meta.pkl")
    if char:
        symbols = torch_file.pickled(meta_of(tokenizer))
        if not (symbols_file.is_file() and symbols_file.read_bytes() == symbols):
            refuse_to_overwrite(symbols_file)
    torch_file.save(file, contents(meta, config, network, state, optimizer))
    said = [f"{file}: iteration {meta['iter']} of {out_dir}"]
    if char:
        symbols_file.write_bytes(symbols)
        place = f"data/{config.dataset}/meta.pkl"
        said.append(f"{symbols_file}: its symbols; nanoGPT's sample.py looks for them in {place}")
    elif tokenizer.spec != {"kind": "tiktoken", "name": "gpt2"}:
        kind = tokenizer.spec["kind"]
        said.append(f"nanoGPT knows no {kind} tokenizer: its sample.py will take ids for GPT-2's")
    if not optimizer:
        said.append("no optimizer: nanoGPT's sample.py can use it, --init_from=resume cannot")
    return said


def restored(out_dir: str, step: int, optimizer: bool) -> tuple[dict[str, Any], GPTConfig, Any]:
    """Return the JSON, the network and the state of a run's checkpoint, on one device.

    Of the state only the parameters are restored where the ``optimizer`` is not asked for.
    """
    meta = checkpoint.read_meta(out_dir, step)
    try:
        network = GPTConfig(**meta["model"])
    except TypeError as error:
        raise UserError(f"the checkpoint's model is of another version: {error}") from None
    if network.activation != "gelu":
        raise UserError(
            f"activation={network.activation!r} in {out_dir}, but nanoGPT's network has only the "
            "exact 'gelu' and would compute something else: export it to another form"
        )
    path = checkpoint.folder(out_dir) / str(step)
    check_sizes(path / "params", network)

    def first() -> Any:
        params = GPT(network).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        return init_state(params, make_optimizer(run_config(meta)))

    like: Any = placed(make_mesh(devices=jax.local_devices()[:1]), jax.eval_shape(first))
    if optimizer:
        return meta, network, checkpoint.restore(out_dir, step, like, meta)
    params = checkpoint.restore_tree(path, "params", like.params, meta)
    return meta, network, like.replace(params=params)


def run_config(meta: dict[str, Any]) -> TrainConfig:
    """Return the config that a checkpoint's JSON has of its run."""
    known = TrainConfig.__dataclass_fields__
    return TrainConfig(**{k: x for k, x in meta["config"].items() if k in known})


def contents(
    meta: dict[str, Any], config: TrainConfig, network: GPTConfig, state: Any, optimizer: bool
) -> dict[str, Any]:
    """Return what nanoGPT's train.py would have saved, its arrays still to be read."""

    def tensor(params: Any, name: str) -> Tensor:
        return Tensor(shapes(network)[name], FLOAT32, lambda: state_dict_array(params, name))

    def scalar(x: Any) -> Tensor:
        return Tensor((), FLOAT32, lambda: np.asarray(x, np.float32))

    model = OrderedDict((name, tensor(state.params, name)) for name in shapes(network))
    model["lm_head.weight"] = model[PREFIX + "wte.weight"]
    result: dict[str, Any] = {"model": model}
    if optimizer:
        [adam] = filter(is_adam, jax.tree.leaves(state.opt_state, is_leaf=is_adam))
        groups = in_groups(network)
        result["optimizer"] = {
            # a count each: as one tensor, every parameter would add to it
            "state": {
                i: {"step": scalar(adam.count), "exp_avg": tensor(adam.mu, name),
                    "exp_avg_sq": tensor(adam.nu, name)}
                for i, name in enumerate(chain(*groups))
            },
            "param_groups": [
                {"weight_decay": decay, "lr": learning_rate(config, meta["iter"]),
                 "betas": (config.beta1, config.beta2), "eps": 1e-8, **ADAMW,
                 "params": list(range(first, first + len(group)))}
                for decay, first, group in zip(
                    (config.weight_decay, 0.0), (0, len(groups[0])), groups, strict=True
                )
            ],
        }  # fmt: skip
    best = meta["best_val_loss"]
    return result | {
        "model_args": {name: getattr(network, name) for name in (*SIZES, "dropout")},
        "iter_num": meta["iter"],
        "best_val_loss": scalar(NEVER if best is None else best),
        "config": {name: getattr(config, name) for name in KEYS}
        | in_nanogpts_words(config, network),
    }


def in_nanogpts_words(config: TrainConfig, network: GPTConfig) -> dict[str, str]:
    """Return the settings of which we have more kinds than nanoGPT."""
    known = config.init_from == "resume" or config.init_from.startswith("gpt2")
    return {
        "device": "cpu" if config.device == "cpu" else "cuda",
        "dtype": network.dtype,
        "init_from": config.init_from if known else "scratch",
    }


def is_adam(x: Any) -> bool:
    """Return whether this is Adam's part of an optimizer's state: the count and the moments."""
    return isinstance(x, optax.ScaleByAdamState)


def with_adam(opt_state: Any, **fields: Any) -> Any:
    """Return an optimizer's state with other ``count``, ``mu`` or ``nu``."""
    return jax.tree.map(
        lambda x: x._replace(**fields) if is_adam(x) else x, opt_state, is_leaf=is_adam
    )


def meta_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what nanoGPT's prepare.py writes to meta.pkl of a tokenizer by characters."""
    symbols = [tokenizer.token_bytes(i).decode() for i in range(tokenizer.n_tokens)]
    return {
        "vocab_size": len(symbols),
        "itos": dict(enumerate(symbols)),
        "stoi": {symbol: i for i, symbol in enumerate(symbols)},
    }
