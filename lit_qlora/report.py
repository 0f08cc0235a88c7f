"""What a run leaves for people: the log, the line on the terminal, the picture and the page."""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from lit_qlora.errors import ResourceError

Record = dict[str, Any]


class RunLog:
    """Appends each record to log.jsonl, flushed, and keeps the person informed.

    On a terminal one line is rewritten; elsewhere (a file, Slurm, CI) a plain line is printed about twenty times.

    Args:
        path: None for a log that is not written.
        total: optimizer steps of the run.

    Attributes:
        records: all of the run, those that the file held before included.
    """

    def __init__(self, path: Path | None, total: int, screen: TextIO | None = None) -> None:
        self.records: list[Record] = []
        if path and path.is_file():  # not a pipe or device
            self.records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        self.path, self.total = path, total
        self.screen = screen or sys.stdout
        self.smooth: float | None = None
        self.file = open(path or os.devnull, "a", encoding="utf-8")  # noqa: SIM115 - open for the length of the run
        self.every = max(1, total // 20)
        self.begin = time.monotonic()
        self.first = max((record["step"] for record in self.records), default=0)

    def __call__(self, record: Record) -> None:
        """Take a record of a step or of a validation."""
        self.records.append(record)
        try:
            self._stay_in_place()
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as error:
            raise ResourceError(f"Cannot write {self.file.name}: {error.strerror}.") from None
        if "val_loss" in record:
            self._print(f" step {record['step']:>5}/{self.total}  val_loss {record['val_loss']:.4f}", stays=True)
        elif "loss" in record:
            self.smooth = record["loss"] if self.smooth is None else 0.9 * self.smooth + 0.1 * record["loss"]
            if self.live or record["step"] % self.every == 0 or record["step"] in (1, self.total):
                self._print(self._progress(record), stays=not self.live)

    def _stay_in_place(self) -> None:
        """Where somebody removed or rotated the file, write all of it anew."""
        if self.path and (
            not self.path.exists() or not os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno()))
        ):
            tell(f"  note    {self.path} was moved away; it is written anew.", sys.stderr)
            self.file.close()
            self.file = open(self.path, "w", encoding="utf-8")  # noqa: SIM115
            self.file.writelines(json.dumps(record) + "\n" for record in self.records[:-1])

    def flush(self) -> None:
        """Wait until everything is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    @property
    def seconds(self) -> float:
        """What the steps so far took, those before an interruption included."""
        return next((float(record["seconds"]) for record in reversed(self.records) if "seconds" in record), 0.0)

    @property
    def live(self) -> bool:
        """Whether a line can be rewritten."""
        return is_terminal(self.screen) and os.environ.get("TERM") != "dumb"

    def close(self) -> None:
        """End the rewritten line and close the file."""
        if self.live:
            self._print("", stays=False)
        self.file.close()

    def _progress(self, record: Record) -> str:
        rate = (time.monotonic() - self.begin) / max(1, record["step"] - self.first)
        left = rate * (self.total - record["step"])
        return (
            f" step {record['step']:>5}/{self.total} {record['step'] / self.total:4.0%}"
            f"  loss {record['loss']:.3f} (avg {self.smooth:.3f})  lr {record['lr']:.1e}"
            f"  |g| {record['grad_norm']:.2f}  {record['tokens_per_second']:,.0f} tok/s"
            f"  {record['peak_gib']:.1f} GiB  ETA {duration(left)}"
        )

    def _print(self, line: str, stays: bool) -> None:
        if self.live:
            line = "\r\x1b[2K" + line
        tell(line, self.screen, end="" if self.live and not stays else "\n")


def is_terminal(screen: TextIO | None) -> bool:
    """Whether somebody looks at `screen`; a process can be without one, and it can be closed."""
    return screen is not None and not screen.closed and screen.isatty()


def tell(text: str, screen: TextIO | None = None, end: str = "\n") -> None:
    """Print for whoever watches. Where nobody does any more (a closed pipe or terminal), the run goes on."""
    with suppress(OSError, ValueError):
        print(text, end=end, file=screen, flush=True)


def duration(seconds: float) -> str:
    """'42 s', '3 min 05 s' or '1 h 52 min'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"


def plot_losses(records: list[Record], path: Path) -> None:
    """loss.png: the loss of each step, its running average, the validation losses, and the learning rate below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    train = [r for r in records if "loss" in r]
    val = [r for r in records if "val_loss" in r]
    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(8, 5.5), sharex=True, height_ratios=[4, 1], layout="constrained"
    )
    steps, losses = [r["step"] for r in train], [r["loss"] for r in train]
    average: list[float] = []
    for loss in losses:
        average.append(0.9 * average[-1] + 0.1 * loss if average else loss)
    top.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training loss of a step")
    top.plot(steps, average, color="tab:blue", label="running average")
    if val:
        top.plot([r["step"] for r in val], [r["val_loss"] for r in val], "o-", color="tab:orange", label="validation")
    top.set_ylabel("loss per labelled token (nats)")
    top.set_ylim(bottom=0)
    top.grid(alpha=0.3)
    top.legend(frameon=False)
    bottom.plot(steps, [r["lr"] for r in train], color="tab:gray")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("optimizer step")
    bottom.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_lengths(lengths: Sequence[int], limit: int, path: Path) -> None:
    """How many samples have how many tokens, with the limit that they may not exceed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    axes.hist(lengths, bins=min(60, max(1, max(lengths) - min(lengths))), color="tab:blue")
    if max(lengths) > limit:
        axes.axvline(limit, color="tab:red", label=f"limit, {limit} tokens")
        axes.legend(frameon=False)
    axes.set_xlabel("tokens of a sample, prompt and answer")
    axes.set_ylabel("samples")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_report(path: Path, title: str, summary: Mapping[str, Any], records: list[Record], next_steps: str) -> None:
    """report.md: what was trained, how the losses went, and what to type next."""
    val = [r for r in records if "val_loss" in r]
    rows = [(key, value) for key, value in summary.items() if not isinstance(value, dict)]
    lines = [f"# {title}", "", "| | |", "|---|---|"]
    lines += [f"| {key.replace('_', ' ')} | {_cell(value)} |" for key, value in rows]
    if val:
        lines += ["", "| step | validation loss | perplexity |", "|---:|---:|---:|"]
        lines += [f"| {r['step']} | {r['val_loss']:.4f} | {r['val_ppl']:.2f} |" for r in val]
    lines += ["", "![losses](loss.png)", "", "## Next", "", "```", next_steps, "```", ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
