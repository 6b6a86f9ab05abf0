"""The plan as a page: at most 80 columns, the answer to "does it fit?" where the eye falls."""

import textwrap
from typing import Any

from gpt_jax.plan.topology import GIB

WIDTH = 80


def written(found: dict[str, Any]) -> str:
    """Return the report of a plan, as ``plan`` found it."""
    blocks = [
        heading(found),
        section("Model and step", model_rows(found)),
        section("Memory of a device, GiB", memory_rows(found)),
        *remedy_block(found),
        *collective_block(found),
        *time_block(found),
        *(f"Note: {note}." for note in found["notes"]),
        f"Planned in {found['seconds']:.0f} s.",
    ]
    return "\n\n".join(wrapped(block) for block in blocks)


def heading(found: dict[str, Any]) -> str:
    """Return the first lines: where, and whether it fits."""
    memory = in_gib(found["memory_bytes"])
    where = f"{found['topology']}: {found['devices']}"
    if found["fits"] is None:
        verdict = f"needs {memory['peak']:.2f} GiB a device (its memory is not in the table)"
    else:
        spare = memory["available"] - memory["peak"]
        room = f"{spare:.2f} GiB to spare" if found["fits"] else f"{-spare:.2f} GiB too much"
        word = "FITS" if found["fits"] else "DOES NOT FIT"
        verdict = f"{word}: {memory['peak']:.2f} of {memory['available']:.2f} GiB a device, {room}"
    return f"{where}\n{verdict}"


def in_gib(sizes: dict[str, float | None]) -> dict[str, Any]:
    """Return sizes in GiB, by name, of those in bytes; what is not known stays None."""
    return {name: None if size is None else size / GIB for name, size in sizes.items()}


def section(title: str, rows: list[tuple[str, str]]) -> str:
    """Return a title with rows of a name and a value below it."""
    lines = [f"  {name:<26} {value}" for name, value in rows]
    return "\n".join([title, *lines])


def model_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows on the network and its step."""
    model, step = found["model"], found["step"]
    sizes = f"{model['n_layer']} layers, {model['n_head']} heads, {model['n_embd']} wide"
    rows = f"{step['micro_batches']} x {step['rows']} rows of {model['block_size']}"
    layers = "rolled" if model["scan_layers"] else "unrolled"
    how = f"{model['dtype']}, attention {model['attention']}, remat {model['remat']}, {layers}"
    return [
        ("network", f"{sizes}, vocabulary {model['vocab_size']}"),
        ("parameters", f"{found['parameters']:,}"),
        ("computed in", how),
        ("micro-batches of a step", f"{rows} ({step['rows_of_a_device']} rows a device)"),
        ("tokens of a step", f"{step['tokens']:,}"),
        ("FLOPs of a step", f"{step['flops']:.3e}, by formula (PaLM, appendix B)"),
    ]


def memory_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of the table of memory."""
    memory = in_gib(found["memory_bytes"])
    new = max(memory["outputs"] - memory["donated"], 0)
    rows = [
        (name, f"{size:8.2f}{what and '   ' + what}")
        for name, size, what in (
            ("  parameters", memory["parameters"], "float32"),
            ("  moments", memory["moments"], "float32, two a parameter"),
            ("  batch", memory["batch"], ""),
            ("arguments", memory["arguments"], ""),
            ("outputs not donated", new, ""),
            ("temporaries", memory["temporaries"], "activations, gradients, gathered weights"),
            ("code", memory["code"], ""),
            ("peak", memory["peak"], ""),
        )
    ]
    if memory["available"] is not None:
        rows += [("available", f"{memory['available']:8.2f}")]
    return rows


def remedy_block(found: dict[str, Any]) -> list[str]:
    """Return the settings that would fit, as a block, if they are needed."""
    if not found["remedies"]:
        return []
    lines = ["What would fit, with the same global batch"]
    for remedy in found["remedies"]:
        source = "compiled" if remedy["compiled"] else "estimated"
        lines += [
            f"  {remedy['settings']}",
            f"      {remedy['peak_bytes'] / GIB:.2f} GiB, {source}",
        ]
    return ["\n".join(lines)]


def collective_block(found: dict[str, Any]) -> list[str]:
    """Return the table of collectives, as a block, if there are any to know of."""
    if found["refused_by_compiler"]:
        return []
    if not found["collectives"]:
        return ["Collectives of a step: none"]
    lines = [f"{'Collectives of a step':<28} {'times':>6} {'GiB got':>10} {'GiB sent':>10}"]
    for kind, sums in found["collectives"].items():
        got, sent = sums["bytes"] / GIB, sums["sent"] / GIB
        lines += [f"  {kind:<26} {sums['count']:6.0f} {got:10.3f} {sent:10.3f}"]
    return ["\n".join(lines)]


def time_block(found: dict[str, Any]) -> list[str]:
    """Return the estimate of time, as a block, with what it takes for granted."""
    times, run = found["time"], found["run"]
    if not times:
        return [f"{run['iterations']:,} iterations read {run['tokens']:,} tokens."]
    parts = " / ".join(duration(times[name]) for name in ("products", "memory", "links"))
    rows = [
        ("products / memory / links", parts),
        ("at least", f"{duration(times['at_least'])}, MFU {times['mfu_at_most']:.0%}"),
        ("expected", f"{duration(times['expected'])}, MFU {times['mfu']:.0%}, "
                     f"{times['tokens_per_second']:,.0f} tokens/s"),
        ("the whole run", f"{days(run['days'])} ({days(run['days_at_least'])} at least)"),
        ("", f"{run['iterations']:,} iterations, {run['tokens']:,} tokens"),
    ]  # fmt: skip
    return [section("Time of a step, an estimate", rows), f"Estimate: {times['assumptions']}."]


def duration(seconds: float) -> str:
    """Return a time to be read: "12.3 ms", "4.56 s"."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def days(number: float) -> str:
    """Return days to be read, hours where they are few."""
    return f"{number:.1f} days" if number >= 1 else f"{24 * number:.1f} hours"


def wrapped(block: str) -> str:
    """Return a block in lines of at most WIDTH columns."""
    return "\n".join(
        textwrap.fill(line, WIDTH, subsequent_indent=" " * 29 if line[:2] == "  " else "",
                      break_on_hyphens=False, drop_whitespace=True)
        for line in block.splitlines()
    )  # fmt: skip
