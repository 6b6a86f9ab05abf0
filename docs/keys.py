"""Write the keys of every command into docs/configuration.md, from the code: `python docs/keys.py`.

Between two lines `<!-- keys: COMMAND -->` and `<!-- end -->` everything is replaced.
"""

import io
import re
import runpy
import sys
from contextlib import redirect_stdout, suppress
from dataclasses import Field
from pathlib import Path
from unittest.mock import patch

from gpt_jax.bench.config import CompileBench, DecodeBench, LoaderBench, TrainBench
from gpt_jax.commandline import in_order
from gpt_jax.config import Checked, SampleConfig, TrainConfig
from gpt_jax.evaluate import EvalConfig
from gpt_jax.export import ExportConfig
from gpt_jax.plan import PlanConfig
from gpt_jax.plot import PlotConfig

PAGE = Path(__file__).parent / "configuration.md"
KINDS: dict[str, type[Checked]] = {
    "train": TrainConfig,
    "sample": SampleConfig,
    "evaluate": EvalConfig,
    "plan": PlanConfig,
    "export": ExportConfig,
    "plot": PlotConfig,
    "bench train": TrainBench,
    "bench decode": DecodeBench,
    "bench loader": LoaderBench,
    "bench compile": CompileBench,
}
HELPS = ("prepare",)  # commands whose keys are in no dataclass: what their --help says
NAMES = {int: "int", float: "float", bool: "bool", str: "text"}


def bounds(field: Field) -> str:
    """Return what a key may be, as a reader says it."""
    limits, kind = field.metadata, NAMES[field.type]  # pyright: ignore[reportArgumentType]
    if field.type is bool:
        return "True, False"
    if "choices" in limits:
        return ", ".join(f"`{choice}`" if choice else "`''`" for choice in
                         limits["choices"].split("|"))  # fmt: skip
    if limits.get("name"):
        return f"{kind}, not empty"
    low = next((f"{sign} {limits[word]:g}" for word, sign in (("at_least", "≥"), ("above", ">"))
                if word in limits), "")  # fmt: skip
    high = next((f"{sign} {limits[word]:.10g}" for word, sign in (("at_most", "≤"), ("below", "<"))
                 if word in limits), "")  # fmt: skip
    return " ".join([kind, ", ".join(filter(None, (low, high)))]).strip()


def table(fields: list[Field]) -> list[str]:
    """Return the rows of a table of keys, a heading row before each group."""
    lines = ["| key | default | may be | meaning |", "|---|---|---|---|"]
    for f in fields:
        if f.metadata["group"]:
            lines.append(f"| **{f.metadata['group']}** | | | |")
        help = f.metadata["help"].replace("|", "\\|")
        lines.append(f"| `{f.name}` | `{f.default!r}` | {bounds(f)} | {help} |")
    return lines


def said(command: str) -> list[str]:
    """Return what a command's --help prints, as a block of text."""
    out = io.StringIO()
    with patch.object(sys, "argv", [command, "--help"]), redirect_stdout(out), suppress(SystemExit):
        runpy.run_module(f"gpt_jax.{command}", run_name="__main__")
    return ["```text", *out.getvalue().rstrip().splitlines(), "```"]


def keys(command: str) -> str:
    """Return the text between the two lines of a command."""
    if command in HELPS:
        return "\n".join(said(command))
    kind = KINDS[command]
    # a command that trains has all of train's: only what is new or has another default is told
    base = {f.name: f for f in in_order(TrainConfig)} if kind is not TrainConfig else {}
    if not issubclass(kind, TrainConfig):
        base = {}
    fields = [
        f
        for f in in_order(kind)
        if (old := base.get(f.name)) is None
        or (f.default, f.metadata) != (old.default, old.metadata)
    ]
    return "\n".join(table(fields))


def page(text: str) -> str:
    """Return the page with its keys as they are now."""
    return re.sub(
        r"(<!-- keys: ([a-z ]+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}\n{keys(found[2])}\n\n{found[3]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
