"""How long a step takes: what products, memory and links each need at least, and what to expect."""

from typing import Any, NamedTuple

from gpt_jax.plan.program import Program
from gpt_jax.plan.topology import Target

# products of a step, those made again included, over those of the formula: of "dots" attention's,
# roughly
RECOMPUTED = {"none": 1.0, "dots": 1.1, "full": 4 / 3}
ASSUMPTIONS = (
    "at least: the slowest of products at the peak, memory (temporaries written and read once a "
    "micro-batch, state and gradients 7 times a step) and links, each perfectly hidden by the "
    "others; expected: products at {share:.0%} of the peak ({source}), links not hidden"
)


class Roofline(NamedTuple):
    """Seconds of a step, and the share of the peak that its formula's FLOPs then reach."""

    products: float
    memory: float
    links: float
    at_least: float
    expected: float
    mfu_at_most: float
    mfu: float


def roofline(
    program: Program,
    target: Target,
    flops: float,
    peak: float,
    micro_batches: int,
    parameter_bytes: float,
    remat: str,
) -> Roofline | None:
    """Return the estimate of a step of ``flops``, None where the hardware is not in the table.

    ``peak`` is in FLOP/s and of one device, ``parameter_bytes`` what it holds of the parameters.
    """
    chip = target.chip
    if not chip or not peak:
        return None
    n = len(target.devices)
    products = flops / (n * peak)
    traffic = 2 * micro_batches * program.temporaries + 7 * parameter_bytes
    memory = traffic / chip.memory_bandwidth
    # a ring over several nodes or slices is as fast as its slowest link
    bandwidth = chip.outer_bandwidth if target.several else chip.link_bandwidth
    links = sum(kind["sent"] for kind in program.collectives.values()) / bandwidth
    at_least = max(products * RECOMPUTED[remat], memory, links)
    expected = max(products * RECOMPUTED[remat] / chip.efficiency, memory) + links
    return Roofline(
        products, memory, links, at_least, expected, products / at_least, products / expected
    )


def assumptions(target: Target) -> str:
    """Return what the estimate takes for granted, in one line."""
    chip: Any = target.chip
    source = "measured, GPT-2 124M on one H100" if chip.measured else "assumed, not measured"
    return ASSUMPTIONS.format(share=chip.efficiency, source=source)
