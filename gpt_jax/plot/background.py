"""OUT_DIR/loss.png, drawn while the run goes on."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpt_jax.integrity import in_a_line
from gpt_jax.plot.figure import save
from gpt_jax.plot.log import Log
from gpt_jax.plot.losses import run_picture


class LossPicture:
    """The picture of a run that goes on, drawn by a thread of its own.

    A thread, not a process, which would first import JAX for seconds: a picture is 0.12 s of work
    and keeps a loop that waits 20 ms a step for its device from it for 15 ms in all (measured on
    two CPU cores, 60,000 lines). What cannot be drawn never ends a run.
    """

    def __init__(self, out_dir: str):
        self.log, self.path = Log(Path(out_dir) / "metrics.jsonl"), Path(out_dir) / "loss.png"
        self.thread = ThreadPoolExecutor(1, "loss.png")
        self.asked = 0
        self.problem, self.told = "", ""

    def draw(self) -> None:
        """Have the picture drawn anew; what is asked for while one is drawn becomes one."""
        self.asked += 1
        self.thread.submit(self.work, self.asked)

    def work(self, number: int) -> None:
        """Draw the picture, unless it has been asked for again; keep what went wrong."""
        if number != self.asked:
            return
        try:
            # its news of font caches would be written across the progress line
            logging.getLogger("matplotlib").setLevel(logging.ERROR)
            save(run_picture(self.log.read()), self.path)
            self.problem = ""
        except Exception as error:
            self.problem = f"no {self.path.name} was drawn: {in_a_line(error)}"

    def complaint(self) -> str:
        """Return a line on why there is no picture, "" if there is one or that has been said."""
        news = self.problem if self.problem != self.told else ""
        self.told = self.problem
        return news

    def close(self) -> None:
        """Wait until the last picture is drawn."""
        self.thread.shutdown()
