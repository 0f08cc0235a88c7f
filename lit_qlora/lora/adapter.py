"""Adapters on disk, in PEFT's layout, so that peft.PeftModel.from_pretrained loads the folder and ours loads PEFT's.

adapter_config.json and adapter_model.safetensors are PEFT's; manifest.json beside them says what PEFT does not ask:
the hash of the base, the settings in our words, the quantisation and the prompt style of the training.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_qlora.checkpoint import safetensors_io, shards
from lit_qlora.checkpoint.checkpoint import content_hash, open_weights
from lit_qlora.checkpoint.identity import PARTS, differing_parts
from lit_qlora.checkpoint.score import read_facts, refuse
from lit_qlora.commands import spell
from lit_qlora.errors import CheckpointError, UsageError
from lit_qlora.files.manifest import MANIFEST, read_manifest, save_directory
from lit_qlora.files.reading import read_json
from lit_qlora.lora import score
from lit_qlora.lora.card import CARD, adapter_card
from lit_qlora.lora.initialization import initialize, restore_bases
from lit_qlora.lora.layer import add_lora, lora_state, saved_state
from lit_qlora.lora.peft_config import PeftConfig
from lit_qlora.lora.peft_experts import named
from lit_qlora.lora.peft_layout import check_copies, from_peft, to_ours, to_peft
from lit_qlora.lora.peft_routers import Read
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT
from lit_qlora.model.scoring import Scoring
from lit_qlora.prompts.style import FILE_NAME as STYLE_FILE
from lit_qlora.prompts.style import Style, style_json
from lit_qlora.quantize import QuantizedLinear, Storage
from lit_qlora.settings import LoRAConfig, Quantization

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_WEIGHTS_2023 = "adapter_model.bin"
STATE = "state"
"""Key of the manifest for the hash of the state that a run saved beside the adapter."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter folder, read."""

    path: Path
    config: LoRAConfig
    peft_tensors: dict[str, Tensor]
    """By PEFT's names, see peft_experts.named; B A of each layer is to be scaled by config.scale."""
    manifest: dict[str, Any] | None
    """None for an adapter that PEFT wrote."""
    copies: Mapping[str, Tensor] = field(default_factory=dict)
    """The tensors of the base that PEFT stored beside it, by transformers' names."""
    peft_version: str = ""
    """Of the PEFT that wrote it, if it is known."""
    score: Tensor | None = None
    """(C, E), the head that was trained with it; see lit_qlora.lora.score. None where there is none."""

    @property
    def init(self) -> tuple[str, int] | None:
        """Its initialisation and the steps of LoftQ, if it is the change B A - B0 A0 from that start; else None."""
        facts = self.manifest or {}
        return (facts["init"], facts["loftq_steps"]) if "init" in facts else None

    @property
    def scoring(self) -> Scoring:
        """The task of its head; CheckpointError if the manifest does not say it."""
        assert self.score is not None
        return read_facts((self.manifest or {}).get("head"), len(self.score), str(self.path / MANIFEST))


def save_adapter(
    folder: Path,
    model: GPT,
    config: LoRAConfig,
    style: Style | None,
    facts: Mapping[str, Any],
    also: Mapping[str, Callable[[Path], Any]] | None = None,
) -> None:
    """Write the adapter of `model` as a PEFT folder, atomically, and read it back.

    Args:
        style: the prompt style, which travels with the adapter.
        facts: what else to remember in manifest.json, such as {"base": {"name": ..., "sha256": ...}}.
        also: other files of the folder, each with the function that writes it.

    Raises:
        ResourceError: if it cannot be written.
    """
    if config.init != "default":
        facts = {**facts, "init": config.init, "loftq_steps": config.loftq_steps or 1}
    state, config = saved_state(model, config)
    head = None if model.score is None else model.score.weight.detach()
    save_state(folder, state, model.config, config, style, facts, also, head)


def save_state(
    folder: Path,
    state: Mapping[str, Tensor],
    model: ModelConfig,
    config: LoRAConfig,
    style: Style | None,
    facts: Mapping[str, Any],
    also: Mapping[str, Callable[[Path], Any]] | None = None,
    head: Tensor | None = None,
) -> None:
    """save_adapter for tensors that are in no model; see our_tensors for their names, Adapter.score for the head."""
    tensors, peft_config = to_peft(state, model, config)
    if head is not None:
        tensors, peft_config = score.to_peft(head, tensors, peft_config)
    files: dict[str, Any] = {
        **(also or {}),
        PEFT_WEIGHTS: lambda path: safetensors_io.write(path, tensors, tensors.items()),
        PEFT_CONFIG: lambda path: path.write_text(json.dumps(peft_config, indent=2) + "\n"),
    }
    if style:
        files[STYLE_FILE] = lambda path: path.write_text(style_json(style))
    card = {CARD: adapter_card(config, model, style, facts)}
    save_directory(folder, files, {"lora": asdict(config), **facts}, card)
    back = read_adapter(folder, heads=True)
    if head is not None and (back.score is None or not torch.equal(back.score, tensors[score.PEFT_NAME])):
        raise CheckpointError(f"{folder}: its head reads back differently from what was saved. Is the disk sound?")
    for name, tensor in our_tensors(back, model).items():
        if not torch.equal(tensor, state[name].cpu()):
            raise CheckpointError(f"{folder}: {name} reads back differently from what was saved. Is the disk sound?")


def read_adapter(folder: Path, *, heads: bool = False) -> Adapter:
    """Read an adapter folder, ours or PEFT's.

    Args:
        heads: take an adapter with a trained head too.

    Raises:
        UsageError: if it has a head, without `heads`.
        CheckpointError: if it is incomplete, damaged, empty, not finite, or uses what is not understood here.
    """
    weights_file = shards.find(folder, PEFT_WEIGHTS, PEFT_WEIGHTS_2023)
    if not (folder / PEFT_CONFIG).is_file() or not weights_file:
        raise CheckpointError(
            f"{folder} is no adapter: it needs {PEFT_CONFIG} and {PEFT_WEIGHTS}. finetune/lora.py writes OUT/final."
        )
    manifest = read_manifest(folder)
    peft = PeftConfig.parse(read_json(folder / PEFT_CONFIG), str(folder))
    weights = shards.open_weights(weights_file)
    tensors = named({name: weights.read(name) for name in weights.specs}, peft.parameters, str(folder))
    if not tensors:
        raise CheckpointError(f"{weights_file} is empty.")
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise CheckpointError(f"{folder}: NaN or infinite values in\n  {safetensors_io.name_some(broken)}")
    head = tensors.pop(score.PEFT_NAME, None)
    if head is not None and not heads:
        raise refuse(folder)
    if manifest:
        config = _recorded_settings(manifest, folder / MANIFEST)
        largest = max((len(tensor) for name, tensor in tensors.items() if ".lora_A." in name), default=0)
        if max(config.rank_pattern.values(), default=config.r) > largest:
            raise CheckpointError(f"{folder / MANIFEST} is damaged: no layer of {weights_file} has such a rank.")
        return Adapter(path=folder, config=config, peft_tensors=tensors, manifest=manifest, score=head)
    tensors, config, copies = to_ours(tensors, peft, str(folder))
    return Adapter(
        path=folder,
        config=config,
        peft_tensors=tensors,
        manifest=None,
        copies=copies,
        peft_version=peft.version,
        score=head,
    )


def _recorded_settings(manifest: Mapping[str, Any], path: Path) -> LoRAConfig:
    """The settings in a manifest of ours.

    Raises:
        CheckpointError: if a fact is missing or has another type.
    """
    kinds = {"precision": str, "init": str, "loftq_steps": int, "new_tokens": dict, STATE: str}
    base = manifest.get("base")
    known = isinstance(base, dict) and all(isinstance(base.get(key), str) for key in ("name", "sha256"))
    if not known or not all(isinstance(manifest.get(key, kind()), kind) for key, kind in kinds.items()):
        raise CheckpointError(f"{path} is damaged: a fact about the training has another type.")
    try:
        Quantization.of(manifest)
        return LoRAConfig(**manifest["lora"])
    except (KeyError, TypeError, UsageError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def load_adapter(model: GPT, folder: Path | str) -> None:
    """Fill the adapters that add_lora put into `model` with those of `folder`.

    Raises:
        CheckpointError: if names or shapes differ from those of `model` in any way.
    """
    fill_adapter(model, read_adapter(Path(folder)))


def fill_adapter(model: GPT, adapter: Adapter) -> None:
    """load_adapter for an adapter that is already read."""
    state, tensors = lora_state(model), our_tensors(adapter, model.config, weights_of(model))
    # PEFT can adapt some layers of a kind and leave others; with DoRA the lengths of their rows are those of the base.
    absent = [name for name in state if name not in tensors]
    complaints = [f"{name} is missing" for name in absent if adapter.manifest or not name.endswith(".magnitude")]
    complaints += [f"{name} is not in the model" for name in tensors if name not in state]
    complaints += [
        f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(state[name].shape)}"
        for name in state
        if name in tensors and tensors[name].shape != state[name].shape
    ]
    if complaints:
        raise CheckpointError(
            f"The adapter in {adapter.path} does not fit this model:\n  {safetensors_io.name_some(complaints)}"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)


def attach_adapter(model: GPT, adapter: Adapter, checkpoint_dir: Path) -> None:
    """Put `adapter` on its base; one that is quantised as it was in training then computes what it did in training.

    Raises:
        CheckpointError: if it does not fit.
    """
    add_lora(model, adapter.config)
    fill_adapter(model, adapter)
    if adapter.score is not None:
        score.fill_score(model, adapter.score, str(adapter.path))
    if adapter.init and _is_stored(model, Storage.of_training(adapter.manifest or {})):
        restore_bases(model, *adapter.init, open_weights(checkpoint_dir).read)


def _is_stored(model: GPT, storage: Storage) -> bool:
    """True if the quantised layers of a model with adapters have the schemes of this storage, and there are some."""
    quantized = {path: module.scheme for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    same = all(storage.scheme(path.removesuffix(".base")) == scheme for path, scheme in quantized.items())
    return same and bool(quantized)


def settle(config: LoRAConfig, checkpoint_dir: Path) -> LoRAConfig:
    """The settings of the adapter that config.start names, if it names one.

    Raises:
        CheckpointError: if it cannot be read, or was trained on another base.
        UsageError: for a setting that was given and is not the adapter's.
    """
    if config.start is None:
        return config
    adapter = read_adapter(config.start)
    check_base(adapter, checkpoint_dir)
    default = LoRAConfig()
    for setting in fields(LoRAConfig):
        given, own = getattr(config, setting.name), getattr(adapter.config, setting.name)
        if setting.name not in ("dropout", "start") and given not in (own, getattr(default, setting.name)):
            raise UsageError(
                f"lora.{setting.name} is {given}, but the adapter in {config.start} has {own}.\n"
                "Leave it out; an adapter goes on as it is."
            )
    return replace(adapter.config, dropout=config.dropout, start=config.start)


def start_adapters(model: GPT, config: LoRAConfig, checkpoint_dir: Path) -> None:
    """Bring the adapters that add_lora put into `model` to where the settings let them start."""
    if config.start is not None:
        load_adapter(model, config.start)
    if config.init != "default":
        initialize(model, config.init, config.loftq_steps or 1, open_weights(checkpoint_dir).read)


def our_tensors(adapter: Adapter, model: ModelConfig, read: Read | None = None) -> dict[str, Tensor]:
    """The adapter's tensors under our names, which are those of lora_state.

    Args:
        read: of the base, which tells what routers have learnt that PEFT trained as a whole.

    Raises:
        CheckpointError: for a tensor that belongs to no layer of this model, or one that is missing.
    """
    stacked = adapter.manifest is not None
    facts: Any = {"location": str(adapter.path), "version": adapter.peft_version, "read": read}
    return from_peft(adapter.peft_tensors, adapter.config, model, stacked=stacked, **facts)


def weights_of(model: GPT) -> Read:
    """The weights of the base inside `model`, by their names without adapters; none that is quantised."""

    def read(name: str) -> Tensor:
        path, _, field = name.rpartition(".")
        module = model.get_submodule(path)
        tensor: Tensor = getattr(getattr(module, "base", module), field).detach()
        return tensor

    return read


def check_base(adapter: Adapter, checkpoint_dir: Path) -> None:
    """Raise CheckpointError unless `adapter` was trained on the base in `checkpoint_dir`: weights, config, tokenizer.

    PEFT does not record the base of an adapter. So there only shapes are compared, when it is loaded, and its copies of
    the base, if it has any.
    """
    if not adapter.manifest:
        if adapter.copies:
            model = ModelConfig.load(checkpoint_dir)
            check_copies(adapter.copies, open_weights(checkpoint_dir), model, str(adapter.path))
        return
    base = adapter.manifest["base"]
    if differing := differing_parts(base, checkpoint_dir):
        found = " and ".join(PARTS[part] for part in differing)
        new = adapter.manifest.get("new_tokens")
        more = f" That has new tokens: {spell('scripts/add_tokens.py')} makes it of {base['name']}." if new else ""
        raise CheckpointError(
            f"The adapter in {adapter.path} was trained on {base['name']} (sha256 {base['sha256'][:12]}...), "
            f"but {checkpoint_dir} holds {found} (sha256 {content_hash(checkpoint_dir)[:12]}...).\n"
            f"Give --checkpoint_dir the base that it was trained on.{more}"
        )
