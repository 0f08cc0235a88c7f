"""What people see of a run while it goes on: the line on the terminal, and the log."""

import io
import json
import os
from pathlib import Path

import pytest

from lit_qlora.errors import ResourceError
from lit_qlora.report import (
    Average,
    RunLog,
    duration,
    is_terminal,
    metrics,
    read_records,
    short,
    smaller_is_better,
    tell,
)


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
    assert "step     3/4  val_loss 1.5000  val_ppl 4.4800\n" in screen.getvalue()
    assert "val 1.500" in screen.getvalue().rpartition("\n")[2]


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
    assert 20 <= len(lines) - 1 <= 23
    assert "step  1000/1000 100%  loss 2.000 (ema 2.000)  lr 3.0e-04  |g| 1.50  12,346 tok/s  1.2 GiB" in lines[-2]
    assert "val_loss 1.5000" in lines[-1]


def test_the_line_of_a_step_shows_its_accuracy_and_the_last_validation() -> None:
    screen = io.StringIO()
    log = RunLog(None, total=4, screen=screen)
    log(VAL)
    log(step(4) | {"accuracy": 0.71234})
    log.close()
    assert "loss 2.000 (ema 2.000)  acc 0.712  val 1.500  lr" in screen.getvalue()


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


def test_a_line_that_is_rewritten_never_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    screen = Terminal()
    log = RunLog(tmp_path / "log.jsonl", total=2, screen=screen)
    log(step(1))
    assert len(screen.getvalue().removeprefix("\r\x1b[2K")) == 39
    log.close()


def test_the_average_and_the_last_validation_are_known_after_an_interruption(tmp_path: Path) -> None:
    screen = io.StringIO()
    records = [step(1, 4.0), step(2, 2.0), {"step": 2, "val_loss": 3.25}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    log = RunLog(tmp_path / "log.jsonl", total=3, screen=screen)
    log(step(3, 1.0))
    log.close()
    assert "loss 1.000 (ema 1.714)  val 3.250" in screen.getvalue()  # (4 / 4 + 2 / 2 + 1) / 1.75


def test_an_average_weighs_the_first_loss_as_the_others_and_remembers_ten_steps_at_most() -> None:
    assert list(map(Average(), [3.0] * 40)) == pytest.approx([3.0] * 40)
    average = Average()
    values = [average(9.0) for _ in range(100)] + [average(1.0) for _ in range(10)]
    assert values[-1] == pytest.approx(1 + 8 * 0.9**10)


def test_an_average_of_a_loss_that_falls_from_the_first_step_on_is_less_than_three_steps_late() -> None:
    losses = [10 * 0.8**step for step in range(30)]
    values = list(map(Average(), losses))
    assert all(value < earlier for value, earlier in zip(values[3:9], losses, strict=False))


def test_a_terminal_shows_what_a_validation_measures_and_a_file_does_not() -> None:
    for screen, shown in (
        (Terminal(), "\r\x1b[2K step    30/400   8%  validating: answers, 16 of 20"),
        (io.StringIO(), ""),
    ):
        log = RunLog(None, total=400, screen=screen)
        log.validating(30, "answers, 16 of 20")
        assert screen.getvalue() == shown
        log.close()


def test_what_is_left_is_estimated_from_the_steps_after_the_first(tmp_path: Path) -> None:
    """The first step takes a minute and the others two seconds; the process began at step 10."""
    screen = io.StringIO()
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(step(n)) + "\n" for n in range(1, 11)))
    log = RunLog(tmp_path / "log.jsonl", total=110, screen=screen)
    for number in range(11, 16):
        log({**step(number), "seconds": 10.0 + 60 + 2 * (number - 11)})
    log.close()
    assert "  time    about 3 min 10 s to go\n" in screen.getvalue()
    assert "ETA 3 min 10 s" in screen.getvalue()


def test_trackers_get_every_record(tmp_path: Path) -> None:
    got: list[dict] = []
    log = RunLog(tmp_path / "log.jsonl", total=2, screen=io.StringIO())
    log.trackers.append(got.append)
    for record in (step(1), VAL, step(2)):
        log(record)
    log.close()
    assert got == [step(1), VAL, step(2)]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.43214, "0.4321"),
        (12.345, "12.35"),
        (1234.5, "1,234"),
        (1234567, "1,234,567"),
        (1.5e-7, "1.50e-07"),
        (0.0, "0.0000"),
        (3.2e9, "3.20e+09"),
        ("words", "words"),
    ],
)
def test_values_are_written_for_people(value: object, text: str) -> None:
    assert short(value) == text


def test_the_metrics_of_validations_are_found_by_name() -> None:
    records = [{"step": 0, "val_loss": 3.0}, step(1), {"step": 1, "val_loss": 2.0, "chrf": 0.5}]
    assert metrics(records) == {"val_loss": [(0, 3.0), (1, 2.0)], "chrf": [(1, 0.5)]}


def test_errors_are_better_when_smaller() -> None:
    errors = {"val_loss", "val_ppl", "kl_to_base", "wikitext/word_perplexity"}
    others = {"val_accuracy", "chrf", "bleu", "tiny_world_qa/acc", "task/filter"}
    assert {name for name in errors | others if smaller_is_better(name)} == errors


def test_a_log_with_torn_lines_is_read_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    torn = b'\xff\x00\x80garbage\n[1]\n5\nnull\n{"step": "x"}\n{"step": -1}\n{"loss": 1}\n{"st'
    path.write_bytes(json.dumps(step(1)).encode() + b"\n" + torn)
    assert list(read_records(path)) == [step(1)]
    log = RunLog(path, total=2, screen=io.StringIO())
    assert log.start == 1
    log.close()


@pytest.mark.parametrize("name", [name for name in step(1) if name != "step"])
@pytest.mark.parametrize("value", [None, [1], {}, "x", True, 10**400, float("nan"), ...])
def test_a_step_without_one_of_its_numbers_is_no_record(tmp_path: Path, name: str, value: object) -> None:
    record = {key: one for key, one in (step(1) | {name: value}).items() if one is not ...}
    (tmp_path / "log.jsonl").write_text(json.dumps(record) + "\n")
    is_skipped = name == "grad_norm" and isinstance(value, float)
    assert len(list(read_records(tmp_path / "log.jsonl"))) == is_skipped


@pytest.mark.parametrize(
    ("record", "read"),
    [
        (VAL | {"f1": [1], "acc": "x", "chrf": None, "bleu": 0.5}, VAL | {"bleu": 0.5}),
        ({"step": 1, "prompt": "a", "answer": "b"}, {"step": 1, "prompt": "a", "answer": "b"}),
        ({"step": 1, "prompt": "a"}, None),
        ({"step": 1, "prompt": "a", "answer": 5}, None),
        ({"step": 1, "prompt": "a", "answer": "b", "wanted": "c"}, None),
        ({"step": 1, "prompt": "a", "answer": "b", "wanted": "c", "chrf": "x"}, None),
    ],
)
def test_what_no_metric_and_no_answer_has_is_left_out(tmp_path: Path, record: dict, read: dict | None) -> None:
    (tmp_path / "log.jsonl").write_text(json.dumps(record) + "\n")
    assert list(read_records(tmp_path / "log.jsonl")) == ([] if read is None else [read])
