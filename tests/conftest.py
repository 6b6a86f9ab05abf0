"""Stricter than production: 8 devices, no silent rank promotion, and (pyproject) no warnings."""

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

# before jax is imported: its CPU backend reads these once
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

# a shell's background job, `pytest &` in a script, is deaf to Ctrl-C, and so would its children be
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# the same small programs recur: compile each once a session. A worker shares what it has compiled
# with its child processes alone: JAX reads entries that another is still writing, with a warning
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
elif worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["JAX_COMPILATION_CACHE_DIR"] += f"/{worker}"

import jax
import pytest

from gpt_jax.errors import UserError
from gpt_jax.tokenizer import tiktoken_tokenizer

jax.config.update("jax_numpy_rank_promotion", "raise")
CACHE = Path(__file__).parents[2] / "shared" / "data" / "tiktoken_cache"


@pytest.fixture(scope="module")
def gpt2():
    """tiktoken's gpt2, where its files are."""
    with pytest.MonkeyPatch.context() as patch:
        if "TIKTOKEN_CACHE_DIR" not in os.environ and CACHE.is_dir():
            patch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
        tokenizer = tiktoken_tokenizer("gpt2")
        try:
            tokenizer.token_bytes(0)
        except UserError as error:
            pytest.skip(f"GPT-2's files are absent: {error}")
        yield tokenizer
