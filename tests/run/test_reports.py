"""What a run leaves to look at: the pictures, the page in Markdown, and the page that needs no other file."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lit_qlora.run.figures import inline, lengths_figure, losses_figure, plot_losses
from lit_qlora.run.page import add_section, table
from lit_qlora.run.reports import Answer, Outcome, one_line, unframed, write_page, write_report
from tests.test_report import VAL, step

FRAME = ("Below is an instruction that describes a task. Write a response.\n\n### Instruction:\n", "\n\n### Response:")
SUMMARY = {
    "base": "a/b",
    "adapter": "bnb.nf4 + LoRA r=8 on query,value",
    "precision": "bf16-true",
    "gpu": "none",
    "steps": 1234,
    "seconds": 61.0,
    "tokens_per_second": 1234.5,
    "peak_gib": 1.5,
    "trainable_parameters": 4194304,
    "frozen_parameters": 6738415616,
    "train_loss": 0.5,
    "val_loss": None,
    "versions": {"torch": "2.13.0"},
}


def outcome(**changes: Any) -> Outcome:
    fields: dict[str, Any] = {
        "title": "LoRA on <a/b>",
        "summary": SUMMARY,
        "records": [step(1), VAL, step(2), {**VAL, "step": 4, "val_loss": 1.25}],
        "lengths": [3, 5, 9],
        "limit": 6,
        "data": ["3 train / 1 val"],
        "config": "seed: 1\n",
        "hashes": {"base a/b": "0123abcd"},
        "following": "python x.py --a <b>",
    }
    return Outcome(**fields | changes)


class Reader(HTMLParser):
    """Collects the words of a page, its ids, and what it would load; complains about tags that are not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words, self.ids, self.loads = "", [], []  # type: ignore[var-annotated]
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Remember it."""
        given = dict(attributes)
        self.ids += [given["id"]] if "id" in given else []
        self.loads += [
            value for name in ("src", "href", "xlink:href", "data") if (value := given.get(name)) and value[0] != "#"
        ]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Remember it."""
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        """It must be the last that was opened."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Remember them."""
        self.words += data


@pytest.mark.parametrize("records", [[step(1)], [step(n, 3 / n) for n in range(1, 50)] + [VAL]], ids=["one", "many"])
def test_the_picture_is_a_png_of_sane_size(tmp_path: Path, records: list) -> None:
    plot_losses(records, tmp_path / "loss.png")
    content = (tmp_path / "loss.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(content[at : at + 4]) for at in (16, 20))
    assert (width, height) == (960, 660)
    assert 5_000 < len(content) < 200_000


def test_the_picture_shows_each_loss_its_average_the_validations_the_best_and_the_rate() -> None:
    records = [step(1, 4.0), VAL, step(2, 2.0), {"step": 4, "val_loss": 1.25}, {"step": 6, "val_loss": math.nan}]
    top, bottom = losses_figure(records).axes
    lines = [list(line.get_ydata()) for line in top.lines]
    average = (0.5 * 4 + 2) / 1.5
    assert lines == [
        [4.0, 2.0],
        [4.0, pytest.approx(average)],
        [1.5, 1.25, pytest.approx(math.nan, nan_ok=True)],
        [1.25],
    ]
    assert [str(line.get_label()).split()[0] for line in top.lines] == ["training", "running", "validation", "best"]
    assert list(top.lines[-1].get_xdata()) == [4]
    assert list(bottom.lines[0].get_ydata()) == [3e-4, 3e-4]


@pytest.mark.parametrize(
    ("first", "last", "scale"),
    [(4.0, 0.1, "log"), (4.0, 0.41, "linear"), (4.0, -1.0, "linear"), (0.0, 9.0, "linear"), (1e-320, 1e308, "linear")],
)
def test_the_axis_of_losses_is_logarithmic_if_they_span_more_than_a_factor_of_ten(
    first: float, last: float, scale: str
) -> None:
    top = losses_figure([step(1, first), {"step": 1, "val_loss": last}]).axes[0]
    assert top.get_yscale() == scale
    assert top.get_ylim()[0] <= min(first, last)


def test_the_markdown_page_holds_the_summary_the_validations_and_what_to_type_next(tmp_path: Path) -> None:
    best = [Answer(prompt="Q: a\nb", wanted="yes", said="yes", score=1.0)]
    write_report(tmp_path / "report.md", outcome(best=best))
    page = (tmp_path / "report.md").read_text()
    lines = page.splitlines()
    for line in ("# LoRA on <a/b>", "| base | a/b |", "| steps | 1,234 |", "| train loss | 0.5 |"):
        assert line in lines
    for line in ("| step | val_loss | val_ppl |", "| 3 | 1.5000 | 4.4800 |", "**Best, chrF 1.00:** Q: a b"):
        assert line in lines
    for line in ("| metric | before | after | best |", "| val_loss | 1.5000 | 1.2500 | 1.2500 (step 4) |"):
        assert line in lines
    assert "![losses](loss.png)" in page
    assert "python x.py" in page


def test_the_page_needs_no_other_file_is_well_formed_and_dark_where_the_reader_asks_for_it(tmp_path: Path) -> None:
    write_page(tmp_path / "report.html", outcome())
    page = (tmp_path / "report.html").read_text()
    reader = Reader(page)
    assert reader.loads == []
    assert "prefers-color-scheme: dark" in page
    assert not re.findall(r"(?:fill|stroke): #(?:000000|ffffff)", page)  # figures take the colours of the page
    assert "<script" not in page
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert len(reader.ids) == len(set(reader.ids))
    assert set(re.findall(r"(?:url\(|href=\")#([\w-]+)", page)) <= set(reader.ids)


def test_the_page_shows_curves_lengths_answers_settings_versions_and_hashes(tmp_path: Path) -> None:
    answers = {
        "best": [Answer(prompt="<b>", wanted="w1", said="s1", score=0.9)],
        "worst": [Answer(prompt="p2", wanted="w2", said="s2", score=0.1)],
        "said": [{"step": 0, "prompt": "p3", "answer": "a0"}, {"step": 4, "prompt": "p3", "answer": "a4"}],
    }
    write_page(tmp_path / "report.html", outcome(**answers))
    page = (tmp_path / "report.html").read_text()
    words = Reader(page).words
    assert page.count("<svg") == 2
    for text in ("LoRA on <a/b>", "loss per labelled token", "validation", "tokens of a sample", "limit, 6 tokens"):
        assert text in words
    for text in ("better, from 1.5000", "0.90", "<b>", "s2", "w2", "a0", "a4", "seed: 1", "2.13.0", "0123abcd"):
        assert text in words
    assert "python x.py --a <b>" in words
    assert words.count("p3") == 1


def test_without_answers_the_page_says_where_the_loss_is_small_and_large(tmp_path: Path) -> None:
    write_page(tmp_path / "report.html", outcome(best=[Answer(prompt="p", wanted="w", said=None, score=0.25)]))
    words = Reader((tmp_path / "report.html").read_text()).words
    assert "by loss of the wanted answer" in words
    assert "0.25" in words
    assert "--eval.generate 20" in words


def test_an_answer_stands_beside_the_one_before_training_and_the_wanted_one(tmp_path: Path) -> None:
    best = [Answer(prompt=f"{FRAME[0]}Why?{FRAME[1]}", wanted="w1", said="s1", score=0.9, before="b1")]
    write_page(tmp_path / "report.html", outcome(best=best, frames=[FRAME]))
    page = (tmp_path / "report.html").read_text()
    cells = re.findall(r'<td data-name="(\w+)">(.*?)</td>', page)
    assert [(name, re.sub("<.*?>", "", text)) for name, text in cells if name not in ("chrF", "prompt")] == [
        ("before", "b1"),
        ("after", "s1"),
        ("wanted", "w1"),
    ]
    assert re.search(r"Why\?<details>.*?Below is an instruction.*?</details>", page, re.DOTALL)
    assert page.count("Below is an instruction") == 1


def test_the_words_of_a_prompt_style_are_taken_off_a_prompt() -> None:
    frames = [("Q: ", "\nA:"), ("Q: Now: ", "\nA:")]
    assert unframed("Q: Now: what?\nA:", frames) == ("Q: Now: ...\nA:", "what?")
    assert unframed("Q: what?\nA:", frames) == ("Q: ...\nA:", "what?")
    assert unframed("what?", frames) == ("", "what?")


def test_a_card_says_if_a_metric_is_better_or_worse(tmp_path: Path) -> None:
    before = {"step": 0, "val_loss": 1.5, "val_accuracy": 0.5, "kl_to_base": 0.25}
    after = {"step": 2, "val_loss": 1.25, "val_accuracy": 0.25, "kl_to_base": math.nan}
    write_page(tmp_path / "report.html", outcome(records=[before, after]))
    page = (tmp_path / "report.html").read_text()
    for told in ("better, from 1.5000", "worse, from 0.5000", "worse, from 0.2500"):
        assert f">{told}<" in page


def test_a_section_that_is_added_to_a_page_comes_first(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_page(path, outcome())
    add_section(path, "Tasks <1>", table([["base", 0.25]], ["model", "accuracy"]))
    words = Reader(path.read_text()).words
    assert words.index("Tasks <1>") < words.index("accuracy") < words.index("Loss")


def test_a_page_of_a_run_without_validation_has_no_such_sections(tmp_path: Path) -> None:
    write_page(tmp_path / "report.html", outcome(records=[step(1)]))
    words = Reader((tmp_path / "report.html").read_text()).words
    for title in ("Validations", "Best and worst", "Answers to the prompts"):
        assert title not in words


def test_a_figure_in_a_page_is_the_same_bytes_each_time() -> None:
    one, two = (inline(lengths_figure([3, 4, 9], 6), "x", "lengths") for _ in range(2))
    assert one == two
    assert 'aria-label="lengths"' in one


def test_a_long_run_makes_a_page_of_sane_size(tmp_path: Path) -> None:
    write_page(tmp_path / "report.html", outcome(records=[step(n, 3 / n**0.5 + n % 7 / 9) for n in range(1, 20_001)]))
    assert (tmp_path / "report.html").stat().st_size < 2_000_000


def test_texts_are_shortened_in_the_middle() -> None:
    assert one_line("a \n b") == "a b"
    assert one_line("x" * 300 + "y" * 300, 20) == "x" * 10 + " ... " + "y" * 10
