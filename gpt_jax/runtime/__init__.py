"""What a process runs on and with: its platform, the other processes of the run, its signals."""

from gpt_jax.runtime.platform import use_platform
from gpt_jax.runtime.processes import agree, all_see, barrier, connected, in_turn, is_first
from gpt_jax.runtime.signals import Stop

__all__ = [
    "Stop",
    "agree",
    "all_see",
    "barrier",
    "connected",
    "in_turn",
    "is_first",
    "use_platform",
]
