"""The platform that a process runs on."""

import ctypes
import os
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec

import jax

from gpt_jax.errors import UserError
from gpt_jax.runtime.compile_cache import default_folder, keep_whole

# under the first flag alone XLA of JAX 0.11, compiling a step ahead of time for an H200, finds no
# configuration for some products; the second one keeps them from Triton
DETERMINISTIC = "--xla_gpu_deterministic_ops=true --xla_gpu_enable_triton_gemm=false"


def use_platform(device: str, deterministic: bool = False, keep_compiled: bool = True) -> None:
    """Choose the platform of a whole process, before anything touches a device: for scripts.

    "auto" leaves the choice to JAX. ``deterministic`` has XLA take only GPU kernels that give the
    same bits each time. Raises UserError for a platform that is not there.

    Unless JAX has been told of another folder or of none, compiled programs are kept for the next
    process in one of the user's own (compile_cache.py), if ``keep_compiled``.
    """
    print_any_text()
    if deterministic:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}"
    platform = {"gpu": "cuda"}.get(device, device).split(":")[0]
    if platform != "auto":
        jax.config.update("jax_platforms", platform)
    named = jax.config.values["jax_compilation_cache_dir"]
    if named == "":  # to JAX, which knows only None for none, the current folder
        jax.config.update("jax_compilation_cache_dir", None)
    wanted = keep_compiled and named is None and jax.config.values["jax_enable_compilation_cache"]
    if wanted and (folder := default_folder()):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        keep_whole(folder)
    accelerated = entry_points(group="jax_plugins") or find_spec("libtpu")
    if "cpu" in (platform, jax.config.values["jax_platforms"]) or not accelerated:
        keep_freed_memory()
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter: a plugin that finds no hardware
        reason = (str(error).splitlines() or ["JAX finds no such hardware"])[0]
        raise UserError(
            f"device={device} is not there ({reason}): use --device=cpu, or install "
            "gpt_jax[cuda] or gpt_jax[tpu] for the hardware at hand"
        ) from None


def print_any_text() -> None:
    """Have "?" printed for a character that the output's encoding lacks, be it in a sample's text.

    Windows' pipes and files speak a code page of 256 characters, unless PYTHONUTF8=1.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # pythonw has none, a notebook's are no text files
            stream.reconfigure(errors="replace")  # pyright: ignore


def keep_freed_memory() -> None:
    """Let malloc keep what is freed, in one arena: where it is glibc's, before XLA's threads start.

    XLA's CPU backend frees a step's arrays and asks for them again in the next. Given back to the
    kernel in between, they come back page by page (docs/performance.md, "What was tried").
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        m_mmap_max, m_trim_threshold, m_arena_max = -4, -1, -8  # malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_arena_max, 1)
