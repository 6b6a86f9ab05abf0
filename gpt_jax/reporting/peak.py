"""What a device can reach at most."""

import re
from typing import Any

# dense bfloat16 FLOP/s of one device, by the first words of its device_kind; the longest match
# counts. From the vendors' data sheets; PCIe forms (NVL too) are slower than SXM forms, and of a
# TPU v3 or 7x JAX shows each of the two cores as a device.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 836e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
}


def peak_flops(device: Any) -> float | None:
    """Return the FLOP/s that a device can reach at most in bfloat16, None where not known."""
    # whole words: an L40 is no L4
    matches = [kind for kind in PEAK_FLOPS if re.match(rf"{kind}\b", device.device_kind)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None
