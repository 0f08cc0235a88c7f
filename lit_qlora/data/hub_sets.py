"""Data sets of the Hugging Face hub that are known by a name: repository, files, columns, and format of the records.

Layouts as published by their authors. qlora.py of Dettmers et al. 2023 calls them the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PARQUET = "refs/convert/parquet"  # the hub's own conversion: datasets >= 4 runs no loading script of a repository


@dataclass(frozen=True, kw_only=True)
class HubSet:
    """A row of HUB_SETS."""

    repo: str
    format: str
    """A format of lit_qlora.data.formats."""
    columns: tuple[str, ...]
    """Columns that the format reads."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Split -> pattern of its files; by default all files of the repository."""
    revision: str | None = None
    """Branch of the repository; by default main."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of datasets.load_dataset besides the repository."""
        given = {"data_files": dict(self.files), "revision": self.revision}
        return {name: value for name, value in given.items() if value}


_ALPACA = ("instruction", "input", "output")
HUB_SETS: dict[str, HubSet] = {
    "alpaca": HubSet(repo="tatsu-lab/alpaca", format="alpaca", columns=_ALPACA),
    "alpaca-clean": HubSet(repo="yahma/alpaca-cleaned", format="alpaca", columns=_ALPACA),
    "alpaca-gpt4": HubSet(repo="vicgalle/alpaca-gpt4", format="alpaca", columns=_ALPACA),
    "chip2": HubSet(repo="laion/OIG", format="chip2", columns=("text",), files={"train": "unified_chip2.jsonl"}),
    "dolly": HubSet(
        repo="databricks/databricks-dolly-15k", format="dolly", columns=("instruction", "context", "response")
    ),
    "flan": HubSet(repo="Muennighoff/flan", format="flan", columns=("inputs", "targets")),
    "flan-v2": HubSet(repo="SirNeural/flan_v2", format="flan", columns=("inputs", "targets")),
    "hh-rlhf": HubSet(repo="Anthropic/hh-rlhf", format="hh-rlhf", columns=("chosen",)),
    "lima": HubSet(repo="GAIR/lima", format="lima", columns=("conversations",)),
    "longform": HubSet(repo="akoksal/LongForm", format="longform", columns=("input", "output")),
    "oasst1": HubSet(repo="timdettmers/openassistant-guanaco", format="guanaco", columns=("text",)),
    "oasst1-trees": HubSet(
        repo="OpenAssistant/oasst1", format="oasst1", columns=("message_id", "parent_id", "role", "text")
    ),
    "red-dot": HubSet(
        repo="xiyuez/red-dot-design-award-product-description",
        format="red-dot",
        columns=("product", "category", "description"),
    ),
    "self-instruct": HubSet(
        repo="yizhongw/self_instruct",
        format="self-instruct",
        columns=("prompt", "completion"),
        files={"train": "self_instruct/train/*.parquet"},
        revision=PARQUET,
    ),
}
"""oasst1 is the best path of each conversation, as one text, 9,846 in all; oasst1-trees is all of its messages."""


def find_hub_set(path: str) -> HubSet | None:
    """The data set of this name, if there is one and no file or folder is called so; _ counts as -."""
    return None if Path(path).exists() else HUB_SETS.get(path.lower().replace("_", "-"))
