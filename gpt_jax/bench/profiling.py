"""``--profile``: a trace of a few steps, and its kernels by time, each beside what it needs.

JAX writes the trace for XProf (the .xplane.pb) and for Perfetto (the .trace.json.gz); here the
first is read, by JAX itself.
"""

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

from gpt_jax.bench.config import BesideBench
from gpt_jax.bench.floor import Floor, floors
from gpt_jax.bench.report import put_out
from gpt_jax.errors import RunError
from gpt_jax.plan.topology import local
from gpt_jax.reporting.peak import peak_flops

SHOWN = 40  # groups of kernels


class Kernel(NamedTuple):
    """One launch; start and end in ns."""

    name: str
    module: str  # the compiled program
    instruction: str  # and its instruction; "": the trace does not say
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
    config: BesideBench, run: Callable[[], Any], n: int, unit: str, about: dict[str, Any]
) -> dict[str, Any]:
    """Return the record of a trace of ``run()``, which does ``n`` units; the trace is kept.

    ``about`` is the record of the same, measured without a trace: it is put out if this fails.
    """
    try:
        return traced(config.profile, run, n, unit, about)
    except BaseException as error:
        put_out([about], config.json)
        if isinstance(error, OSError):
            raise RunError(f"profile={config.profile!r:.100} failed ({error})") from None
        raise


def traced(
    folder: str, run: Callable[[], Any], n: int, unit: str, about: dict[str, Any]
) -> dict[str, Any]:
    """Return the record of a trace, written to a folder."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow the host
    with jax.profiler.trace(folder, profiler_options=options):
        run()
    traces = sorted(Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    where, kernels = read(traces[-1]) if traces else ("no trace was written", [])
    device, chip = jax.devices()[0], local().chip
    peak = peak_flops(device)
    limits = (chip.memory_bandwidth, peak) if chip and peak else None
    groups = grouped(kernels, programs({kernel.module for kernel in kernels}), limits)
    busy, span = busy_time(kernels)
    names = ("model", "batch_size", "block_size", "dtype", "device", "jax", "date")
    per = 1e6 * n  # ns of all to ms of a unit
    return {
        "what": "profile",
        "of": about["what"],
        "program": "gpt_jax",
        **{name: about[name] for name in names},
        "unit": unit,
        "traced": n,
        "trace": str(traces[-1]) if traces else None,
        "source": where,
        "ms": span / per,
        "busy_ms": busy / per,
        "idle_ms": (span - busy) / per,
        "floor_ms": sum(g.floor or 0 for g in groups) / per if limits else None,
        # of kernels whose floor is known
        "known_ms": sum(g.time for g in groups if g.floor is not None) / per,
        "kernels": [
            {
                "name": g.name,
                "shape": g.shape,
                "launches": g.launches / n,
                "ms": g.time / per,
                "share": g.time / span,
                "floor_share": None if g.floor is None or not g.time else g.floor / g.time,
                "bound": g.bound,
            }
            for g in groups[:SHOWN]
        ],
    }


def programs(modules: set[str]) -> dict[tuple[str, str], Floor]:
    """Return the floors of the programs of this process, by module ("": any) and instruction."""
    found = {}
    for executable in jax.devices()[0].client.live_executables():
        for module in executable.hlo_modules():
            if module.name in modules or "" in modules:
                for name, floor in floors(module.to_string()).items():
                    found[module.name, name] = found["", name] = floor
    return found


def read(path: Path) -> tuple[str, list[Kernel]]:
    """Return where a trace's kernels ran, and those of its first device, by start.

    On an accelerator they are those of its streams; on the CPU, the thunks of XLA's runtime.
    """
    with warnings.catch_warnings():  # Python 3.12 has something to say of jaxlib's types
        warnings.simplefilter("ignore", DeprecationWarning)
        data = ProfileData.from_serialized_xspace(path.read_bytes())
        planes = {plane.name: plane for plane in data.planes}
        devices = sorted(name for name in planes if re.match(r"/device:(GPU|TPU):\d+", name))
        for name in [*devices, "/host:CPU"]:
            lines = list(planes[name].lines) if name in planes else []
            if name in devices:  # lines that were derived from the streams would count them twice
                streams = [line for line in lines if line.name.startswith("Stream")]
                lines = streams or [line for line in lines if line.name == "XLA Ops"]
            kernels = [
                Kernel(event.name, *origin, event.start_ns, event.start_ns + event.duration_ns)
                for line in lines
                for event in line.events
                if (origin := origin_of(event, name in devices)) is not None
            ]
            if kernels:
                where = (
                    "device kernels" if name in devices else "CPU thunks: no device kernels here"
                )
                return where, sorted(kernels, key=lambda kernel: kernel.start)
    return "no kernels in the trace", []


def origin_of(event: Any, on_device: bool) -> tuple[str, str] | None:
    """Return an event's module and instruction, None where it is no kernel of ours."""
    known = ("hlo_module", "hlo_op", "device_ordinal")
    stats = {name: value for name, value in event.stats if name in known}
    # what is inside a loop may be named after it: "while.2/dot.3"
    module, name = str(stats.get("hlo_module", "")), str(stats.get("hlo_op", "")).split("/")[-1]
    if on_device:
        return module, name
    # on the host, control flow holds the time of what is inside it
    held = not name or re.match(r"(while|call|conditional)\b", name)
    return None if held or stats.get("device_ordinal", 0) != 0 else (module, name)


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
    kernels: list[Kernel],
    found: dict[tuple[str, str], Floor],
    limits: tuple[float, float] | None,
) -> list[Group]:
    """Return the kernels by their instruction's name without its number and by its shape.

    ``limits`` are bytes/s and FLOP/s. A kernel that does not tell its instruction (one of a CUDA
    graph tells at most the graph's) is found by its name, which XLA makes of the instruction's if
    the kernel is its own. An instruction of several kernels was done as often as the one launched
    most.
    """
    by_kernel = {re.sub(r"\W", "_", name): name for module, name in found if not module}
    launched: dict[tuple[str, str], Counter[str]] = {}
    times: dict[tuple[str, str], float] = defaultdict(float)
    for kernel in kernels:
        name = kernel.instruction
        if not {(kernel.module, name), ("", name)} & found.keys():
            name = by_kernel.get(kernel.name, kernel.name)
        key = kernel.module, name
        launched.setdefault(key, Counter())[kernel.name] += 1
        times[key] += kernel.end - kernel.start
    groups: dict[tuple[str, str], Group] = {}
    for key, time in times.items():
        floor = found.get(key) or found.get(("", key[1]))
        least, bound = None, ""
        if floor and limits:
            least = 1e9 * floor.seconds(*limits) * max(launched[key].values())
            moving = floor.bytes / limits[0] >= floor.flops / limits[1]
            bound = "memory" if moving else "products"
        label = (re.sub(r"(?<=\w)[._]*\d[._\d]*$", "", key[1]), floor.shape if floor else "")
        old = groups.get(label, Group(*label, 0, 0, None, bound))
        sums = [n for n in (old.floor, least) if n is not None]
        groups[label] = old._replace(
            launches=old.launches + sum(launched[key].values()),
            time=old.time + time,
            floor=sum(sums) if sums else None,
        )
    return sorted(groups.values(), key=lambda group: -group.time)
