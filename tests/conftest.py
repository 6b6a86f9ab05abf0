"""Stricter than production: 8 devices, no silent rank promotion, and (pyproject) no warnings."""

import os

# before jax is imported: its CPU backend reads these once
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
