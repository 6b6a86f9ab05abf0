"""nanoGPT in JAX: ``from gpt_jax import GPT, GPTConfig, load, generate``."""

from gpt_jax.config import GPTConfig
from gpt_jax.model import GPT
from gpt_jax.pretrained import load
from gpt_jax.sampling import generate

__version__ = "0.1.0"
__all__ = ["GPT", "GPTConfig", "generate", "load"]
