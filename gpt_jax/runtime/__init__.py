"""What a process runs on and with: platform, other processes of the run, signals, its folder."""

from gpt_jax.runtime.platform import use_platform
from gpt_jax.runtime.processes import agree, all_see, barrier, connected, in_turn, is_first
from gpt_jax.runtime.running import LOCK, running
from gpt_jax.runtime.signals import Stop

__all__ = [
    "LOCK",
    "Stop",
    "agree",
    "all_see",
    "barrier",
    "connected",
    "in_turn",
    "is_first",
    "running",
    "use_platform",
]
