"""Which platform a process runs on."""

import io
import os
import sys

import jax
import pytest

from gpt_jax.errors import UserError
from gpt_jax.runtime import use_platform
from gpt_jax.runtime.platform import print_any_text


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


def test_a_plugin_that_finds_no_hardware_is_refused_in_one_line(monkeypatch):
    def none():
        raise AssertionError  # what JAX says of CUDA's plugin without a GPU

    monkeypatch.setattr(jax.config, "update", lambda *setting: None)
    monkeypatch.setattr(jax, "devices", none)
    with pytest.raises(UserError, match=r"^device=cuda is not there \(JAX finds no such hardware"):
        use_platform("cuda")


def test_auto_leaves_the_platform_to_jax(monkeypatch):
    asked = []
    monkeypatch.setattr(jax.config, "update", lambda *setting: asked.append(setting))
    use_platform("auto")
    assert not asked
    use_platform("cpu")
    assert asked == [("jax_platforms", "cpu")]


def test_deterministic_adds_its_flags_to_those_that_are_there(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_mine=1")
    use_platform("cpu")
    assert os.environ["XLA_FLAGS"] == "--xla_mine=1"
    use_platform("cpu", deterministic=True)
    assert os.environ["XLA_FLAGS"].startswith("--xla_mine=1 --xla_gpu_deterministic_ops=true")


def test_a_character_that_the_output_has_no_byte_for_is_printed_as_a_question_mark(monkeypatch):
    """A pipe of Windows', say; with any text in it, a sample must not end in a traceback."""
    for name in ("stdout", "stderr"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
        monkeypatch.setattr(sys, name, stream)
    print_any_text()
    print("\ufffdé", file=sys.stderr, flush=True)
    print("\ufffdé", flush=True)
    for stream in (sys.stdout, sys.stderr):
        assert stream.buffer.getvalue().split() == [b"?\xe9"]  # pyright: ignore
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # a notebook's cannot be told, nor need be
    print_any_text()
