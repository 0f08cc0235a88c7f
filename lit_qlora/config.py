"""What a model is: sizes and choices that a checkpoint fixes, with no code attached."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from lit_qlora.errors import CheckpointError, did_you_mean

FILE_NAME = "model_config.json"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer.

    Every field is a fact that a checkpoint fixes; nothing here can be tuned.
    Shapes are written with these letters throughout the package:
    B batch, T tokens, E n_embd, H n_head, K n_kv_head, D head_size, F ffn_size, V vocab_size.
    """

    name: str
    """What the model is called, e.g. meta-llama/Llama-2-7b-hf."""
    family: str = "llama"
    """The row of lit_qlora.families that it was converted with."""
    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int
    head_size: int
    ffn_size: int
    vocab_size: int
    """Rows of the embedding; can exceed the number of tokens that the tokenizer knows."""
    block_size: int
    """Most tokens the model has been made for."""
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    ffn: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    qkv_bias: bool = False
    projection_bias: bool = False
    mlp_bias: bool = False
    parallel_residual: bool = False
    """Attention and MLP read the same input and are added together (GPT-NeoX), instead of one after the other."""
    sliding_window: int | None = None
    """A token attends to this many tokens, itself included; None: to all before it."""
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0
    """Share of head_size that is rotated; the rest carries no position."""
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_block_size: int = 8192
    """Context of the pre-training that llama3 scaling starts from."""
    tied_head: bool = False
    """The output head is the embedding."""

    def __post_init__(self) -> None:
        """Refuse values of the wrong type and sizes that cannot belong together."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not _fits(value, field.type):
                kinds = [getattr(kind, "__name__", str(kind)) for kind in get_args(field.type) or [field.type]]
                raise CheckpointError(f"{self.name}: {field.name} must be {' or '.join(kinds)}, got {value!r}.")
        for name in ("n_layer", "n_embd", "n_head", "n_kv_head", "head_size", "ffn_size", "vocab_size", "block_size"):
            if getattr(self, name) < 1:
                raise CheckpointError(f"{self.name}: {name} must be at least 1, got {getattr(self, name)}.")
        if self.n_head % self.n_kv_head:
            raise CheckpointError(
                f"{self.name}: n_head must be a multiple of n_kv_head, got {self.n_head} and {self.n_kv_head}."
            )
        if not 0 < self.rope_fraction <= 1 or self.rotated % 2:
            raise CheckpointError(
                f"{self.name}: rope_fraction {self.rope_fraction} of head_size {self.head_size} is not an even size."
            )

    @property
    def rotated(self) -> int:
        """How many of head_size features carry position."""
        return int(self.rope_fraction * self.head_size)

    def save(self, directory: Path) -> None:
        """Write model_config.json into `directory`."""
        (directory / FILE_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "ModelConfig":
        """Read model_config.json. Raises CheckpointError for what is missing, unknown or of the wrong type."""
        path = Path(directory) / FILE_NAME
        if not path.is_file():
            raise CheckpointError(missing_checkpoint(Path(directory)))
        try:
            values: dict[str, Any] = json.loads(path.read_text())
        except ValueError as error:
            raise CheckpointError(f"{path}: not valid JSON: {error}.") from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: expected an object, found {type(values).__name__}.")
        if unknown := sorted(set(values) - {field.name for field in fields(cls)}):
            raise CheckpointError(f"{path}: unknown fields {unknown}; written by a newer version?")
        try:
            return cls(**values)
        except TypeError as error:
            raise CheckpointError(f"{path}: {error}.") from None


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_args(kind):
        return any(_fits(value, choice) for choice in get_args(kind))
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def missing_checkpoint(directory: Path) -> str:
    """Why `directory` is no checkpoint, and what to do about it."""
    if not directory.exists():
        parent = directory.parent
        beside = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
        hint = did_you_mean(directory.name, beside)
        return f"{directory} does not exist.{hint}" + ("" if hint else _found_checkpoints())
    if (directory / "config.json").is_file():
        return (
            f"{directory} holds a Hugging Face model that is not converted yet.\n"
            f"Convert it: python scripts/convert_hf_checkpoint.py --checkpoint_dir {directory}"
        )
    return f"{directory} has no {FILE_NAME}, so it is not a checkpoint.{_found_checkpoints()}"


def _found_checkpoints() -> str:
    found = sorted(str(p.parent) for p in Path("checkpoints").glob(f"*/*/{FILE_NAME}"))
    return f"\nCheckpoints here: {', '.join(found[:5])}" if found else ""
