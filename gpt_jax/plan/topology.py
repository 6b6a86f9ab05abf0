"""Hardware that is not there: its names, what it can do, and its devices for the compiler."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any, NamedTuple
from unittest import mock

import jax
from jax.experimental import topologies

from gpt_jax.config import GPTConfig
from gpt_jax.errors import UserError

GIB = 2**30
NODE = 8  # GPUs that NVLink joins
NODES = 2048  # more would take the plan's own memory
EXAMPLES = "v5e:4x4, v5p:4x4x4, v6e:4x4, v4:2x2x2, tpu7x:2x2x1, 2xv5e:4x4 (two slices), h200:8, \
h200:2x8 (two nodes), h100:8, local"


class Chip(NamedTuple):
    """What one device has and can do, by data sheet; its peak FLOP/s is in reporting/peak.py."""

    memory: float  # bytes that a program can use
    memory_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s that it can send to its neighbours, all links together
    outer_bandwidth: float  # bytes/s that it can send to other nodes or slices
    efficiency: float  # share of the peak that the whole step reaches while nothing is waited for
    measured: bool  # whether that share is a measurement of this code


# A TPU's memory is what its compiler says is available; an H200's what its driver leaves. The one
# efficiency measured is that of GPT-2 124M at 64 rows on an H100 (docs/performance.md); an H200 is
# the same processor with faster memory. A TPU 7x shows each of its two cores as a device, with half
# of everything.
CHIPS = {
    "v4": Chip(30.75 * GIB, 1.228e12, 300e9, 6.25e9, 0.4, False),
    "v5e": Chip(15.75 * GIB, 0.819e12, 200e9, 3.125e9, 0.4, False),
    "v5p": Chip(95.74 * GIB, 2.765e12, 600e9, 6.25e9, 0.4, False),
    "v6e": Chip(31.25 * GIB, 1.640e12, 448e9, 6.25e9, 0.4, False),
    "tpu7x": Chip(94.75 * GIB, 3.690e12, 600e9, 6.25e9, 0.4, False),
    "h100": Chip(79.1 * GIB, 3.35e12, 450e9, 50e9, 0.486, True),
    "h200": Chip(139.8 * GIB, 4.8e12, 450e9, 50e9, 0.486, False),
}
KINDS = {  # device_kind of a local device, and the chip that it is; the longest match counts
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA H100": "h100",
    "NVIDIA H200": "h200",
}

# what the compiler asks of a GPU: public figures of the Hopper SXM boards, which differ in memory
HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  memory_bandwidth: {bandwidth:.0f}
  device_memory_size: {memory:.0f}
  runtime_version: "13.0.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{kind}"
"""


class Target(NamedTuple):
    """The devices to plan for, and what is known of them."""

    devices: Any
    platform: str  # cpu, tpu or cuda
    chip: Chip | None  # None: not in the table
    several: bool  # whether there are several nodes or slices


def describe_topology(name: str) -> Target:
    """Return the devices of a topology such as "v5e:4x4", "2xv5e:4x4", "h200:8" or "local".

    Nothing of it need be there. Raises UserError for a name or a shape that does not exist, and
    where the compiler for it is not installed.
    """
    if name == "local":
        return local()
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z][a-z0-9]*):([1-9]\d*(?:x[1-9]\d*)*)", name)
    if not match or match[2] not in CHIPS:
        raise UserError(f"topology={name!r:.60} is not known: give one such as {EXAMPLES}")
    slices, kind, shape = int(match[1] or 1), match[2], match[3]
    return (
        gpus(name, kind, slices, shape)
        if kind in ("h100", "h200")
        else tpus(name, kind, slices, shape)
    )


def local() -> Target:
    """Return the devices of this machine; use_platform has chosen among them."""
    devices = jax.devices()
    kinds = [kind for kind in KINDS if devices[0].device_kind.startswith(kind)]
    chip = CHIPS[KINDS[max(kinds, key=len)]] if kinds else None
    platform = "cuda" if devices[0].platform == "gpu" else devices[0].platform
    return Target(devices, platform, chip, len({d.process_index for d in devices}) > 1)


def tpus(name: str, kind: str, slices: int, shape: str) -> Target:
    """Return the chips of TPU slices, by libtpu's own names and shapes."""
    if not find_spec("libtpu"):
        raise UserError(
            f"topology={name} needs libtpu, which compiles for TPUs on any Linux machine: "
            "pip install 'gpt_jax[tpu]'"
        )
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # else two devices a chip
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind}:{shape}", **options
        )
    except Exception as error:  # RuntimeError, ValueError or JaxRuntimeError, by version
        raise UserError(
            f"topology={name}: libtpu knows no {kind} slice of {shape} "
            f"({first_line(error)}): give one such as {EXAMPLES}"
        ) from None
    return Target(found.devices, "tpu", CHIPS[kind], slices > 1)


def gpus(name: str, kind: str, slices: int, shape: str) -> Target:
    """Return the GPUs of one node ("h200:4") or of several ("h200:2x8")."""
    if not any("cuda" in plugin.name for plugin in entry_points(group="jax_plugins")):
        raise UserError(
            f"topology={name} needs JAX's CUDA plugin, which compiles without a GPU too: "
            "pip install 'gpt_jax[cuda]'"
        )
    sizes = [int(n) for n in shape.split("x")]
    if slices > 1 or len(sizes) > 2 or sizes[-1] > NODE or sizes[0] > NODES:
        raise UserError(
            f"topology={name}: a node has up to {NODE} GPUs: give {kind}:N for one node, "
            f"{kind}:MxN for M nodes of N, up to {NODES}"
        )
    nodes, each = sizes if len(sizes) == 2 else (1, *sizes)
    chip = CHIPS[kind]
    text = HOPPER.format(
        bandwidth=chip.memory_bandwidth, memory=chip.memory, kind=f"NVIDIA {kind.upper()}"
    )
    try:
        found = topologies.get_topology_desc(
            platform="cuda", target_config=text, topology=f"{nodes}x1x{each}"
        )
    except Exception as error:
        raise UserError(f"topology={name}: {first_line(error)}") from None
    return Target(found.devices, "cuda", chip, nodes > 1)


def first_line(error: Exception) -> str:
    """Return the first line of what an exception says."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def attention_for(target: Target, model: GPTConfig) -> str:
    """Return the attention kernel that the network would choose on the target's devices."""
    if model.attention != "auto" or target.devices[0] in jax.local_devices():
        return model.attention
    head = model.n_embd // model.n_head
    fused = head % 8 == 0 and head <= 128 and model.dropout == 0 and model.dtype != "float32"
    return "cudnn" if target.platform == "cuda" and fused else "reference"


@contextmanager
def as_if_there(target: Target) -> Iterator[None]:
    """Answer for a GPU that is not there, while a program for it is traced and lowered.

    JAX's cuDNN attention and ours ask the local GPU what it is. There is no other way to tell them
    (JAX's own tests of ahead-of-time compilation do the same).
    """
    with ExitStack() as stack:
        if target.platform == "cuda" and target.devices[0] not in jax.local_devices():
            from jax._src.cudnn import fused_attention_stablehlo as cudnn

            answers = {
                "check_cudnn_version": lambda: 91000,
                "check_compute_capability": lambda capability: float(capability) <= 9.0,
                "is_cuda_compute_capability_equal": lambda capability: capability == "9.0",
            }
            for name, answer in answers.items():
                stack.enter_context(mock.patch.object(cudnn, name, answer))
            stack.enter_context(mock.patch("gpt_jax.kernels.cudnn_can", return_value=True))
            stack.enter_context(mock.patch("gpt_jax.kernels.why_not", return_value=None))
            stack.enter_context(mock.patch("gpt_jax.kernels.no_gpu", return_value=False))
            with suppress(ImportError):  # of versions before 0.11, which took a Hopper for granted
                from jax._src.pallas.triton import gpu_info  # pyright: ignore

                hopper = gpu_info.GpuInfo(gpu_version=None, arch_name="9.0", compute_capability=90)
                stack.enter_context(mock.patch.dict(gpu_info.registry, cpu=lambda: hopper))
        elif target.platform != "cuda":
            stack.enter_context(mock.patch("gpt_jax.kernels.why_not", return_value="not a GPU"))
        yield
