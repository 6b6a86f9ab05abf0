"""``--profile``: a trace of a few steps, and its kernels by time, each beside what it needs.

JAX writes the trace for XProf (the .xplane.pb) and for Perfetto (the .trace.json.gz); here the
first is read, by JAX itself.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

from gpt_jax.bench.floor import Floor, floors
from gpt_jax.errors import RunError
from gpt_jax.plan.topology import local
from gpt_jax.reporting.peak import peak_flops

TRACED = 3  # steps
SHOWN = 40  # groups of kernels


class Kernel(NamedTuple):
    """One launch; start and end in ns."""

    name: str
    instruction: str  # of the compiled program; "": the trace does not say
    start: float
    end: float


class Group(NamedTuple):
    """Kernels of alike instructions, all of a trace; times in ns."""

    name: str
    shape: str
    launches: int
    time: float
    floor: float | None  # ns that they would take at least; None: not known
    bound: str  # by what: memory or products


def profiled(
    folder: str, run: Callable[[int], Any], unit: str, text: str, about: dict[str, Any]
) -> dict[str, Any]:
    """Return the record of a trace of ``run(TRACED)``, which stays in the folder.

    ``text`` is the compiled program, "" where no floor is wanted; ``about`` what a record says.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow the host
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"profile={folder!r:.100} cannot be written ({error})") from None
    with jax.profiler.trace(folder, profiler_options=options):
        run(TRACED)
    traces = sorted(Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    where, kernels = read(traces[-1]) if traces else ("", [])
    device, chip = jax.devices()[0], local().chip
    peak = peak_flops(device)
    limits = (chip.memory_bandwidth, peak) if chip and peak else None
    found = floors(text)
    names = ("model", "batch_size", "block_size", "dtype", "device", "jax", "date")
    busy, span = busy_time(kernels)
    groups = grouped(kernels, found, limits)
    return {
        "what": "profile",
        "of": about["what"],
        "program": "gpt_jax",
        **{name: about[name] for name in names},
        "unit": unit,
        "traced": TRACED,
        "trace": str(traces[-1]) if traces else None,
        "source": where,
        "ms": span / TRACED / 1e6,
        "busy_ms": busy / TRACED / 1e6,
        "idle_ms": (span - busy) / TRACED / 1e6,
        "floor_ms": sum(g.floor or 0 for g in groups) / TRACED / 1e6 if limits and text else None,
        "unnamed_ms": sum(k.end - k.start for k in kernels if not k.instruction) / TRACED / 1e6,
        "kernels": [
            {
                "name": g.name,
                "shape": g.shape,
                "launches": g.launches / TRACED,
                "ms": g.time / TRACED / 1e6,
                "share": g.time / span,
                "floor_share": None if g.floor is None else g.floor / g.time,
                "bound": g.bound,
            }
            for g in groups[:SHOWN]
        ],
    }


def read(path: Path) -> tuple[str, list[Kernel]]:
    """Return where a trace's kernels ran, and those of its first device, by start.

    On an accelerator they are those of its streams; on the CPU, the thunks of XLA's runtime.
    """
    with warnings.catch_warnings():  # Python 3.12 has something to say of jaxlib's types
        warnings.simplefilter("ignore", DeprecationWarning)
        data = ProfileData.from_serialized_xspace(path.read_bytes())
        planes = {plane.name: plane for plane in data.planes}
        devices = sorted(name for name in planes if re.match(r"/device:(GPU|TPU):\d+$", name))
        for name in [*devices, "/host:CPU"]:
            lines = list(planes[name].lines) if name in planes else []
            if name in devices:  # lines that were derived from the streams would count them twice
                streams = [line for line in lines if line.name.startswith("Stream")]
                lines = streams or [line for line in lines if line.name == "XLA Ops"]
            kernels = [
                Kernel(event.name, instruction, event.start_ns, event.start_ns + event.duration_ns)
                for line in lines
                for event in line.events
                if (instruction := instruction_of(event, name in devices)) is not None
            ]
            if kernels:
                where = "device kernels" if name in devices else "CPU thunks: no device kernels here"
                return where, sorted(kernels, key=lambda kernel: kernel.start)
    return "no kernels in the trace", []


def instruction_of(event: Any, on_device: bool) -> str | None:
    """Return the instruction that an event belongs to, None where it is no kernel of ours."""
    stats = {name: value for name, value in event.stats if name in ("hlo_op", "device_ordinal")}
    if on_device:
        return str(stats.get("hlo_op", ""))
    if "hlo_op" not in stats or stats.get("device_ordinal", 0) != 0:
        return None
    name = str(stats["hlo_op"])
    # they hold the time of what is inside them
    return None if re.match(r"(while|call|conditional)\b", name) else name


def busy_time(kernels: list[Kernel]) -> tuple[float, float]:
    """Return the time in which any kernel ran, and that from the first to the end of the last."""
    if not kernels:
        return 0.0, 0.0
    busy, end = 0.0, kernels[0].start
    for kernel in kernels:
        busy += max(kernel.end - max(kernel.start, end), 0)
        end = max(end, kernel.end)
    return busy, end - kernels[0].start


def grouped(
    kernels: list[Kernel], found: dict[str, Floor], limits: tuple[float, float] | None
) -> list[Group]:
    """Return the kernels by their instruction's name without its number and by its shape.

    ``limits`` are bytes/s and FLOP/s. A kernel that does not tell its instruction (one of a CUDA
    graph) is found by its name, which XLA makes of the instruction's. An instruction of several
    kernels was done as often as the one launched most.
    """
    by_kernel = {re.sub(r"\W", "_", name): name for name in found}
    launched: dict[str, Counter[str]] = {}
    times: Counter[str] = Counter()
    for kernel in kernels:
        name = kernel.instruction or by_kernel.get(kernel.name, kernel.name)
        launched.setdefault(name, Counter())[kernel.name] += 1
        times[name] += kernel.end - kernel.start
    groups: dict[tuple[str, str], Group] = {}
    for name, time in times.items():
        floor = found.get(name)
        least, bound = None, ""
        if floor and limits:
            least = 1e9 * floor.seconds(*limits) * max(launched[name].values())
            moving = floor.bytes / limits[0] >= floor.flops / limits[1]
            bound = "memory" if moving else "products"
        key = (re.sub(r"(?<=\w)[._]*\d[._\d]*$", "", name), floor.shape if floor else "")
        old = groups.get(key, Group(*key, 0, 0, None, bound))
        sums = [n for n in (old.floor, least) if n is not None]
        groups[key] = old._replace(
            launches=old.launches + sum(launched[name].values()),
            time=old.time + time,
            floor=sum(sums) if sums else None,
        )
    return sorted(groups.values(), key=lambda group: -group.time)
