"""The mesh, the table of layouts, and how devices share an update."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gpt_jax.config import GPTConfig, TrainConfig
from gpt_jax.errors import UserError
from gpt_jax.model import GPT
from gpt_jax.optimizer import make_optimizer
from gpt_jax.reporting import describe
from gpt_jax.sharding import (
    LAYOUT,
    batch_sharding,
    gathered,
    make_mesh,
    micro_batches,
    placed,
    state_sharding,
)
from gpt_jax.start import first_state
from gpt_jax.train_step import init_state

SIZES = {"n_layer": 2, "n_head": 8, "n_embd": 64, "block_size": 16, "vocab_size": 96}


def shapes_of(bias=True, **sizes):
    """The shapes of a real TrainState."""
    model = GPT(GPTConfig(**{**SIZES, "bias": bias, **sizes}))

    def first():
        params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        return init_state(params, make_optimizer(TrainConfig()))

    return jax.eval_shape(first)


def named(tree):
    """Parameter path -> leaves, of a whole TrainState or of parameters."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        found.setdefault("/".join(names), []).append(leaf)
    return found


# --- the mesh


def sizes_of(mesh):
    return tuple(mesh.shape[name] for name in ("data", "fsdp", "tensor"))


def test_a_mesh_is_over_all_devices_or_the_one_named():
    assert list(make_mesh().devices.flat) == jax.devices()
    assert list(make_mesh("cpu").devices.flat) == jax.devices()
    assert list(make_mesh("cuda:3").devices.flat) == [jax.devices()[3]]
    mesh = make_mesh()
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((-1, 4, 1), (2, 4, 1)),
        ((1, -1, 2), (1, 4, 2)),
        ((2, 2, -1), (2, 2, 2)),
        ((8, 1, 1), (8, 1, 1)),
        ((1, 1, 1), (1, 1, 1)),  # fewer than there are: the first of them
        ((2, 2, 1), (2, 2, 1)),
    ],
)
def test_one_size_of_a_mesh_may_be_left_to_the_devices(asked, sizes):
    mesh = make_mesh("auto", *asked)
    assert sizes_of(mesh) == sizes
    assert list(mesh.devices.flat) == jax.devices()[: mesh.size]


@pytest.mark.parametrize(
    "asked",
    [(16, 1, 1), (4, 4, 1), (-1, 3, 1), (-1, 5, 1), (-1, 16, 1), (3, -1, 1), (-1, 1, 7), (1, 1, 9)],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused_with_its_sizes(asked):
    named = zip(("data", "fsdp", "tensor"), asked, (-1, 1, 1), strict=True)
    words = " ".join(f"--{name}={size}" for name, size, default in named if size != default)
    with pytest.raises(UserError) as error:
        make_mesh("auto", *asked)
    assert str(error.value).startswith(f"{words} does not fit the number of devices, 8: ")


def test_sizes_for_more_devices_than_there_are_name_the_way_to_more_on_a_cpu():
    with pytest.raises(UserError, match=r"or on a CPU set XLA_FLAGS=--xla_force_host_.*_count=12 "):
        make_mesh("auto", fsdp=6, tensor=2, devices=jax.devices()[:1])


@pytest.mark.parametrize("asked", [(0, 1, 1), (-1, -1, 1), (-1, 0, 1), (-1, 1, -1)])
def test_a_size_of_nothing_and_two_left_open_are_refused(asked):
    with pytest.raises(UserError, match="or one -1 for the rest"):
        make_mesh("auto", *asked)


def test_a_device_that_is_not_there_is_refused_with_the_number_there_are():
    with pytest.raises(UserError, match=re.escape("device=cuda:9, but there are 8 devices")):
        make_mesh("cuda:9")
    with pytest.raises(UserError, match="device=cuda:8"):
        make_mesh("cuda:8")


@dataclasses.dataclass(frozen=True)
class Gpu:
    id: int
    slice_index: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "x"


def machines(n, each):
    """The GPUs of n machines."""
    return [Gpu(i, i // each, i // each) for i in range(n * each)]


@pytest.mark.parametrize(
    "asked", [(-1, 1, 1), (-1, 4, 1), (-1, 1, 4), (2, 2, 2), (-1, 2, 2), (4, 1, 2)]
)
def test_fsdp_and_tensor_stay_within_a_slice_where_data_can_span_them(asked):
    mesh = make_mesh("auto", *asked, devices=machines(2, 4))
    for copy in mesh.devices:
        assert len({d.slice_index for d in copy.flat}) == 1
    assert len({d.id for d in mesh.devices.flat}) == 8


def test_fsdp_reaches_across_slices_only_when_asked_to_and_tensor_never():
    mesh = make_mesh("auto", 1, 8, 1, devices=machines(2, 4))
    assert [d.slice_index for d in mesh.devices.flat] == [0, 0, 0, 0, 1, 1, 1, 1]
    mesh = make_mesh("auto", 1, 4, 2, devices=machines(2, 4))
    for pair in mesh.devices.reshape(4, 2):
        assert len({d.slice_index for d in pair}) == 1
    with pytest.raises(UserError, match="--tensor=8 would reach across 2 slices or nodes of 4"):
        make_mesh("auto", 1, 1, 8, devices=machines(2, 4))


def test_all_hosts_must_be_in_the_mesh():
    with pytest.raises(
        UserError, match="does not fit the number of devices, 8: give sizes of that product"
    ):
        make_mesh("auto", 1, 4, 1, devices=machines(2, 4))


def test_a_mesh_describes_itself():
    assert describe(make_mesh("cpu:0")) == "1 x cpu"
    assert describe(make_mesh(fsdp=2, tensor=2)) == "8 x cpu (data 2, fsdp 2, tensor 2)"


# --- the table


@pytest.mark.parametrize("bias", [True, False])
def test_every_parameter_and_moment_matches_a_row_and_each_row_its_letters(bias):
    letters = {"L": 2, "C": 64, "H": 8, "D": 8, "F": 256, "V": 96, "T": 16, "3": 3}
    state = shapes_of(bias)
    leaves = named(state)
    whole = leaves.pop("")  # counters, the key, the loss scale, what spikes are held against
    assert sum(leaf.size for leaf in whole) < 300
    rows = {name for name in LAYOUT if bias or not name.endswith("bias")}
    assert set(leaves) == rows
    for name, found in leaves.items():
        assert len(found) == 3  # the parameter and its two moments
        for leaf in found:
            assert leaf.shape == tuple(letters[letter] for letter in LAYOUT[name])


@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2), (1, 1, 8), (1, 4, 2)], ids=str)
def test_no_device_holds_more_than_its_part_of_any_parameter_or_moment(mesh):
    """Under fsdp=8 an eighth of each leaf, whatever its size."""
    mesh = make_mesh("auto", *mesh)
    for name, found in named(placed(mesh, shapes_of())).items():
        for leaf in found if name else []:
            axes = [axis for axes in LAYOUT[name].values() for axis in np.atleast_1d(axes) if axis]
            parts = np.prod([mesh.shape[axis] for axis in axes])
            shard = leaf.sharding.shard_shape(leaf.shape)
            assert np.prod(shard) * parts == np.prod(leaf.shape), name
            if mesh.shape["fsdp"] == 8:
                assert parts == 8


def test_a_state_is_born_in_its_parts():
    """As train.py makes it: no device ever holds more than an eighth, random numbers included."""
    model = GPT(GPTConfig(**SIZES, bias=True))
    first = first_state(TrainConfig(), model)
    mesh, shapes = make_mesh(fsdp=8), jax.eval_shape(first)
    compiled = jax.jit(first, out_shardings=state_sharding(mesh, shapes)).lower().compile()
    for name, found in named(compiled().params).items():
        assert all(x.addressable_shards[0].data.size * 8 == x.size for x in found), name
    sizes = compiled.memory_analysis()
    largest = max(4 * x.size for x in jax.tree.leaves(shapes.params))
    assert sizes.temp_size_in_bytes < largest


@pytest.mark.parametrize(
    ("mesh", "sizes", "said"),
    [
        ((1, 8, 1), {"n_embd": 36, "n_head": 4},
         r"--fsdp=8 does not divide n_embd=36 \([a-z0-9_/]+\): 1, 2, 3, 4, 6, 9, 12, 18, 36 do"),
        ((1, 1, 8), {"n_head": 4},
         r"--tensor=8 does not divide n_head=4 \(h/attn/c_[a-z0-9_/]+\): 1, 2, 4 do"),
    ],
)  # fmt: skip
def test_a_size_that_does_not_divide_is_refused_with_path_axis_and_size(mesh, sizes, said):
    with pytest.raises(UserError) as error:
        state_sharding(make_mesh("auto", *mesh), shapes_of(**sizes))
    assert re.fullmatch(said, str(error.value))


def test_a_vocabulary_that_does_not_divide_stays_whole():
    """65 characters: no other size of the network depends on it."""
    mesh = make_mesh(tensor=8)
    leaf = placed(mesh, shapes_of(vocab_size=65)).params["wte"]["weight"]
    assert leaf.sharding.shard_shape(leaf.shape) == (65, 64)


def test_a_batch_is_spread_over_data_and_fsdp_and_no_row_over_tensor():
    mesh = make_mesh(fsdp=2, tensor=2)
    for shape, part in (((16, 4), (4, 4)), ((3, 8, 4), (3, 2, 4))):
        x = np.arange(np.prod(shape)).reshape(shape)
        placed = jax.device_put(x, batch_sharding(mesh, len(shape)))
        assert {shard.data.shape for shard in placed.addressable_shards} == {part}
        np.testing.assert_array_equal(placed, x)


def test_only_the_embeddings_are_gathered_ahead_of_their_use():
    mesh = make_mesh(fsdp=4, tensor=2)
    params = shapes_of().params
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
    params = jax.device_put(params, state_sharding(mesh, params))
    used = jax.jit(lambda params: gathered(mesh, params))(params)
    wte = used["wte"]["weight"]
    assert wte.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("tensor")), 2)
    assert used["wpe"]["weight"].sharding.is_fully_replicated
    assert jax.tree.all(
        jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim),
                     used["h"], params["h"])
    )  # fmt: skip


# --- how devices share an update


def shared(steps, rows, devices):
    config = TrainConfig(gradient_accumulation_steps=steps, batch_size=rows)
    return micro_batches(config, SimpleNamespace(shape={"data": devices, "fsdp": 1, "tensor": 7}))


@pytest.mark.parametrize(
    ("steps", "rows", "devices", "expected"),
    [
        (40, 12, 1, (40, 12)),
        (40, 12, 8, (5, 96)),  # nanoGPT's own: 5 steps on each of 8 processes
        (5, 12, 4, (5, 12)),  # no steps to take: rows are spread instead
        (6, 4, 4, (3, 8)),  # half the devices' share from steps, half from rows
        (1, 64, 8, (1, 64)),
        (8, 1, 8, (1, 8)),
        (3, 2, 6, (1, 6)),
    ],
)
def test_devices_take_accumulation_steps_first_then_rows(steps, rows, devices, expected):
    """T2: the global batch does not depend on the number of devices."""
    assert shared(steps, rows, devices) == expected


def test_every_sharing_keeps_the_global_batch_and_divides_evenly_or_is_refused():
    """T2, T3."""
    for steps in range(1, 13):
        for rows in range(1, 13):
            for devices in range(1, 17):
                try:
                    A, B = shared(steps, rows, devices)
                except UserError:
                    assert (steps * rows) % devices  # no sharing would do
                else:
                    assert steps * rows == A * B
                    assert B % devices == 0
                    assert steps % A == 0


def test_a_batch_that_cannot_be_shared_is_refused_with_its_numbers():
    with pytest.raises(UserError) as error:
        shared(6, 5, 8)
    assert str(error.value) == (
        "batch_size=5 x gradient_accumulation_steps=6 cannot be shared by 8 devices "
        "(data x fsdp): make batch_size a multiple of 4"
    )
    assert shared(6, 4, 8) == (3, 8)  # the remedy is one


def test_fsdp_shares_rows_as_data_does_and_tensor_does_not():
    config = TrainConfig(gradient_accumulation_steps=40, batch_size=12)
    assert micro_batches(config, make_mesh()) == (5, 96)
    assert micro_batches(config, make_mesh(fsdp=8)) == (5, 96)
    assert micro_batches(config, make_mesh(fsdp=2, tensor=2)) == (10, 48)


def test_the_preset_of_gpt2_keeps_its_half_million_tokens_on_any_machine():
    """T3."""
    config = dataclasses.replace(TrainConfig(), gradient_accumulation_steps=40, batch_size=12)
    for devices in (1, 2, 4, 5, 8, 16, 24, 32, 96):
        mesh = SimpleNamespace(shape={"data": devices, "fsdp": 1, "tensor": 1})
        A, B = micro_batches(config, mesh)
        assert A * B * config.block_size == 491_520
