"""Draw docs/run.svg: the terminal of a quickstart at its middle, from a run made for it."""

import io
import os
import signal
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

DOCS = Path(__file__).absolute().parent
COLUMNS = 80
FLAGS = ["--log_interval=250"]
MOMENT = "step 1,2"  # of 2,000

sys.path.insert(0, str(DOCS.parent))
import train  # noqa: E402
from gpt_jax.reporting.terminal import Foot  # noqa: E402


class Terminal(io.StringIO):
    """Keeps the lines that are printed, and the foot as it is at the moment."""

    encoding = "utf-8"
    lines, foot = "", ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if "\033" not in text and not self.foot:
            self.lines += text
        elif MOMENT in text and "evaluating" not in text and Foot.shown and not self.foot:
            self.foot = Foot.shown.text
            signal.raise_signal(signal.SIGINT)
        return len(text)


terminal, before = Terminal(), (sys.stdout, os.getcwd())
os.environ.update(TERM="xterm-256color", COLUMNS=str(COLUMNS))
with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    sys.stdout, sys.argv = terminal, ["train.py", *FLAGS]
    train.main()
    sys.stdout = before[0]
    os.chdir(before[1])

shown = f"$ python train.py {' '.join(FLAGS)}\n{terminal.lines}{terminal.foot}"
console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
text = Text.from_ansi(shown.rstrip())
console.print(text)
# no font from elsewhere, which rich's own form asks for: GitHub loads none
form = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font: {char_height}px/{line_height}px monospace; }}
{styles}
</style>
<defs>{lines}</defs>
<rect width="{width}" height="{height}" rx="8" fill="#0c0c0c"/>
<g transform="translate(12, 12)">{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""
size = {"width": 12.2 * COLUMNS + 24, "height": 24.4 * (text.plain.count("\n") + 1) + 24}
for name, pixels in size.items():
    form = form.replace(f"{{{name}}}", f"{pixels:.0f}")
svg = console.export_svg(title="", theme=MONOKAI, code_format=form, unique_id="run")
(DOCS / "run.svg").write_text(svg, "utf-8")
