"""A picture of a run: loss over iterations, from its metrics.jsonl."""

from pathlib import Path

from gpt_jax.errors import UserError
from gpt_jax.reporting import entries


def plot(out_dir: str, destination: Path | None = None) -> Path:
    """Write the losses of a run as a picture, by default OUT_DIR/loss.png, and return its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure

    source = Path(out_dir) / "metrics.jsonl"
    logged = [entry for _, entry in entries(source)]
    steps = [e for e in logged if "loss" in e]
    evals = [e for e in logged if "val_loss" in e]
    if not logged:
        raise UserError(f"{source} holds no metrics yet: train first, or name another run")
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # blue, orange, black of Okabe & Ito: told apart by the colour-blind, and in grey
    axes.plot([e["iter"] for e in steps], [e["loss"] for e in steps], color="#56B4E9",
              linewidth=0.8, alpha=0.7, label="batch")  # fmt: skip
    for name, color, style in (("train", "#D55E00", "--"), ("val", "black", "-")):
        axes.plot([e["iter"] for e in evals], [e[f"{name}_loss"] for e in evals], style,
                  color=color, marker="o", markersize=3, label=name)  # fmt: skip
    axes.set(xlabel="iteration", ylabel="loss (nats/token)", title=Path(out_dir).resolve().name)
    axes.grid(alpha=0.3)
    axes.legend()
    destination = destination or Path(out_dir) / "loss.png"
    figure.savefig(destination)
    return destination
