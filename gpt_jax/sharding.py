"""Which device holds what: the mesh, and the layout of the state and of a batch over it.

The mesh has three axes. The rows of a batch are spread over "data" and "fsdp"; the parameters and
the optimizer's moments are cut along "fsdp" (gathered where they are used: Zhao et al. 2023,
"PyTorch FSDP") and along "tensor" (never gathered: Shoeybi et al. 2019, "Megatron-LM"). XLA adds
the communication; all it is told is in this file.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gpt_jax import kernels
from gpt_jax.config import TrainConfig
from gpt_jax.errors import UserError

ROWS = ("data", "fsdp")

# every parameter: its axes, by the letters of model.py (q, k and v are the axis 3), and the axes of
# the mesh that cut each
LAYOUT: dict[str, dict[str, Any]] = {
    "wte/weight": {"V": "tensor", "C": "fsdp"},
    "wpe/weight": {"T": None, "C": "fsdp"},
    "h/ln_1/weight": {"L": None, "C": "fsdp"},
    "h/ln_1/bias": {"L": None, "C": "fsdp"},
    "h/attn/c_attn/weight": {"L": None, "C": "fsdp", "3": None, "H": "tensor", "D": None},
    "h/attn/c_attn/bias": {"L": None, "3": None, "H": "tensor", "D": "fsdp"},
    "h/attn/c_proj/weight": {"L": None, "H": "tensor", "D": None, "C": "fsdp"},
    "h/attn/c_proj/bias": {"L": None, "C": "fsdp"},
    "h/ln_2/weight": {"L": None, "C": "fsdp"},
    "h/ln_2/bias": {"L": None, "C": "fsdp"},
    "h/mlp/c_fc/weight": {"L": None, "C": "fsdp", "F": "tensor"},
    "h/mlp/c_fc/bias": {"L": None, "F": ("tensor", "fsdp")},
    "h/mlp/c_proj/weight": {"L": None, "F": "tensor", "C": "fsdp"},
    "h/mlp/c_proj/bias": {"L": None, "C": "fsdp"},
    "ln_f/weight": {"C": "fsdp"},
    "ln_f/bias": {"C": "fsdp"},
}
# any other axis that does not divide stays whole: a vocabulary of 65, say
MUST_DIVIDE = {"C": "n_embd", "H": "n_head"}


def make_mesh(
    device: str = "auto", data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Any = None
) -> Mesh:
    """Return a mesh of these sizes over all devices of the platform in use, or the one of "cuda:1".

    One of the sizes may be -1: what the others leave. Where there are several slices or nodes,
    "tensor" is kept within one, and "fsdp" where it can. Raises UserError where they do not fit.
    """
    devices = jax.devices() if devices is None else devices
    if ":" in device:
        index = int(device.split(":")[1])
        if index >= len(devices):
            raise UserError(f"device={device}, but there are {len(devices)} devices, from 0 on")
        devices = devices[index : index + 1]
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    asked = " ".join(f"--{k}={n}" for k, n in sizes.items() if n != (-1 if k == "data" else 1))
    known = math.prod(size for size in sizes.values() if size != -1)
    if 0 in sizes.values() or list(sizes.values()).count(-1) > 1:
        raise UserError(f"{asked}: each must be 1 or more, or one -1 for the rest (default: data)")
    sizes = {name: len(devices) // known if n == -1 else n for name, n in sizes.items()}
    n = math.prod(sizes.values())
    all_needed = -1 in (data, fsdp, tensor) or len({d.process_index for d in devices}) > 1
    if n > len(devices) or n == 0 or (n < len(devices) and all_needed):
        raise UserError(
            f"{asked} does not fit the number of devices, {len(devices)}: give sizes of that "
            f"product, or on a CPU set XLA_FLAGS=--xla_force_host_platform_device_count={known} (a "
            "resumed run keeps its sizes where no others are given)"
        )
    grid = device_grid(tuple(sizes.values()), devices[:n])
    # Auto and not make_mesh's default: linen looks up sharded tables under it
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * 3)


def device_grid(sizes: tuple[int, ...], devices: Any) -> np.ndarray:
    """Return the devices as an array of these sizes, neighbours in the network next to each other.

    Raises UserError where "tensor" would have to reach across slices or nodes.
    """
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    across_data = math.gcd(sizes[0], slices)
    across = (across_data, slices // across_data, 1)
    within = [size // n for size, n in zip(sizes, across, strict=True)]
    if sizes[1] % across[1]:
        raise UserError(
            f"--tensor={sizes[2]} would reach across {slices} slices or nodes of "
            f"{len(devices) // slices} devices: give a --tensor and --fsdp that fit in one"
        )
    may_split: Any = {"allow_split_physical_axes": True}
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, **may_split)
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, **may_split)


def spec(mesh: Mesh, path: Any, leaf: Any) -> PartitionSpec:
    """Return how the table cuts the leaf of a tree that ends in parameters' names; others: whole.

    Raises UserError where a size does not divide.
    """
    name = "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
    shape, cuts = leaf.shape if name else (), []
    for (letter, axes), size in zip(LAYOUT[name].items() if name else (), shape, strict=True):
        parts = math.prod(mesh.shape[axis] for axis in np.atleast_1d(axes)) if axes else 1
        if size % parts and letter in MUST_DIVIDE:
            fits = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
            raise UserError(
                f"--{axes}={parts} does not divide {MUST_DIVIDE[letter]}={size} ({name}): {fits} do"
            )
        cuts.append(None if size % parts else axes)
    return PartitionSpec(*cuts)


def state_sharding(mesh: Mesh, tree: Any) -> Any:
    """Return the layout of each leaf of parameters, optimizer state or TrainState, by the table.

    The leaves need only a shape, as from jax.eval_shape. Raises UserError where a size does not
    divide.
    """

    def sharding(path, leaf):
        return NamedSharding(mesh, spec(mesh, path, leaf))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def placed(mesh: Mesh, tree: Any) -> Any:
    """Return a tree of shapes with the layout of each leaf, as Orbax and jit take them."""
    return jax.tree.map(lambda x, s: x.update(sharding=s), tree, state_sharding(mesh, tree))


def sums_apart(mesh: Mesh) -> bool:
    """Return whether each device can sum up its own rows by itself: it holds all parameters."""
    return mesh.size == mesh.shape["data"]


def total_loss(mesh: Mesh | None, model: Any, params: Any, *batch: Any, rngs: Any = None) -> Any:
    """Return model.total_loss of a batch, inside jit, with the two hints that XLA needs on a mesh.

    Embeddings are gathered ahead of their use, and what comes out of a block keeps its rows where
    they are. Else activations would be cut along C, and every product after that would sum them
    instead of gathering its weight.
    """
    if mesh is None or sums_apart(mesh):
        return model.apply({"params": params}, *batch, rngs=rngs, method="total_loss")
    rows = NamedSharding(mesh, PartitionSpec(ROWS))
    model = kernels.without(model)

    def keep_rows(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if type(context.module).__name__ == "Block":
            return jax.lax.with_sharding_constraint(y[0], rows), y[1]
        return y

    variables = {"params": gathered(mesh, params)}
    with nn.intercept_methods(keep_rows):
        return model.apply(variables, *batch, rngs=rngs, devices=mesh.size, method="total_loss")


def gathered(mesh: Mesh, params: Any) -> Any:
    """Return params, inside jit, with the embeddings gathered along "fsdp"."""

    def gather(path, table):
        cut = spec(mesh, path, table)
        whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in cut))

        @jax.custom_vjp
        def use(table):
            return jax.lax.with_sharding_constraint(table, NamedSharding(mesh, whole))

        def backward(_, gradient):
            # cut again at once: a reduce-scatter, not an all-reduce. Over more axes than "fsdp" XLA
            # would hand the whole batch's gradient to every device instead
            layout = cut if mesh.size == mesh.shape["fsdp"] else whole
            return (jax.lax.with_sharding_constraint(gradient, NamedSharding(mesh, layout)),)

        use.defvjp(lambda table: (use(table), None), backward)
        return use(table)

    tables = {name: params[name] for name in ("wte", "wpe")}
    return {**params, **jax.tree_util.tree_map_with_path(gather, tables)}


def reduced_once(mesh: Mesh | None, sums_of: Callable) -> Callable:
    """Return ``f(params, tokens, targets)``: the sums over rows of sums_of(..., shard) on a mesh.

    tokens and targets are (A, B, T). Devices that can sum up their rows apart do so, ``shard`` (1,)
    being the number of each, and their sums are added once: by itself XLA would add them in each
    of the A steps.
    """
    if mesh is None or mesh.size == 1 or not sums_apart(mesh):
        return lambda *batch: sums_of(*batch, np.zeros(1, np.int32))
    rows, whole = PartitionSpec(None, "data"), PartitionSpec()
    each = jax.shard_map(
        lambda *batch: jax.lax.psum(sums_of(*batch), "data"),
        mesh=mesh,
        in_specs=(whole, rows, rows, PartitionSpec("data")),
        out_specs=whole,
        check_vma=False,
    )
    return lambda *batch: each(*batch, np.arange(mesh.size, dtype=np.int32))


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    """Return the layout of a batch (..., B, T): rows spread over "data" and "fsdp"."""
    return NamedSharding(mesh, PartitionSpec(*[None] * (ndim - 2), ROWS, None))


def row_shards(mesh: Mesh) -> int:
    """Return the number of parts that the rows of a batch are spread over."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def micro_batches(config: TrainConfig, mesh: Mesh) -> tuple[int, int]:
    """Return (A, B), accumulation steps and rows of a micro-batch over all devices.

    A * B is the same whatever the mesh: its row shards take accumulation steps first, as nanoGPT's
    processes do, then rows. Raises UserError where the rows do not divide.
    """
    steps, rows, shards = config.gradient_accumulation_steps, config.batch_size, row_shards(mesh)
    shared = math.gcd(steps, shards)
    if rows * shared % shards:
        raise UserError(
            f"batch_size={rows} x gradient_accumulation_steps={steps} cannot be shared by "
            f"{shards} devices (data x fsdp): make batch_size a multiple of {shards // shared}"
        )
    return steps // shared, rows * shared
