"""Progress of a run: its log, the line on the terminal, and trackers."""

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TextIO

from lit_qlora.errors import ResourceError
from lit_qlora.files.atomic import not_a_link
from lit_qlora.files.reading import read_json_lines

Record = dict[str, Any]
STEP = ("lr", "grad_norm", "epoch", "tokens", "samples", "tokens_per_second", "peak_gib", "seconds")
"""The numbers of a step beside its loss; a norm that is not finite is of a step that was skipped."""
TEXTS = ("prompt", "answer", "wanted")
"""The texts of an answer."""
ESTIMATE_AFTER = 5
"""Steps after which the time of a run can be estimated."""
SMALLER_IS_BETTER = {
    *("val_loss", "val_ppl", "kl_to_base", "perplexity", "word_perplexity", "byte_perplexity"),
    *("bits_per_byte", "brier_score", "ter", "wer", "cer", "mse", "mae", "val_reward_rejected", "val_logp_rejected"),
    *("val_kl", "val_mse", "val_mae", "val_cross_entropy", "val_teacher_kl", "seen_loss"),
}
"""Metrics of validations that are errors; a task's metrics are named TASK/METRIC."""


def read_records(path: Path) -> Iterator[Record]:
    """The records in a log of a run, or of its answers, without lines that are torn or are none.

    Raises:
        OSError: if it cannot be read.
    """
    for record in read_json_lines(path):
        known = {name: value for name, value in record.items() if _may_be(name, value)}
        if "step" in known and _is_whole(known):
            yield known


def _may_be(name: str, value: Any) -> bool:
    """Tell if a record can have this value under this name."""
    if name in TEXTS:
        return isinstance(value, str)
    if name == "skipped":
        return isinstance(value, bool)
    if type(value) is int:
        return 0 <= value < 2**63 or (name != "step" and abs(value) < 2**63)
    return type(value) is float and name != "step"


def _is_whole(record: Record) -> bool:
    """Tell if a record has all that a step, a validation or an answer has."""
    if not record.keys().isdisjoint({"loss", *STEP}):
        finite = {name for name in ("loss", *STEP) if name in record and math.isfinite(record[name])}
        return finite | ({"grad_norm"} & record.keys()) == {"loss", *STEP}
    if not record.keys().isdisjoint(TEXTS):
        return {"prompt", "answer"} <= record.keys() and ("wanted" in record) == ("chrf" in record)
    return True


class Average:
    """A running average of losses: exponential, over a quarter of the steps so far, at most ten.

    Its weights sum to 1 from the first loss on (Kingma and Ba 2015, section 3). With ten steps from the start it would
    lag behind the fall of a loss, and show training above validation.
    """

    def __init__(self) -> None:
        self.steps, self.sum, self.weight = 0, 0.0, 0.0

    def __call__(self, loss: float) -> float:
        """Return the average of the losses so far, with the next one."""
        self.steps += 1
        memory = min(0.9, max(0.5, 1 - 4 / self.steps))
        self.sum = memory * self.sum + (1 - memory) * loss
        self.weight = memory * self.weight + (1 - memory)
        return self.sum / self.weight


class RunLog:
    """Appends each record to log.jsonl, flushed, and shows the progress.

    On a terminal it rewrites one line; elsewhere (a file, Slurm, CI) it prints about twenty plain lines.

    Args:
        path: None writes no file.
        total: optimizer steps of the run.

    Attributes:
        records: all records of the run, the ones in the file from before included.
        trackers: get each record too.
    """

    def __init__(self, path: Path | None, total: int, screen: TextIO | None = None) -> None:
        self.records: list[Record] = []
        if path and path.is_file():  # not a pipe or device
            self.records = list(read_records(path))
        self.path, self.total = path, total
        self.screen = screen or sys.stdout
        self.trackers: list[Callable[[Record], object]] = []
        self.average, self.smooth = Average(), 0.0
        self.file = self._open(path or Path(os.devnull), "a")
        self.every = max(1, total // 20)
        self.start = max((record["step"] for record in self.records), default=0)
        self.before = self.seconds
        self.first: tuple[int, float] | None = None  # number and end, in seconds, of the first step of this process
        self.val: float | None = None
        for record in self.records:
            self._remember(record)

    def __call__(self, record: Record) -> None:
        """Log the record of a step or a validation."""
        self.records.append(record)
        try:
            self._stay_in_place()
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as error:
            raise ResourceError(f"Cannot write {self.file.name}: {error.strerror}.") from None
        self._remember(record)
        if "loss" not in record:
            named = "  ".join(f"{name} {short(value)}" for name, value in record.items() if name != "step")
            self.say(f" step {record['step']:>5}/{self.total}  {named}")
        else:
            self.first = self.first or (record["step"], record["seconds"])
            if record["step"] == self.start + ESTIMATE_AFTER and self.total > self.start + 4 * ESTIMATE_AFTER:
                self.say(f"  time    about {duration(self._time_left(record))} to go")
            if self.live or record["step"] % self.every == 0 or record["step"] in (1, self.total):
                self._print(self._progress(record), stays=not self.live)
        for tracker in self.trackers:
            tracker(record)

    def say(self, line: str) -> None:
        """Print a line that is not rewritten."""
        self._print(line, stays=True)

    def validating(self, step: int, what: str) -> None:
        """Show on the rewritten line what is being measured; elsewhere than on a terminal show nothing."""
        if self.live:
            self._print(f" step {step:>5}/{self.total} {step / self.total:4.0%}  validating: {what}", stays=False)

    def _remember(self, record: Record) -> None:
        self.val = record.get("val_loss", self.val)
        if "loss" in record:
            self.smooth = self.average(record["loss"])

    def _stay_in_place(self) -> None:
        """If the file was removed or rotated, write all of it anew."""
        if self.path and (
            not self.path.exists() or not os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno()))
        ):
            tell(f"  note    {self.path} was moved away; it is written anew.", sys.stderr)
            self.file.close()
            self.file = self._open(self.path, "w")
            self.file.writelines(json.dumps(record) + "\n" for record in self.records[:-1])

    @staticmethod
    def _open(path: Path, mode: str) -> IO[str]:
        return open(path, mode, encoding="utf-8", opener=not_a_link)

    def flush(self) -> None:
        """Wait until everything is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    @property
    def seconds(self) -> float:
        """Time of the steps so far, including those before an interruption."""
        return next((float(record["seconds"]) for record in reversed(self.records) if "seconds" in record), 0.0)

    @property
    def live(self) -> bool:
        """True if the line on the screen can be rewritten."""
        return is_terminal(self.screen) and os.environ.get("TERM") != "dumb"

    def close(self) -> None:
        """End the rewritten line and close the file."""
        if self.live:
            self._print("", stays=False)
        self.file.close()

    def _time_left(self, record: Record) -> float:
        """Seconds until the end of the run, validations included, at the rate of this process so far."""
        assert self.first
        step, seconds = self.first
        if record["step"] > step:  # the first step includes work that is done once
            rate = (record["seconds"] - seconds) / (record["step"] - step)
        else:
            rate = seconds - self.before
        return float(rate * (self.total - record["step"]))

    def _progress(self, record: Record) -> str:
        val = "" if self.val is None else f"  val {self.val:.3f}"
        accuracy = f"  acc {record['accuracy']:.3f}" if "accuracy" in record else ""  # not in logs of earlier versions
        if "teacher_kl" in record:
            accuracy += f"  kl {record['teacher_kl']:.3f}"
        if "reward_margin" in record:  # of comparisons
            accuracy = f"  margin {record['reward_margin']:.2f}"
            accuracy += f"  acc {record['reward_accuracy']:.3f}" if "reward_accuracy" in record else ""
        return (
            f" step {record['step']:>5}/{self.total} {record['step'] / self.total:4.0%}"
            f"  loss {record['loss']:.3f} (ema {self.smooth:.3f}){accuracy}{val}  lr {record['lr']:.1e}"
            f"  |g| {record['grad_norm']:.2f}  {record['tokens_per_second']:,.0f} tok/s"
            f"  {record['peak_gib']:.1f} GiB  ETA {duration(self._time_left(record))}"
        )

    def _print(self, line: str, stays: bool) -> None:
        if self.live:
            # A line longer than the screen would wrap, and only its last part could be rewritten.
            fits = line if stays else line[: shutil.get_terminal_size().columns - 1]
            line = "\r\x1b[2K" + fits
        tell(line, self.screen, end="" if self.live and not stays else "\n")


def is_terminal(screen: TextIO | None) -> bool:
    """Tell whether `screen` is a terminal; a process may have none, and it may be closed."""
    return screen is not None and not screen.closed and screen.isatty()


def tell(text: str, screen: TextIO | None = None, end: str = "\n") -> None:
    """Print a message. If the pipe or terminal is closed, the run goes on."""
    with suppress(OSError, ValueError):
        print(text, end=end, file=screen, flush=True)


def duration(seconds: float) -> str:
    """Format a duration: '42 s', '3 min 05 s' or '1 h 52 min'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"


def short(value: Any) -> str:
    """Format a value for people: 0.4321, 12.34, 1,234,567, 1.2e-07."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def metrics(records: Sequence[Record]) -> dict[str, list[tuple[int, float]]]:
    """Collect the metrics of the validations: name -> (step, value) of each."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, value in record.items() if "loss" not in record else ():
            if name != "step":
                found.setdefault(name, []).append((record["step"], value))
    return found


def before_and_after(records: Sequence[Record]) -> list[tuple[str, str, str, str]]:
    """Describe each metric of the validations: its name, the first value, the last one, and the best with its step."""
    rows = []
    for name, values in metrics(records).items():
        step, best = (min if smaller_is_better(name) else max)(values, key=lambda pair: pair[1])
        rows.append((name, short(values[0][1]), short(values[-1][1]), f"{short(best)} (step {step})"))
    return rows


def smaller_is_better(metric: str) -> bool:
    """Tell by the name of a metric whether it is an error."""
    return metric.rpartition("/")[2] in SMALLER_IS_BETTER
