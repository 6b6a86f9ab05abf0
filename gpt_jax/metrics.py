"""How fast: FLOPs of a token, the peak of a device, and the share of it that a run reaches."""

import re
from typing import Any

from gpt_jax.config import GPTConfig

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


def flops_per_token(config: GPTConfig, n_params: int) -> float:
    """Return the FLOPs of a token in training, forward and backward: 6N + 12 L H D T.

    ``n_params`` is N, without wpe. PaLM's formula (Chowdhery et al. 2022, appendix B), with T the
    block size and the causal half of attention not taken off, as nanoGPT counts.
    """
    return 6 * n_params + 12 * config.n_layer * config.n_embd * config.block_size
