"""Adapters on disk, in PEFT's layout, so that peft.PeftModel.from_pretrained loads the folder and ours loads PEFT's.

adapter_config.json and adapter_model.safetensors are PEFT's; manifest.json beside them says what PEFT does not ask:
the hash of the base, the settings in our words, the quantisation and the prompt style of the training.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_qlora import safetensors_io
from lit_qlora.checkpoint import content_hash, load_model, read_manifest, save_directory
from lit_qlora.config import ModelConfig
from lit_qlora.device import pick_device, resolve_precision, weights_dtype
from lit_qlora.errors import CheckpointError
from lit_qlora.families import find_family, their_module
from lit_qlora.lora import add_lora, lora_state
from lit_qlora.model import GPT
from lit_qlora.prompts import FILE_NAME as STYLE_FILE
from lit_qlora.prompts import STYLES, Style, read_style, style_json
from lit_qlora.settings import LoRAConfig, Precision, Scheme
from lit_qlora.tokenizer import Tokenizer

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_UNSUPPORTED = {
    "use_dora": False,
    "use_rslora": False,
    "modules_to_save": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "layer_replication": None,
    "lora_bias": False,
    "trainable_token_indices": None,
    "target_parameters": None,
}
"""PEFT's settings that change what an adapter computes, with the only value that is understood here."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter folder, read."""

    path: Path
    config: LoRAConfig
    peft_tensors: dict[str, Tensor]
    """As in the file, by PEFT's names."""
    manifest: dict[str, Any] | None
    """None for an adapter that PEFT wrote."""


def save_adapter(folder: Path, model: GPT, config: LoRAConfig, style: str | None, facts: Mapping[str, Any]) -> None:
    """Write the adapter of `model` as a PEFT folder, atomically, and read it back.

    Args:
        style: name of the prompt style, which travels with the adapter.
        facts: what else to remember in manifest.json, such as {"base": {"name": ..., "sha256": ...}}.

    Raises:
        ResourceError: if it cannot be written.
    """
    tensors, peft_config = to_peft(lora_state(model), model.config, config)
    files: dict[str, Any] = {
        PEFT_WEIGHTS: lambda path: safetensors_io.write(path, tensors, tensors.items()),
        PEFT_CONFIG: lambda path: path.write_text(json.dumps(peft_config, indent=2) + "\n"),
    }
    if style:
        files[STYLE_FILE] = lambda path: path.write_text(style_json(style))
    save_directory(folder, files, {"lora": asdict(config), **facts})
    back = read_adapter(folder)
    for name, tensor in from_peft(back, model.config).items():
        if not torch.equal(tensor, lora_state(model)[name].cpu()):
            raise CheckpointError(f"{folder}: {name} reads back differently from what was saved. Is the disk sound?")


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter folder, ours or PEFT's.

    Raises:
        CheckpointError: if it is incomplete, damaged, empty, not finite, or uses what is not understood here.
    """
    if not (folder / PEFT_CONFIG).is_file() or not (folder / PEFT_WEIGHTS).is_file():
        raise CheckpointError(
            f"{folder} is no adapter: it needs {PEFT_CONFIG} and {PEFT_WEIGHTS}. finetune/lora.py writes OUT/final."
        )
    manifest = read_manifest(folder)
    try:
        peft = json.loads((folder / PEFT_CONFIG).read_text())
        rank, alpha, dropout = int(peft["r"]), float(peft["lora_alpha"]), float(peft.get("lora_dropout", 0))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / PEFT_CONFIG}: not a PEFT configuration: {error}.") from None
    if peft.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f"{folder} holds a {peft['peft_type']} adapter; only LORA is understood.")
    for key, understood in _UNSUPPORTED.items():
        if peft.get(key, understood) not in (understood, [] if understood is None else understood):
            raise CheckpointError(f"{folder} uses {key} = {peft[key]!r}, which is not understood here.")
    tensors = safetensors_io.read_all(folder / PEFT_WEIGHTS)
    if not tensors:
        raise CheckpointError(f"{folder / PEFT_WEIGHTS} is empty.")
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise CheckpointError(f"{folder}: NaN or infinite values in\n  {safetensors_io.name_some(broken)}")
    if manifest:
        config = LoRAConfig(**{**manifest["lora"], "targets": tuple(manifest["lora"]["targets"])})
    elif peft.get("rank_pattern") or peft.get("alpha_pattern"):
        raise CheckpointError(f"{folder} uses rank_pattern or alpha_pattern, which is not understood here.")
    else:
        config = LoRAConfig(r=rank, alpha=alpha, dropout=dropout, targets=_words(tensors, folder))
    return Adapter(path=folder, config=config, peft_tensors=tensors, manifest=manifest)


def load_adapter(model: GPT, folder: Path | str) -> None:
    """Fill the adapters that add_lora put into `model` with those of `folder`.

    Raises:
        CheckpointError: if names or shapes differ from those of `model` in any way.
    """
    fill_adapter(model, read_adapter(Path(folder)))


def fill_adapter(model: GPT, adapter: Adapter) -> None:
    """As load_adapter, for an adapter that is already read."""
    state, tensors = lora_state(model), from_peft(adapter, model.config)
    complaints = [f"{name} is missing" for name in state if name not in tensors]
    complaints += [f"{name} has no place in the model" for name in tensors if name not in state]
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
        for name, target in state.items():
            target.copy_(tensors[name])


def to_peft(
    state: Mapping[str, Tensor], model: ModelConfig, config: LoRAConfig
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Our adapter tensors under PEFT's names, and PEFT's configuration.

    Where Hugging Face stacks several of our layers into one, the A matrices are stacked along the rank and B is
    block-diagonal, which is the same function exactly.
    """
    family = find_family(model.family)
    layers = [name.removesuffix(".lora_a") for name in state if name.endswith(".lora_a")]
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(their_module(layer, family)[0], []).append(layer)
    tensors, patterns, scaled = {}, {}, {}
    for module, members in groups.items():
        rule = their_module(members[0], family)[1]
        a = torch.cat([state[f"{layer}.lora_a"] for layer in members])
        b = state[f"{members[0]}.lora_b"]
        if rule:
            prefix = members[0].rpartition(".")[0]
            blocks = {}
            for part in rule.parts:
                layer = f"{prefix}.{part.removesuffix('.weight').rpartition('.')[2]}"
                block = b.new_zeros(model.n_head * model.head_size, len(a))
                if layer in members:
                    at = members.index(layer) * config.r
                    block[:, at : at + config.r] = state[f"{layer}.lora_b"]
                blocks[part] = block
            b = rule.join(blocks, model)
            patterns[module.rpartition(".")[2]] = len(a)
            scaled[module.rpartition(".")[2]] = config.alpha * len(members)
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = a.contiguous().cpu()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = b.contiguous().cpu()
    return tensors, {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted({module.rpartition(".")[2] for module in groups}),
        "rank_pattern": patterns,
        "alpha_pattern": scaled,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def from_peft(adapter: Adapter, model: ModelConfig) -> dict[str, Tensor]:
    """The adapter's tensors under our names; the inverse of to_peft.

    Raises:
        CheckpointError: for a tensor that belongs to no layer of this model.
    """
    with torch.device("meta"):
        skeleton = GPT(model)
        add_lora(skeleton, adapter.config)
    family = find_family(model.family)
    left = dict(adapter.peft_tensors)
    state: dict[str, Tensor] = {}
    layers = [name.removesuffix(".lora_a") for name in lora_state(skeleton) if name.endswith(".lora_a")]
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(their_module(layer, family)[0], []).append(layer)
    for module, members in groups.items():
        a = left.pop(f"{_PREFIX}{module}.lora_A.weight", None)
        b = left.pop(f"{_PREFIX}{module}.lora_B.weight", None)
        if a is None or b is None:
            if adapter.manifest:
                raise CheckpointError(f"{adapter.path}: the adapter of {module} is missing.")
            for layer in members:  # PEFT can adapt part of an MLP; the rest of it learnt nothing
                state |= {n: torch.zeros(t.shape) for n, t in lora_state(skeleton).items() if n.startswith(f"{layer}.")}
            continue
        rule = their_module(members[0], family)[1]
        if rule is None:
            state |= {f"{members[0]}.lora_a": a, f"{members[0]}.lora_b": b}
            continue
        rows = {part.rpartition(".")[0].rpartition(".")[2]: block for part, block in rule.split(b, model).items()}
        for i, layer in enumerate(members):
            block = rows[layer.rpartition(".")[2]]
            at = slice(i * adapter.config.r, (i + 1) * adapter.config.r) if adapter.manifest else slice(None)
            state |= {f"{layer}.lora_a": a[at].contiguous(), f"{layer}.lora_b": block[:, at].contiguous()}
    if left:
        raise CheckpointError(
            f"{adapter.path}: {len(left)} tensors belong to no layer of {model.name}:\n  "
            + safetensors_io.name_some(left)
        )
    return state


def check_base(adapter: Adapter, checkpoint_dir: Path) -> None:
    """Raise CheckpointError unless `adapter` was trained on the weights in `checkpoint_dir`.

    An adapter that PEFT wrote does not say, so only its shapes can speak.
    """
    if not adapter.manifest:
        return
    base = adapter.manifest["base"]
    if content_hash(checkpoint_dir) != base["sha256"]:
        raise CheckpointError(
            f"The adapter in {adapter.path} was trained on {base['name']} (sha256 {base['sha256'][:12]}...), "
            f"but {checkpoint_dir} holds other weights (sha256 {content_hash(checkpoint_dir)[:12]}...).\n"
            "Give --checkpoint_dir the base that it was trained on."
        )


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model that is ready to be used."""

    model: GPT
    tokenizer: Tokenizer
    style: Style | None
    """How its prompts are written; None where nobody said."""


def load_for_use(
    checkpoint_dir: Path,
    lora_path: Path | None = None,
    *,
    quantize: Scheme = "none",
    quantize_head: bool = False,
    precision: Precision = "auto",
) -> Loaded:
    """A checkpoint, with an adapter on it if one is given, for evaluation, generation and chat.

    Raises:
        CheckpointError: if anything is missing or damaged, or base and adapter do not belong together.
    """
    ModelConfig.load(checkpoint_dir)  # says best what is wrong with a directory that is no checkpoint
    adapter = read_adapter(lora_path) if lora_path else None
    tokenizer = Tokenizer(checkpoint_dir)
    if adapter:
        check_base(adapter, checkpoint_dir)
    device = pick_device()
    dtype = weights_dtype(resolve_precision(precision, device))
    model = load_model(checkpoint_dir, dtype, device, quantize, quantize_head)
    if adapter:
        add_lora(model, adapter.config)
        fill_adapter(model, adapter)
    name = (read_style(lora_path) if lora_path else None) or read_style(checkpoint_dir)
    return Loaded(model=model.eval(), tokenizer=tokenizer, style=STYLES[name] if name else None)


def _words(tensors: Mapping[str, Tensor], folder: Path) -> tuple[Any, ...]:
    """Our target words for the layers that a PEFT adapter holds."""
    words = {
        "q_proj": ("query",),
        "k_proj": ("key",),
        "v_proj": ("value",),
        "o_proj": ("projection",),
        "dense": ("projection",),
        "query_key_value": ("query", "key", "value"),
        "lm_head": ("head",),
        "embed_out": ("head",),
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj", "dense_h_to_4h", "dense_4h_to_h"), ("mlp",)),
    }
    leaves = {name.split(".lora_")[0].rpartition(".")[2] for name in tensors}
    unknown = sorted(leaves - set(words))
    if unknown:
        raise CheckpointError(f"{folder} adapts layers that have no counterpart here: {', '.join(unknown)}.")
    return tuple(dict.fromkeys(word for leaf in sorted(leaves) for word in words[leaf]))
