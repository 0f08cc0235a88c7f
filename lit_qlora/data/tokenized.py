"""Records that are token ids already."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from lit_qlora.data.samples import Sample
from lit_qlora.errors import DataError

IGNORED = -100
"""The label of a token that the loss does not count, as in transformers."""


class Tokenized(NamedTuple):
    """A record that is token ids already."""

    sample: Sample
    location: str = ""


def read_tokenized(record: Mapping[str, Any]) -> Tokenized:
    """{"input_ids": [...], "labels": [...]}: a label is the token of its own position, or -100 for none.

    Without labels every token is labelled. Padding, which attention_mask marks with 0, is left out.

    Raises:
        DataError: if the columns do not fit each other.
    """
    ids = _whole_numbers(record, "input_ids")
    labels = _whole_numbers(record, "labels") if record.get("labels") is not None else ids
    seen = _whole_numbers(record, "attention_mask") if record.get("attention_mask") is not None else [1] * len(ids)
    for name, values in (("labels", labels), ("attention_mask", seen)):
        if len(values) != len(ids):
            raise DataError(f"{name!r} has {len(values)} entries, 'input_ids' has {len(ids)}")
    if set(seen) - {0, 1} or _changes(seen) > 2 or (_changes(seen) == 2 and seen[0] == 1):
        raise DataError("'attention_mask' marks padding between tokens; a record is one text")
    kept = [i for i, flag in enumerate(seen) if flag]
    tokens, targets = [ids[i] for i in kept], [labels[i] for i in kept]
    if len(tokens) < 2:
        raise DataError("'input_ids' holds no token that another one predicts")
    for i, (token, target) in enumerate(zip(tokens, targets, strict=True)):
        if target not in (token, IGNORED):
            raise DataError(
                f"'labels' has {target} at {i}, neither {IGNORED} nor 'input_ids' there, {token}. Are they shifted?"
            )
    trained = np.array(targets) != IGNORED
    trained[0] = False  # nothing predicts the first token
    return Tokenized(Sample(np.array(tokens, np.int32), trained))


def _whole_numbers(record: Mapping[str, Any], column: str) -> Sequence[int]:
    value = record.get(column)
    if not isinstance(value, list) or not all(type(one) is int and -(2**31) <= one < 2**31 for one in value):
        raise DataError(f"{column!r} is no list of whole numbers")
    return value


def _changes(flags: Sequence[int]) -> int:
    """Count the neighbours that differ."""
    return sum(a != b for a, b in pairwise(flags))
