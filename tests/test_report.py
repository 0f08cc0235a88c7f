"""What people see of a run: the line on the terminal, the log, the picture, the page."""

import io
import json
import os
from pathlib import Path

import pytest

from lit_qlora.errors import ResourceError
from lit_qlora.report import RunLog, duration, is_terminal, plot_losses, tell, write_report


class Terminal(io.StringIO):
    """A screen on which lines can be rewritten."""

    def isatty(self) -> bool:
        """It is."""
        return True


class Gone(io.StringIO):
    """A screen that nobody looks at any more."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        """Nothing is written."""
        raise self.error


@pytest.fixture(autouse=True)
def _capable_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


def step(number: int, loss: float = 2.0) -> dict:
    return {
        "step": number,
        "epoch": 0.5,
        "loss": loss,
        "lr": 3e-4,
        "grad_norm": 1.5,
        "tokens": 100,
        "samples": 4,
        "tokens_per_second": 12345.6,
        "peak_gib": 1.25,
        "seconds": float(number),
    }


VAL = {"step": 3, "val_loss": 1.5, "val_ppl": 4.48}


def test_each_record_is_a_line_of_json_at_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl", total=3, screen=io.StringIO())
    for count, record in enumerate([step(1), step(2), step(3), VAL], start=1):
        log(record)
        lines = (tmp_path / "log.jsonl").read_text().splitlines()
        assert len(lines) == count
        assert json.loads(lines[-1]) == record
    log.close()


def test_the_log_is_continued_never_rewritten(tmp_path: Path) -> None:
    for number in (1, 2):
        log = RunLog(tmp_path / "log.jsonl", total=2, screen=io.StringIO())
        log(step(number))
        log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2]


def test_a_terminal_shows_one_line_that_changes_and_keeps_validations(tmp_path: Path) -> None:
    screen = Terminal()
    log = RunLog(tmp_path / "log.jsonl", total=4, screen=screen)
    for record in (step(1), step(2), step(3), VAL, step(4)):
        log(record)
    log.close()
    assert screen.getvalue().count("\r\x1b[2K") == 6
    assert screen.getvalue().count("\n") == 1
    assert "step     3/4  val_loss 1.5000\n" in screen.getvalue()


def test_a_file_gets_about_twenty_plain_lines_and_each_validation(tmp_path: Path) -> None:
    screen = io.StringIO()
    log = RunLog(tmp_path / "log.jsonl", total=1000, screen=screen)
    for number in range(1, 1001):
        log(step(number))
    log(VAL)
    log.close()
    assert "\x1b" not in screen.getvalue()
    assert "\r" not in screen.getvalue()
    lines = screen.getvalue().splitlines()
    assert 20 <= len(lines) - 1 <= 22
    assert "step  1000/1000 100%  loss 2.000 (avg 2.000)  lr 3.0e-04  |g| 1.50  12,346 tok/s  1.2 GiB" in lines[-2]
    assert "val_loss 1.5000" in lines[-1]


def test_a_dumb_terminal_is_treated_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    screen = Terminal()
    log = RunLog(tmp_path / "log.jsonl", total=1, screen=screen)
    log(step(1))
    log.close()
    assert "\x1b" not in screen.getvalue()


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(5, "Input/output error")], ids=["pipe", "terminal"])
def test_the_log_goes_on_when_nobody_watches(tmp_path: Path, error: Exception) -> None:
    log = RunLog(tmp_path / "log.jsonl", total=2, screen=Gone(error))
    log(step(1))
    log(step(2))
    log.close()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_the_log_goes_on_when_stdout_is_closed_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stdout in (closed, None):
        monkeypatch.setattr("sys.stdout", stdout)
        log = RunLog(tmp_path / "log.jsonl", total=1)
        log(step(1))
        log.close()
        tell("nobody reads this")
        assert not is_terminal(stdout)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_ends_the_run_with_the_name_of_the_log() -> None:
    log = RunLog(Path("/dev/full"), total=1, screen=io.StringIO())
    with pytest.raises(ResourceError, match="Cannot write /dev/full: No space left on device"):
        log(step(1))
    os.dup2(os.open(os.devnull, os.O_WRONLY), log.file.fileno())  # so that what is left can be written
    log.close()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (6720, "1 h 52 min"),
        (360_000, "100 h 00 min"),
    ],
)
def test_a_duration_is_told_in_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("records", [[step(1)], [step(n, 3 / n) for n in range(1, 50)] + [VAL]], ids=["one", "many"])
def test_the_picture_is_a_png_of_sane_size(tmp_path: Path, records: list) -> None:
    plot_losses(records, tmp_path / "loss.png")
    content = (tmp_path / "loss.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(content[at : at + 4]) for at in (16, 20))
    assert (width, height) == (960, 660)
    assert 5_000 < len(content) < 200_000


def test_the_page_holds_the_summary_the_validations_and_what_to_type_next(tmp_path: Path) -> None:
    summary = {"base": "a/b", "steps": 1234, "train_loss": 0.5, "val_loss": None, "versions": {"torch": "2"}}
    write_report(tmp_path / "report.md", "A title", summary, [step(1), VAL], "python x.py")
    page = (tmp_path / "report.md").read_text()
    for line in ("# A title", "| base | a/b |", "| steps | 1,234 |", "| train loss | 0.5 |", "| 3 | 1.5000 | 4.48 |"):
        assert line in page.splitlines()
    assert "![losses](loss.png)" in page
    assert "python x.py" in page
