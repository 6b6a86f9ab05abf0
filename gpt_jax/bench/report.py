"""The records as people read them, and as programs do."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpt_jax.errors import RunError, UserError

SHOWN = 30  # rows of a profile
MOST = 0.95  # of the time in kernels


def check_places(file: str, folder: str) -> None:
    """Raise UserError where the file of records or the folder of a trace cannot be written."""
    try:
        if file:
            with open(file, "a", encoding="utf-8"):
                pass
    except OSError as error:
        raise UserError(f"json={file!r:.100} cannot be written ({error.strerror})") from None
    try:
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        raise UserError(f"profile={folder!r:.100} cannot be written ({error.strerror})") from None


def put_out(records: list[dict[str, Any]], file: str) -> None:
    """Print the table, then a JSON line a record, or add these to a file."""
    lines = "".join(json.dumps(rounded(record)) + "\n" for record in records)
    if file:
        try:
            with open(file, "a", encoding="utf-8") as out:
                out.write(lines)
        except OSError as error:
            print(lines, end="")  # minutes of measuring are not thrown away
            raise RunError(f"json={file!r:.100} cannot be written ({error})") from None
    print(written(records))
    if not file:
        print("\n" + lines, end="")


def rounded(value: Any) -> Any:
    """Return a record with its numbers to six digits."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def written(records: list[dict[str, Any]]) -> str:
    """Return the tables of records, each kind by its own rows."""
    measured = [record for record in records if "ms_min" in record]
    blocks = [heading(measured[0]), table(measured)] if measured else []
    for record in records:
        if "ms_min" not in record:
            blocks.append(
                {"profile": profile, "ratio": ratio, "compile": seconds}[record["what"]](record)
            )
    return "\n\n".join(blocks)


def heading(record: dict[str, Any]) -> str:
    """Return the line on what was measured and where."""
    sizes = f"{record['n_layer']} layers, {record['n_head']} heads, {record['n_embd']} wide"
    tokens = f"{record['block_size']} tokens, vocabulary {record['vocab_size']}"
    where = (
        f"{record['n_devices']} x {record['device']}, JAX {record['jax']}, {record['date'][:10]}"
    )
    how = [record["dtype"]]
    how += [f"{key} {record[key]}" for key in ("matmul_dtype", "kernels") if record[key] != "auto"]
    return f"{record['what']}, {record['model']}: {sizes}, {tokens}, {', '.join(how)}\n{where}"


def table(records: list[dict[str, Any]]) -> str:
    """Return the measurements, a row each."""
    unit = "ms/token" if "ms_per_token" in records[0] else "ms/step"
    head = f"{'':<10}{'rows':>6}{unit:>12}{'spread':>20}{'tokens/s':>14}{'mfu':>8}"
    rows = [head + f"{'peak GiB':>10}{'compile s':>11}"]
    for record in records:
        name = record.get("batches", record["program"])
        tokens = record.get("max_new_tokens", 1)
        ms, least, most = (record[key] / tokens for key in ("ms", "ms_min", "ms_max"))
        mfu = "" if record.get("mfu") is None else f"{record['mfu']:.1%}"
        peak = "" if record.get("peak_gib") is None else f"{record['peak_gib']:.2f}"
        took = "" if record.get("compile_seconds") is None else f"{record['compile_seconds']:.1f}"
        rows.append(
            f"{name:<10}{record['batch_size']:>6}{ms:>12.3f}{f'{least:.3f}..{most:.3f}':>20}"
            f"{record['tokens_per_second']:>14,.0f}{mfu:>8}{peak:>10}{took:>11}"
        )
    if "slower_percent" in records[-1]:
        rows.append(f"the loader costs {records[-1]['slower_percent']:+.2f} % of a step")
    if any(record.get("compile_cached") for record in records):
        rows.append("compile s: from the persistent cache")
    if any(record.get("peak_from") == "program" for record in records):
        rows.append("peak GiB: the compiled program's own account, for want of the device's")
    return "\n".join(rows)


def ratio(record: dict[str, Any]) -> str:
    """Return the line that compares."""
    line = f"gpt_jax over nanoGPT: {record['ratio']:.3f} x tokens/s"
    if record["memory_ratio"] is not None:
        line += f", {record['memory_ratio']:.0%} of its peak memory"
    rounds = ", ".join(f"{one:.3f}" for one in record["ratios"])
    best = f"of the fastest of each: {record['ratio_of_best']:.3f}"
    return f"{line}\n(of medians; by round: {rounds}; {best}; torch {record['torch']})"


def seconds(record: dict[str, Any]) -> str:
    """Return the table of what takes time before the first step."""
    names = {
        "import_seconds": ("import gpt_jax", ""),
        "compile": ("compile the train step", "cold/warm"),
        "first_iteration": ("train.py to its first iteration", "cold/warm"),
    }
    rows = [f"compile, {record['model']}: {record['device']}, JAX {record['jax']}, seconds"]
    rows.append(f"{'':<34}{'cold':>10}{'warm':>10}")
    rows.append(f"{names['import_seconds'][0]:<34}{'':>10}{record['import_seconds']:>10.2f}")
    for name in ("compile", "first_iteration"):
        cold, warm = (record[f"{name}_{kind}_seconds"] for kind in ("cold", "warm"))
        both = [f"{'-' if one is None else f'{one:.2f}':>10}" for one in (cold, warm)]
        rows.append(f"{names[name][0]:<34}{''.join(both)}")
    return "\n".join(rows)


def profile(record: dict[str, Any]) -> str:
    """Return the kernels by time, each with the share of it that it needs."""
    unit = record["unit"]
    rows = [
        f"profile: {record['source']}, {record['traced']} {unit}s",
        f"ms a {unit}: {record['ms']:.3f}, busy {record['busy_ms']:.3f}, "
        f"idle {record['idle_ms']:.3f}",
    ]
    if record["floor_ms"] is None:
        rows.append("no floor: what the device can do at most is not known")
    else:
        rows.append(
            f"floor (bytes over bandwidth, FLOPs over peak, the longer): {record['floor_ms']:.3f}, "
            f"of kernels that take {record['known_ms']:.3f}"
        )
        if record["known_ms"] < MOST * record["busy_ms"]:
            rows.append(
                "kernels of CUDA graphs do not tell what they are of: "
                "XLA_FLAGS=--xla_gpu_enable_command_buffer= does without graphs"
            )
    rows.append(
        f"{'ms':>9}{'share':>8}{'launches':>10}{'floor':>8}  {'bound':<10}{'kernel':<44}result"
    )
    for k in record["kernels"][:SHOWN]:
        floor = "" if k["floor_share"] is None else f"{k['floor_share']:.0%}"
        rows.append(
            f"{k['ms']:>9.4f}{k['share']:>8.1%}{k['launches']:>10.1f}{floor:>8}  {k['bound']:<10}"
            f"{k['name'][:43]:<44}{k['shape']}"
        )
    return "\n".join([*rows, f"trace: {record['trace']}"])


def say(line: str) -> None:
    """Print a line for whoever is waiting, on stderr."""
    print(line, file=sys.stderr, flush=True)
