"""How fast: the FLOPs of a token."""

from gpt_jax.config import GPTConfig


def flops_per_token(config: GPTConfig, n_params: int) -> float:
    """Return the FLOPs of a token in training, forward and backward: 6N + 12 L H D T.

    ``n_params`` is N, without wpe. PaLM's formula (Chowdhery et al. 2022, appendix B), with T the
    block size and the causal half of attention not taken off, as nanoGPT counts.
    """
    return 6 * n_params + 12 * config.n_layer * config.n_embd * config.block_size
