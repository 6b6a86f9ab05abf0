"""nanoGPT's state_dict, as numpy arrays, to our parameters and back.

The names are the same; what differs is layout. nanoGPT keeps a layer's tensors apart, we stack
them on a leading L; PyTorch's Linear holds (out, in), we hold (in, out), with the heads unfolded:
c_attn (C, 3, H, D) and attention's c_proj (H, D, C).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gpt_jax.config import GPTConfig
from gpt_jax.errors import UserError

PREFIX = "transformer."
LAYER = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Return nanoGPT's names with their shapes, in nanoGPT's order, without the tied lm_head."""
    C = config.n_embd
    layer = {"ln_1": (C,), "attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "ln_2": (C,),
             "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}  # fmt: skip
    modules = {
        f"h.{i}.{name}": shape for i in range(config.n_layer) for name, shape in layer.items()
    }
    result = {"wte.weight": (config.vocab_size, C), "wpe.weight": (config.block_size, C)}
    for name, shape in {**modules, "ln_f": (C,)}.items():
        result[f"{name}.weight"] = shape
        if config.bias:
            result[f"{name}.bias"] = shape[:1]
    return {PREFIX + name: shape for name, shape in result.items()}


def check_shapes(arrays: Mapping[str, Any], config: GPTConfig) -> None:
    """Raise UserError for the first of these that is missing, unknown or of another shape."""
    expected = shapes(config)
    for name in [*expected, *arrays]:
        if name not in arrays:
            raise UserError(f"the state_dict has no '{name}', which this model config needs")
        if name not in expected:
            raise UserError(f"the state_dict has '{name}', which this model config does not")
        if arrays[name].shape != expected[name]:
            shape = arrays[name].shape
            raise UserError(f"'{name}' has shape {shape}, the model config {expected[name]}")


def from_state_dict(arrays: Mapping[str, Any], config: GPTConfig) -> dict[str, Any]:
    """Return parameters from nanoGPT's names and numpy arrays; dtypes are kept.

    torch.compile's "_orig_mod." is taken off; "lm_head.weight", which is tied to wte, may be there
    or not. Raises UserError naming what is missing, unknown or of another shape than config's.
    """
    arrays = {name.removeprefix("_orig_mod."): np.asarray(x) for name, x in arrays.items()}
    head = arrays.pop("lm_head.weight", None)
    check_shapes(arrays, config)
    if head is not None and not np.array_equal(head, arrays[PREFIX + "wte.weight"], equal_nan=True):
        raise UserError("'lm_head.weight' differs from 'transformer.wte.weight': they must be tied")

    H, C = config.n_head, config.n_embd
    unfolded = {"c_attn": (C, 3, H, C // H), "attn.c_proj": (H, C // H, C)}

    def leaf(name: str) -> np.ndarray:
        x = arrays[PREFIX + name]
        x = x.T if x.ndim == 2 and not name.startswith(("wte", "wpe")) else x
        for module, shape in unfolded.items():
            if f"{module}.weight" in name:
                return x.reshape(shape)
        return x.reshape(3, H, C // H) if "c_attn.bias" in name else x

    params: dict[str, Any] = {}
    for name in ("wte", "wpe", *(f"h.{module}" for module in LAYER), "ln_f"):
        *parents, module = name.split(".")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[module] = {
            kind: np.stack([leaf(f"h.{i}{name[1:]}.{kind}") for i in range(config.n_layer)])
            if parents
            else leaf(f"{name}.{kind}")
            for kind in ("weight", "bias")
            if kind == "weight" or (config.bias and not name.startswith("w"))
        }
    return params


def to_state_dict(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return nanoGPT's names and numpy arrays, lm_head included, in nanoGPT's order."""
    layers = range(params["h"]["ln_1"]["weight"].shape[0])
    modules = ["wte", "wpe", *(f"h.{i}.{name}" for i in layers for name in LAYER), "ln_f"]
    kinds = ("weight", "bias") if "bias" in params["ln_f"] else ("weight",)
    names = [
        f"{PREFIX}{module}.{kind}"
        for module in modules
        for kind in (kinds if module not in ("wte", "wpe") else ("weight",))
    ]
    result = {name: state_dict_array(params, name) for name in names}
    return {**result, "lm_head.weight": result[PREFIX + "wte.weight"]}


def state_dict_array(params: Mapping[str, Any], name: str) -> np.ndarray:
    """Return the array that nanoGPT has under a name, of our parameters or a moment of theirs."""
    *modules, kind = name.removeprefix(PREFIX).split(".")
    node: Any = params
    for module in modules:
        node = node if module.isdecimal() else node[module]
    x = np.asarray(node[kind][int(modules[1])] if modules[0] == "h" else node[kind])
    if kind == "bias":
        return x.reshape(-1)
    if not modules[-1].startswith("c_"):
        return x
    inputs = 2 if modules[-2:] == ["attn", "c_proj"] else 1
    flat = x.reshape(int(np.prod(x.shape[:inputs])), -1)  # (in, out)
    return np.ascontiguousarray(flat.T)
