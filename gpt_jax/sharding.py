"""Which device holds what: the mesh, and the layout of the state and of a batch over it."""

import ctypes
import math
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gpt_jax.config import TrainConfig
from gpt_jax.errors import UserError


def use_platform(device: str) -> None:
    """Choose the platform of a whole process, before anything touches a device: for scripts.

    "auto" leaves the choice to JAX. Raises UserError for a platform that is not there.
    """
    platform = {"gpu": "cuda"}.get(device, device).split(":")[0]
    if platform != "auto":
        jax.config.update("jax_platforms", platform)
    accelerated = entry_points(group="jax_plugins") or find_spec("libtpu")
    if "cpu" in (platform, jax.config.values["jax_platforms"]) or not accelerated:
        keep_freed_memory()
    try:
        jax.devices()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"device={device} is not there ({reason}): use --device=cpu, or install "
            "gpt_jax[cuda] or gpt_jax[tpu] for the hardware at hand"
        ) from None


def keep_freed_memory() -> None:
    """Let malloc keep what is freed, in one arena: where it is glibc's, before XLA's threads start.

    XLA's CPU backend frees a step's arrays and asks for them again in the next. Given back to the
    kernel in between, they come back page by page (docs/performance.md, "What was tried").
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        m_mmap_max, m_trim_threshold, m_arena_max = -4, -1, -8  # malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_arena_max, 1)


def make_mesh(device: str = "auto") -> Mesh:
    """Return a mesh over all devices of the platform in use, or over the one of "cuda:1".

    Its axis "data" shards the rows of a batch. Raises UserError for a device that is not there.
    """
    devices = jax.devices()
    if ":" in device:
        index = int(device.split(":")[1])
        if index >= len(devices):
            raise UserError(
                f"device={device}, but there are {len(devices)} devices: 0 is the first"
            )
        devices = devices[index : index + 1]
    # Auto and not make_mesh's default: linen looks up sharded tables under it
    return jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)


def state_sharding(mesh: Mesh) -> NamedSharding:
    """Return the layout of parameters and optimizer state: whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    """Return the layout of a batch (..., B, T): rows spread over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * (ndim - 2), "data", None))


def micro_batches(config: TrainConfig, mesh: Mesh) -> tuple[int, int]:
    """Return (A, B), accumulation steps and rows of a micro-batch over all devices.

    A * B is the same whatever the number of devices: they take accumulation steps first, as
    nanoGPT's processes do, then rows. Raises UserError where the rows do not divide.
    """
    steps, rows, devices = config.gradient_accumulation_steps, config.batch_size, mesh.size
    shared = math.gcd(steps, devices)
    if rows * shared % devices:
        raise UserError(
            f"batch_size={rows} x gradient_accumulation_steps={steps} cannot be shared by "
            f"{devices} devices: make batch_size a multiple of {devices // shared}"
        )
    return steps // shared, rows * shared
