"""Prompts and answers that are made of columns."""

from pathlib import Path

import pytest

from lit_qlora.data.templates import Template
from lit_qlora.errors import DataError, UsageError
from lit_qlora.prompts.conversation import Conversation
from lit_qlora.settings import DataConfig
from tests.data.test_formats import read, said

ROW = {"product": "Beseye Pro", "category": "Camera", "description": "It sees.", "year": 2015}
TEMPLATES = ("Describe {product}, a {category} of {year}, in {{braces}}.", "{description}")


def test_any_columns_make_prompts_and_answers(tmp_path: Path) -> None:
    reading = read(tmp_path, [ROW], templates=TEMPLATES)
    asked = "Describe Beseye Pro, a Camera of 2015, in {braces}."
    assert list(map(said, reading.examples)) == [Conversation.of((asked, "It sees."))]
    assert (reading.format, reading.saw[:45]) == ("template", "product, category, year, description of colum")


def test_columns_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.template: no record has a column 'prodct' .* Did you mean product\?"):
        read(tmp_path, [ROW], templates=("{prodct}", "{description}"))
    with pytest.raises(DataError, match=r":2: no 'category' \(has: product, description, year\)"):
        read(tmp_path, [ROW, {name: ROW[name] for name in ROW if name != "category"}], templates=TEMPLATES)
    with pytest.raises(DataError, match=r":1: 'category' is list, not text"):
        read(tmp_path, [ROW | {"category": []}], templates=TEMPLATES)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Describe it.", "names no column. Write its name in braces"),
        ("{product", "A brace that is text is written twice"),
        ("product}", "A brace that is text is written twice"),
        ("{}", "a pair of braces holds the name of a column and nothing else"),
        ("{year:d}", "a pair of braces holds the name of a column and nothing else"),
        ("{year!r}", "a pair of braces holds the name of a column and nothing else"),
    ],
)
def test_a_text_that_is_no_template_is_refused(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Template.parse("data.template", text)


def test_one_of_both_texts_alone_is_refused() -> None:
    for settings in ({"template": "{a}"}, {"answer_template": "{a}"}):
        with pytest.raises(UsageError, match="Give both"):
            DataConfig(**settings)
    with pytest.raises(UsageError, match=r"data\.format and data\.columns would have no effect"):
        DataConfig(template="{a}", answer_template="{b}", format="alpaca")
