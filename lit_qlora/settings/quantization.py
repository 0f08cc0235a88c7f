"""Settings of the storage of a base: one for all its matrices, others for some layers, or a budget that decides."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from lit_qlora.settings.checks import check, fit
from lit_qlora.settings.limits import Pattern
from lit_qlora.settings.schemes import Scheme

UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
"""Bytes of each unit of a budget."""
_BUDGET = re.compile(rf"(\d+(?:\.\d+)?)\s*({'|'.join(UNITS)}|bits)", re.IGNORECASE)


class Quantization(NamedTuple):
    """The schemes of the matrices of a base."""

    quantize: Scheme = "none"
    quantize_head: bool = False
    """Quantise the output head too."""
    layers: tuple[tuple[str, Scheme], ...] = ()
    """Other schemes of some layers: patterns as in lora.rank_pattern; the first that matches decides."""

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Quantization":
        """Read it from the settings of a run or from its manifest, which name the parts alike.

        Raises:
            UsageError: for a part of another type, or a scheme that is not known.
        """
        layers: dict[str, Scheme] = fit(facts.get("quantize_layers", {}), dict[Pattern, Scheme], "quantize_layers")
        return cls(
            fit(facts.get("quantize", "none"), Scheme, "quantize"),
            fit(facts.get("quantize_head", False), bool, "quantize_head"),
            tuple(layers.items()),
        )

    @property
    def schemes(self) -> set[Scheme]:
        """The schemes that a layer can have."""
        return {self.quantize, *(scheme for _, scheme in self.layers)}

    def facts(self) -> dict[str, Any]:
        """Its parts as `of` reads them."""
        more = {"quantize_layers": dict(self.layers)} if self.layers else {}
        return {"quantize": self.quantize, "quantize_head": self.quantize_head, **more}

    def describe(self) -> str:
        """Name it in a few words, such as "bnb.nf4 (3 of quantize_layers bnb.int8)"."""
        counts = Counter(scheme for _, scheme in self.layers)
        others = ", ".join(f"{count} {scheme}" for scheme, count in counts.items())
        return f"{self.quantize} (quantize_layers: {others})" if others else self.quantize


class Budget(NamedTuple):
    """Room for the weights of a base."""

    amount: float
    bits: bool
    """Of bits a weight, on average over the linear layers; else of bytes, for all weights."""

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read "14GB", "900MiB" or "5.2bits".

        Raises:
            UsageError: for anything else.
        """
        found = _BUDGET.fullmatch(text.strip())
        check(
            found is not None and float(found[1]) > 0,
            f"quantize_budget must be a size such as 14GB, or bits a weight such as 5.2bits, got {text!r}.",
        )
        assert found is not None
        unit = found[2].lower()
        return cls(float(found[1]) * UNITS.get(unit, 1.0), unit == "bits")


def check_budget(quantize: str, head: bool, layers: Mapping[str, Scheme], budget: str | None) -> None:
    """Raise UsageError for a budget beside settings that decide about layers themselves."""
    if budget is None:
        return
    Budget.parse(budget)
    check(quantize == "auto", f"quantize_budget needs --quantize auto, got {quantize}: the budget decides.")
    check(not head and not layers, "quantize_budget decides about each layer: no quantize_head, no quantize_layers.")
