"""The mesh, the layouts, and how devices share an update."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from gpt_jax.config import TrainConfig
from gpt_jax.errors import UserError
from gpt_jax.sharding import (
    batch_sharding,
    make_mesh,
    micro_batches,
    state_sharding,
    use_platform,
)


def shared(steps, rows, devices):
    config = TrainConfig(gradient_accumulation_steps=steps, batch_size=rows)
    return micro_batches(config, SimpleNamespace(size=devices))


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
        "batch_size=5 x gradient_accumulation_steps=6 cannot be shared by 8 devices: "
        "make batch_size a multiple of 4"
    )
    assert shared(6, 4, 8) == (3, 8)  # the remedy is one


def test_a_mesh_is_over_all_devices_or_the_one_named():
    assert make_mesh().devices.tolist() == jax.devices()
    assert make_mesh("cpu").devices.tolist() == jax.devices()
    assert make_mesh("cuda:3").devices.tolist() == [jax.devices()[3]]
    mesh = make_mesh()
    assert mesh.axis_names == ("data",)
    assert mesh.axis_types == (AxisType.Auto,)


def test_a_device_that_is_not_there_is_refused_with_the_number_there_are():
    with pytest.raises(UserError, match=re.escape("device=cuda:9, but there are 8 devices")):
        make_mesh("cuda:9")
    with pytest.raises(UserError, match="device=cuda:8"):
        make_mesh("cuda:8")


def test_rows_are_spread_and_the_state_is_whole_on_every_device():
    mesh = make_mesh()
    for shape, part in (((16, 4), (2, 4)), ((3, 8, 4), (3, 1, 4))):
        x = np.arange(np.prod(shape)).reshape(shape)
        placed = jax.device_put(x, batch_sharding(mesh, len(shape)))
        assert {shard.data.shape for shard in placed.addressable_shards} == {part}
        np.testing.assert_array_equal(placed, x)
        whole = jax.device_put(x, state_sharding(mesh))
        assert {shard.data.shape for shard in whole.addressable_shards} == {shape}


def test_a_platform_that_is_not_there_is_refused_in_one_line(monkeypatch):
    asked = []

    def none():
        raise RuntimeError("Unknown backend: 'cuda'\nand a long trace")

    monkeypatch.setattr(jax.config, "update", lambda *setting: asked.append(setting))
    monkeypatch.setattr(jax, "devices", none)
    monkeypatch.setattr(jax, "default_backend", none)
    for device in ("cuda", "gpu", "cuda:1"):
        with pytest.raises(UserError) as error:
            use_platform(device)
        assert str(error.value).startswith(f"device={device} is not there (Unknown backend: 'cuda'")
        assert "--device=cpu" in str(error.value)
        assert "\n" not in str(error.value)
    assert asked == [("jax_platforms", "cuda")] * 3


def test_auto_leaves_the_platform_to_jax(monkeypatch):
    asked = []
    monkeypatch.setattr(jax.config, "update", lambda *setting: asked.append(setting))
    use_platform("auto")
    assert not asked
    use_platform("cpu")
    assert asked == [("jax_platforms", "cpu")]


def test_a_product_over_sharded_rows_needs_no_say_of_the_layout():
    """Auto axes: under Explicit ones a lookup in a table raises (the trap of jax.make_mesh)."""
    mesh = make_mesh()
    ids = jax.device_put(np.arange(16).reshape(8, 2), batch_sharding(mesh, 2))
    table = jax.device_put(np.arange(32.0).reshape(16, 2), state_sharding(mesh))
    rows = jax.jit(lambda table, ids: table[ids])(table, ids)
    np.testing.assert_array_equal(rows, np.arange(32.0).reshape(8, 2, 2))
    assert jnp.sum(rows) == np.arange(32.0).sum()


def test_the_preset_of_gpt2_keeps_its_half_million_tokens_on_any_machine():
    """T3."""
    config = dataclasses.replace(TrainConfig(), gradient_accumulation_steps=40, batch_size=12)
    for devices in (1, 2, 4, 5, 8, 16, 24, 32, 96):
        A, B = micro_batches(config, SimpleNamespace(size=devices))
        assert A * B * config.block_size == 491_520
