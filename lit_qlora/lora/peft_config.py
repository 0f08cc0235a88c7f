"""The settings in adapter_config.json of a PEFT adapter that we support."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lit_qlora.errors import CheckpointError
from lit_qlora.lora.peft_experts import is_targeted, is_understood
from lit_qlora.settings import first_match, is_pattern

_UNDERSTOOD = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("init_lora_weights", "use_dora", "modules_to_save", "trainable_token_indices", "ensure_weight_tying"),
    *("target_parameters", "peft_version"),
}
_HARMLESS = {
    *("task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),  # the tensors' names tell
    *("fan_in_fan_out", "eva_config", "megatron_core", "qalora_group_size"),
}
"""Settings without influence on the function of a saved adapter. Any other must be off."""
_KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that do not change the base; pissa, olora and others do."""


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """Ranks, scales and targets in adapter_config.json."""

    r: int
    alpha: float
    dropout: float = 0.0
    rank_stabilized: bool = False
    """Scale B A by alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2023)."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Pattern for the end of a path -> rank of its modules."""
    alphas: Mapping[str, float] = field(default_factory=dict)
    dora: bool = False
    tokens: tuple[int, ...] = ()
    """Tokens with trained embeddings."""
    head_rows: bool = False
    """True if the head's rows of these tokens were trained too."""
    whole: bool = False
    """True if modules were trained as a whole: all embeddings, or routers."""
    parameters: tuple[str, ...] = ()
    """Ends of the names of parameters that are adapted by themselves, see lit_qlora.lora.peft_experts."""
    version: str = ""
    """Of the PEFT that wrote it, if it says so."""

    @classmethod
    def parse(cls, content: Mapping[str, Any], location: str) -> "PeftConfig":
        """Read adapter_config.json. Raises CheckpointError that names a setting we do not support."""
        if content.get("peft_type", "LORA") != "LORA":
            raise CheckpointError(f"{location} holds a {content['peft_type']} adapter; only LORA is understood.")
        if (start := content.get("init_lora_weights")) not in _KEEPS_BASE:
            raise CheckpointError(
                f"{location} was trained with init_lora_weights = {start!r}, so not on the published base.\n"
                "Save it with PEFT's path_initial_model_for_weight_conversion, which makes an ordinary adapter of it."
            )
        for key, value in content.items():
            if key not in _UNDERSTOOD | _HARMLESS and value not in (None, False, "none", [], {}):
                raise CheckpointError(f"{location} uses {key} = {value!r}, which is not understood here.")
        try:
            config = cls(
                r=int(content["r"]),
                alpha=float(content["lora_alpha"]),
                dropout=float(content.get("lora_dropout") or 0),
                rank_stabilized=bool(content.get("use_rslora")),
                ranks={key: int(value) for key, value in (content.get("rank_pattern") or {}).items()},
                alphas={key: float(value) for key, value in (content.get("alpha_pattern") or {}).items()},
                dora=bool(content.get("use_dora")),
                tokens=_tokens(content.get("trainable_token_indices"), location),
                head_rows=_modules(content.get("trainable_token_indices")) > 1,
                whole=bool({*(content.get("modules_to_save") or ())} - {"classifier", "score"}),
                parameters=tuple(map(str, content.get("target_parameters") or ())),
                version=str(content.get("peft_version") or ""),
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"{location}: not a PEFT configuration: {error}.") from None
        if unknown := [name for name in config.parameters if not is_understood(name)]:
            raise CheckpointError(f"{location} uses target_parameters = {unknown}, which is not understood here.")
        if wrong := [key for key in (*config.ranks, *config.alphas) if not is_pattern(key)]:
            raise CheckpointError(f"{location}: {wrong[0]!r} is not a regular expression of few repeats.")
        if min([config.r, *config.ranks.values()]) < 1 or not 0 <= config.dropout < 1:
            raise CheckpointError(f"{location}: a rank below 1, or a dropout outside [0, 1).")
        if not all(0 < alpha < math.inf for alpha in (config.alpha, *config.alphas.values())):
            raise CheckpointError(f"{location}: an alpha that is not above 0 and finite.")
        return config

    def rank(self, module: str) -> int:
        """Return the rank of the module with this path."""
        return int(first_match(self.ranks, self._key(module), self.r))

    def scale(self, module: str) -> float:
        """Return the factor of B A of the module."""
        alpha = first_match(self.alphas, self._key(module), self.alpha)
        return alpha / self.rank(module) ** (0.5 if self.rank_stabilized else 1)

    def _key(self, module: str) -> str:
        """The path that PEFT compares with patterns."""
        return f"{module}.weight" if is_targeted(f"{module}.weight", self.parameters) else module


def _tokens(value: Any, location: str) -> tuple[int, ...]:
    """Read PEFT's trainable_token_indices, a list or a table with embedding and head."""
    if isinstance(value, dict):
        first, *others = value.values() or [None]
        if len(others) > 1 or any(other != first for other in others):
            raise CheckpointError(
                f"{location} uses trainable_token_indices of several modules, which is not understood but for the same "
                "tokens of embedding and head."
            )
        value = first
    return tuple(int(token) for token in value or ())


def _modules(value: Any) -> int:
    """Count the modules of PEFT's trainable_token_indices."""
    return len(value) if isinstance(value, dict) else int(bool(value))
