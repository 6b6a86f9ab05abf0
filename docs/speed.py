"""Draw docs/speed.svg from the table marked `speed` in docs/performance.md."""

import re
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent
table = (DOCS / "performance.md").read_text("utf-8").split("<!-- speed -->")[1].split("\n\n")[0]
rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().splitlines()[2:]]
names = [f"{name}\n{batch} rows" for name, batch, *_ in rows]
speeds = [float(re.sub("k$", "", row[3])) for row in rows]
memory = [float(row[5]) for row in rows]
# Okabe and Ito's colours, which the colour-blind can tell apart
colours = ["#D55E00" if "nanoGPT" in name else "#0072B2" for name in names]

plt.rcParams.update({"font.size": 11, "svg.hashsalt": "speed"})
figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
for axis, values, title in (
    (axes[0], speeds, "thousand tokens/s, more is better"),
    (axes[1], memory, "peak memory in GiB, less is better"),
):
    axis.bar_label(axis.barh(names, values, color=colours), padding=4)
    axis.set_title(title, fontsize=11)
    axis.set_xlim(0, max(values) * 1.15)
    axis.spines[["top", "right"]].set_visible(False)
axes[0].invert_yaxis()
figure.suptitle("Training GPT-2 124M on one H100", fontsize=12)
figure.savefig(DOCS / "speed.svg", metadata={"Date": None})
