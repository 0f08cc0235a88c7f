"""Data sets that are known by name: what is asked of the hub, and what their records become."""

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lit_qlora.data import hub_sets, sources
from lit_qlora.data.examples import read_examples
from lit_qlora.data.formats import FORMATS
from lit_qlora.data.hub_sets import HUB_SETS, HubSet
from lit_qlora.data.sources import Source, find_sources
from lit_qlora.errors import DataError
from lit_qlora.settings import DataConfig
from tests.conftest import ROOT

TREE = {"role": "prompter", "rank": None, "deleted": False, "lang": "en"}
PUBLISHED: dict[str, list[dict[str, Any]]] = {
    "alpaca": [{"instruction": "Ask.", "input": "it", "output": "Say.", "text": "Below is an instruction ..."}],
    "alpaca-clean": [{"output": "Say.", "instruction": "Ask.", "input": ""}],
    "alpaca-gpt4": [{"instruction": "Ask.", "input": "", "output": "Say.", "text": "Below ..."}],
    "chip2": [{"text": "<human>: Ask.\n<bot>: Say.", "metadata": {"source": "unified_chip2"}}],
    "dolly": [{"instruction": "Ask.", "context": "it", "response": "Say.", "category": "open_qa"}],
    "flan": [{"inputs": "Ask.", "targets": "Say.", "task": "anli"}],
    "flan-v2": [{"inputs": "Ask.", "targets": "Say.", "task": "cot"}],
    "hh-rlhf": [{"chosen": "\n\nHuman: Ask.\n\nAssistant: Say.", "rejected": "\n\nHuman: Ask.\n\nAssistant: No."}],
    "lima": [{"conversations": ["Ask.", "Say."], "source": "stackexchange"}],
    "longform": [{"input": "Ask.", "output": "Say.", "source": "C4", "subset": "c4"}],
    "oasst1": [{"text": "### Human: Ask.### Assistant: Say."}],
    "oasst1-trees": [
        {"message_id": "a", "parent_id": None, "text": "Ask.", **TREE},
        {"message_id": "b", "parent_id": "a", "text": "No.", **TREE, "role": "assistant", "rank": 1},
        {"message_id": "c", "parent_id": "a", "text": "Say.", **TREE, "role": "assistant", "rank": 0},
    ],
    "red-dot": [{"product": "Ask.", "category": "Lamps", "description": "Say.", "text": "Product Name: ..."}],
    "self-instruct": [{"prompt": "Ask.", "completion": "Say."}],
}
"""Records of each data set, with the columns that its authors publish."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """A hub that has all data sets; what it was asked."""
    asked: list[tuple[Any, ...]] = []
    rows = {row.repo: PUBLISHED[name] for name, row in HUB_SETS.items()}

    def load_dataset(repo: str, config: str | None, **arguments: Any) -> dict[str, list[dict[str, Any]]]:
        asked.append((repo, config, arguments))
        return {"test": [], "train": rows[repo]}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    sources._hub.cache_clear()
    yield asked
    sources._hub.cache_clear()


@pytest.mark.parametrize("name", HUB_SETS)
def test_the_records_of_a_name_are_read_in_its_format(name: str, hub: list[tuple[Any, ...]]) -> None:
    known = HUB_SETS[name]
    (source,), val = find_sources([f"{name}*2"], None)
    assert (source, val) == (Source(name, "train", 2.0), None)
    reading = read_examples(source)
    assert hub == [(known.repo, None, known.arguments)]
    assert reading.format == known.format
    assert set(known.columns) <= set(PUBLISHED[name][0])
    assert reading.unread.red() == []
    (example,) = reading.examples
    assert example.output == "Say."
    assert "Ask." in example.instruction
    assert example.location.startswith(f"{name} (hf:{known.repo}, train): row ") or known.format == "oasst1"


def test_a_format_that_is_given_comes_before_that_of_the_name(hub: list[tuple[Any, ...]]) -> None:
    (source,), _ = find_sources(["Alpaca_GPT4"], None)
    assert read_examples(source, format="text").examples[0].output == "Below ..."
    assert read_examples(source, columns="text:output,output:instruction").examples[0].output == "Below ..."


def test_a_file_of_the_same_name_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: list[tuple[Any, ...]]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dolly").mkdir()
    (tmp_path / "dolly/train.jsonl").write_text(json.dumps(PUBLISHED["alpaca"][0]))
    assert find_sources(["dolly"], None)[0] == [Source("dolly/train.jsonl")]
    assert hub == []


def test_only_the_files_of_a_name_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("unified_chip2", "<human>: Ask.\n<bot>: Say."), ("unified_basic", "<human>: No.\n<bot>: No.")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    chip2 = HubSet(**vars(HUB_SETS["chip2"]) | {"repo": str(tmp_path)})
    monkeypatch.setitem(hub_sets.HUB_SETS, "chip2", chip2)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    sources._hub.cache_clear()
    (source,), _ = find_sources(["chip2"], None)
    assert [example.output for example in read_examples(source).examples] == ["Say."]
    sources._hub.cache_clear()


def test_without_a_network_the_message_names_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    sources._hub.cache_clear()
    refused = r"dolly \(hf:databricks/databricks-dolly-15k\) cannot be loaded: Couldn't .*\nIf this machine is offline"
    with pytest.raises(DataError, match=refused):
        find_sources(["dolly"], None)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        DataError, match=r"data.path doly does not exist\. Did you mean dolly\?\nData sets .*: alpaca, "
    ):
        find_sources(["doly"], None)
    with pytest.raises(DataError, match=r"dolly\.json does not exist\.$"):
        find_sources(["dolly.json"], None)


def test_every_name_has_a_format_that_reads_its_columns() -> None:
    for name, known in HUB_SETS.items():
        assert set(FORMATS[known.format].needs) <= set(known.columns), name


def test_docs_and_help_list_these_names() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (.+?) \| (.+?) \| (.+?) \|$", (ROOT / "docs/data_sets.md").read_text(), re.M)

    def files(known: HubSet) -> str:
        of = f" of {known.revision}" if known.revision else ""
        return "".join(f", {pattern}{of}" for pattern in known.files.values())

    assert rows == [
        (name, known.repo + files(known), known.format, ", ".join(known.columns)) for name, known in HUB_SETS.items()
    ]
    said = " ".join(inspect.getsource(DataConfig).split()).split("a data set by name: ")[1].split(" (see")[0]
    assert said.replace(" or ", ", ").split(", ") == list(HUB_SETS)
