"""How much memory a run takes."""

import sys

from jax.sharding import Mesh

try:
    import resource
except ImportError:  # Windows
    resource = None


def memory(mesh: Mesh) -> dict[str, int]:
    """Return bytes: of this process's fullest device now and at most, of the host at most.

    What is not known is left out: a CPU's and some GPUs' allocators count nothing.
    """
    counted = [device.memory_stats() or {} for device in mesh.local_devices]
    names = {"device_memory": "bytes_in_use", "device_memory_peak": "peak_bytes_in_use"}
    found = {}
    for name, key in names.items():
        if known := [stats[key] for stats in counted if key in stats]:
            found[name] = max(known)
    if resource:
        # KiB on Linux, bytes on macOS: getrusage(2) of each
        unit = 1 if sys.platform == "darwin" else 1024
        found["host_memory_peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return found
