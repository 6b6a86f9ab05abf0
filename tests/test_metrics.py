"""FLOPs of a token, peaks of devices, and the share of the one in the other (C5)."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from gpt_jax.config import GPTConfig
from gpt_jax.metrics import flops_per_token
from gpt_jax.model import GPT, count_params
from gpt_jax.reporting.peak import PEAK_FLOPS, peak_flops

GPT2_124M = GPTConfig(bias=False)  # from scratch: V = 50304


def count(config):
    tokens = jnp.zeros((1, 1), jnp.int32)
    return count_params(jax.eval_shape(GPT(config).init, jax.random.key(0), tokens)["params"])


def test_a_token_of_the_124m_model_takes_nanogpts_flops():  # C5, M18
    assert flops_per_token(GPT2_124M, count(GPT2_124M)) == 854_770_176


def nanogpts_mfu(config, n_params, sequences, seconds):
    """nanoGPT's estimate_mfu, on an A100."""
    L, H, D, T = config.n_layer, config.n_head, config.n_embd // config.n_head, config.block_size
    flops_per_sequence = (6 * n_params + 12 * L * H * D * T) * T
    return flops_per_sequence * sequences / seconds / 312e12


@pytest.mark.parametrize(
    "config",
    [GPT2_124M, GPTConfig(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128)],
    ids=["124M", "baby"],
)
def test_mfu_is_nanogpts(config):  # C5, M18
    n_params, sequences, seconds = count(config), 480, 0.25
    a100 = peak_flops(SimpleNamespace(device_kind="NVIDIA A100-SXM4-40GB"))
    tokens_per_second = sequences * config.block_size / seconds
    ours = flops_per_token(config, n_params) * tokens_per_second / a100
    assert ours == pytest.approx(nanogpts_mfu(config, n_params, sequences, seconds), rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 836e12),
        ("NVIDIA L4", 121e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v6e", 918e12),
    ],
)
def test_a_device_reaches_the_peak_of_its_own_kind(kind, peak):
    assert peak_flops(SimpleNamespace(device_kind=kind)) == peak


def test_a_core_of_a_chip_with_two_reaches_half_the_chips_peak():
    # JAX shows each core of these as a device
    assert peak_flops(SimpleNamespace(device_kind="TPU v3")) == 123e12 / 2
    assert peak_flops(SimpleNamespace(device_kind="TPU7x")) == 2307e12 / 2


@pytest.mark.parametrize(
    "kind", ["cpu", "", "NVIDIA", "NVIDIA L40S", "NVIDIA L40", "NVIDIA GH200 480GB", "TPU v9"]
)
def test_the_peak_of_an_unknown_device_is_none(kind):
    assert peak_flops(SimpleNamespace(device_kind=kind)) is None


def test_the_devices_of_the_tests_are_unknown():
    assert peak_flops(jax.devices()[0]) is None


def test_every_row_of_the_table_finds_itself():
    for kind, peak in PEAK_FLOPS.items():
        assert peak_flops(SimpleNamespace(device_kind=kind)) == peak
