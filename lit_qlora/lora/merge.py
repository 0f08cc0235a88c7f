"""Folding adapters into their base: W + (alpha / r) B A, in float32, a few rows at a time, without bitsandbytes."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_qlora.checkpoint import checkpoint, score
from lit_qlora.checkpoint.identity import base_facts
from lit_qlora.checkpoint.packed import as_published
from lit_qlora.convert.hub import SOURCE
from lit_qlora.errors import CheckpointError, UsageError
from lit_qlora.files import atomic
from lit_qlora.files.reading import read_json
from lit_qlora.lora.adapter import Adapter, attach_adapter, check_base, our_tensors
from lit_qlora.lora.initialization import rest_of
from lit_qlora.lora.layer import LoRALinear, add_lora, lengths, lora_state
from lit_qlora.lora.peft_routers import is_of_block
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT
from lit_qlora.model.rope_scaling import scale, scaled
from lit_qlora.prompts import tokenizer
from lit_qlora.prompts.style import FILE_NAME as STYLE_FILE
from lit_qlora.quantize import QuantizedLinear, Storage
from lit_qlora.settings import LoRAConfig

Base = Literal["original", "quantized"]
REPORT = "merge_report.json"
ELEMENTS_AT_ONCE = 2**18
"""Elements of a weight that exist in float32 at a time: 1 MiB, which stays in the cache."""


def merge(base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """W + scale B A for every adapted weight W, in W's dtype; other weights are passed through. Of plain LoRA.

    Args:
        base: name -> weight.
        adapter: "<layer>.lora_a" -> A (r, in) and "<layer>.lora_b" -> B (out, r).
        scale: alpha / r.

    Raises:
        CheckpointError: if the adapter belongs to a layer that the base does not have, or that is of another shape.
    """
    merged = dict(base)
    for layer in (name.removesuffix(".lora_a") for name in adapter if name.endswith(".lora_a")):
        name = f"{layer}.weight"
        if name not in base:
            raise CheckpointError(f"The adapter has {layer}, but the base model has no {name}. Wrong base checkpoint?")
        merged[name] = merge_weight(base[name], adapter[f"{layer}.lora_a"], adapter[f"{layer}.lora_b"], scale)
    return merged


def merge_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale B A, computed in float32, in W's dtype."""
    return merge_measured(weight, weight, a, b, scale)[0]


def merge_measured(
    original: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None = None
) -> tuple[Tensor, dict[str, float]]:
    """W + scale B A, computed in float32, in the dtype of `original`, a few rows at a time.

    Args:
        original: (out, in), what sizes are relative to.
        weight: W (out, in); `original` may be a more exact version of it.
        magnitude: (out,), the lengths that DoRA gives to the rows of the sum.

    Returns:
        The merged weight, and two norms relative to that of the original. "update" is its distance from the original,
        "rounding" the part of it that the dtype lost.
    """
    shape = (b.size(0), a.size(1))
    if shape != weight.shape:
        raise CheckpointError(
            f"The adapter fits a weight of shape {shape}, the base has {tuple(weight.shape)}. Wrong base?"
        )
    merged = torch.empty_like(original)
    squares = torch.zeros(3, dtype=torch.float64)
    rows = max(1, ELEMENTS_AT_ONCE // shape[1])
    for start in range(0, shape[0], rows):
        here = slice(start, start + rows)
        before = original[here].float()
        exact = weight[here].float() + scale * (b[here].float() @ a.float())
        if magnitude is not None:
            exact *= (magnitude[here] / lengths(exact))[:, None]
        merged[here] = exact
        parts = (exact - before, merged[here].float() - exact, before)
        squares += torch.stack([part.square().sum(dtype=torch.float64) for part in parts]).cpu()
    update, rounding, size = squares.sqrt().tolist()
    size = size or 1.0
    return merged, {"update": update / size, "rounding": rounding / size}


def replace_rows(weight: Tensor, tokens: list[int] | slice, rows: Tensor) -> tuple[Tensor, dict[str, float]]:
    """`weight` (V, E) with `rows` at `tokens`, and the sizes that merge_measured returns."""
    merged = weight.clone()
    merged[tokens] = rows.to(weight.dtype)
    size = float(torch.linalg.vector_norm(weight, dtype=torch.float32)) or 1.0
    update, rounding = (rows - weight[tokens].float()).norm(), (merged[tokens].float() - rows).norm()
    return merged, {"update": float(update) / size, "rounding": float(rounding) / size}


class Merge:
    """The base that adapters were trained on with their updates added, a tensor at a time.

    Args:
        adapters: one, or several that are added.
        checkpoint_dir: their base.
        base: the weights that the update is added to: as they were ("original"), or as the 4- or 8-bit training saw
            them ("quantized", which needs bitsandbytes). The dtype stays that of the original.
        weights: factors of the updates; -1 takes out an adapter that was merged into `checkpoint_dir` before.

    Attributes:
        config: of the merged model.
        state, scales: the update of all adapters together: "<layer>.lora_a" (r, in), "<layer>.lora_b" (out, r), and
            the factor of their product, by layer.
        trained: the storage of the base in the training.
        layers: the sizes of the updates that were computed so far, see merge_measured.

    Raises:
        CheckpointError: if base and adapters do not belong together or an adapter was never trained.
        UsageError: if adapters that are to be added were trained on bases of different quantisation, or are no sums.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        checkpoint_dir: Path,
        base: Base = "original",
        weights: Sequence[float] | None = None,
    ) -> None:
        self.adapters, self.checkpoint_dir, self.base = list(adapters), checkpoint_dir, base
        self.weights = [1.0] * len(self.adapters) if weights is None else list(weights)
        for adapter, weight in zip(self.adapters, self.weights, strict=True):
            if weight >= 0 or not _was_merged(adapter, checkpoint_dir):
                check_base(adapter, checkpoint_dir)
            elif any(map(is_of_block, adapter.peft_tensors)):
                raise CheckpointError(f"{adapter.path} has routers as a whole: what they were before is not in it.")
        own = self.adapters[0].config
        self.config = scaled(ModelConfig.load(checkpoint_dir), *own.rope)
        self.source = checkpoint.open_weights(checkpoint_dir)
        states = [our_tensors(adapter, self.config, self.source.read) for adapter in self.adapters]
        for adapter, state in zip(self.adapters, states, strict=True):
            if not any(bool(t.any()) for name, t in state.items() if name.endswith(".lora_b")):
                raise CheckpointError(
                    f"{adapter.path} is a fresh adapter: it was never trained, so merging it changes nothing."
                )
            if base == "quantized" and adapter.init and self.weights != [1.0]:
                raise CheckpointError(
                    f"{adapter.path} was trained on a quantised base of its own ({adapter.init[0]}).\n"
                    "Merge it alone and with weight 1, or take --base original."
                )
        self.trained = _trained_storage(self.adapters, base)
        self.state, self.scales = _added(self.adapters, self.weights, states)
        self.specs = dict(self.source.specs)
        # A change of a tied head must not change the embedding: the merged model gets a head of its own.
        self.untied = self.config.tied_head and ("head.lora_a" in self.state or self._is_requantized("head.weight"))
        if self.untied:
            self.config = dataclasses.replace(self.config, tied_head=False)
            self.specs["head.weight"] = self.specs["embed.weight"]
        self.layers: dict[str, dict[str, float]] = {}

    @property
    def changed(self) -> list[str]:
        """Names of the weights that differ from the original base."""
        return [name for name in self.specs if self._is_adapted(name) or self._is_requantized(name)]

    def read(self, name: str) -> Tensor:
        """The merged weight of this name, in the dtype of the base's."""
        original = self.source.read("embed.weight" if self.untied and name == "head.weight" else name)
        layer = name.removesuffix(".weight")
        weight = self._as_trained(original, layer) if self._is_requantized(name) else original
        if rows_name := self._rows_of(name):
            tokens: Any = self.adapters[0].config.train_tokens
            rows = self.state[rows_name]
            merged, self.layers[layer] = replace_rows(weight.to(original.dtype), list(tokens) or slice(None), rows)
        elif self._is_adapted(name):
            a, b, magnitude = (self.state.get(f"{layer}.{part}") for part in ("lora_a", "lora_b", "magnitude"))
            assert a is not None
            assert b is not None
            merged, self.layers[layer] = merge_measured(original, weight, a, b, self.scales[layer], magnitude)
        else:
            merged = weight.to(original.dtype)
        return merged

    def put_into(self, model: GPT) -> None:
        """Make `model`, the base in its checkpoint without quantisation, the merged one.

        It may also be one onto the original that is to be one onto the quantised base, which changes more weights.
        """
        own = self.adapters[0].config
        if model.config.rope_scaling != self.config.rope_scaling:
            scale(model, *own.rope)
        for name in self.changed:
            path, _, field = name.rpartition(".")
            module = model.get_submodule(path)
            value = self.read(name).to(model.embed.weight)
            if self.untied and path == "head":
                setattr(module, field, nn.Parameter(value, requires_grad=False))
            else:
                getattr(module, field).data.copy_(value)

    def attach_to(self, model: GPT) -> None:
        """Put the adapters on `model`, their base quantised or not: what training computed, for one of weight 1."""
        if len(self.adapters) == 1:
            attach_adapter(model, self.adapters[0], self.checkpoint_dir)
        else:
            rank = max(tensor.size(0) for name, tensor in self.state.items() if name.endswith(".lora_a"))
            targets: Any = tuple(dict.fromkeys(word for adapter in self.adapters for word in adapter.config.targets))
            add_lora(model, LoRAConfig(r=rank, targets=targets))
            for name, target in lora_state(model).items():
                target.zero_()
                if (tensor := self.state.get(name)) is not None:  # an adapter may lack layers of another
                    target[: tensor.size(0), : tensor.size(1)] = tensor
        for path, module in model.named_modules():
            if isinstance(module, LoRALinear):
                module.scale = self.scales.get(path, 1.0)

    def write(self, out_dir: Path, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Make `out_dir` the merged checkpoint, whole or not at all, whatever stops the program.

        Args:
            facts: for merge_report.json.

        Returns:
            The content of merge_report.json: base, adapters, and for each adapted layer the sizes of merge_measured.

        Raises:
            UsageError: if `out_dir` holds something else than an earlier merge.
            ResourceError: if it cannot be written.
        """
        check_replaceable(out_dir)
        with atomic.writing(out_dir), atomic.temporary_directory(out_dir) as folder:
            for file in (*tokenizer.FILES, "config.json", SOURCE, STYLE_FILE):
                for directory in (self.checkpoint_dir, self.adapters[0].path):  # the adapter's prompt style wins
                    if (directory / file).is_file():
                        shutil.copyfile(directory / file, folder / file)
            weights = ((name, self.read(name)) for name in self.specs)
            kept = [path for path in [self.checkpoint_dir / checkpoint.KEPT] if path.is_file()]
            digest = checkpoint.save_weights(folder, self.config, self.specs, weights, also=kept)
            if (head := self.adapters[0].score) is not None:
                score.write(folder, head, self.adapters[0].scoring)
            report = {
                "base": base_facts(self.checkpoint_dir),
                "adapters": [
                    {
                        "path": str(adapter.path),
                        "sha256": _digest(adapter),
                        "r": adapter.config.r,
                        "alpha": adapter.config.alpha,
                        "weight": weight,
                    }
                    for adapter, weight in zip(self.adapters, self.weights, strict=True)
                ],
                "onto": self.base,
                "sha256": digest,
                "largest_update": max(row["update"] for row in self.layers.values()),
                "largest_rounding": max(row["rounding"] for row in self.layers.values()),
                **(facts or {}),
                "layers": self.layers,
            }
            (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
            atomic.publish(folder, out_dir)
        return report

    def _is_adapted(self, name: str) -> bool:
        return f"{name.removesuffix('.weight')}.lora_a" in self.state or bool(self._rows_of(name))

    def _rows_of(self, name: str) -> str:
        """Name the trained rows of this weight, or return ''."""
        own = {"embed.weight": "embed.rows", "head.weight": "embed.rows" if self.untied else "head.rows"}.get(name, "")
        return own if own in self.state else ""

    def _is_requantized(self, name: str) -> bool:
        """True if the update is added to the dequantised weight."""
        layer = name.removesuffix(".weight")
        is_matrix = layer != name and self.specs.get(name, self.specs["embed.weight"]).ndim == 2
        return self.base == "quantized" and is_matrix and self.trained.quantizes(layer)

    def _as_trained(self, weight: Tensor, layer: str) -> Tensor:
        """The weight as the quantised training saw it, in the dtype that it had there.

        What was taken out of it for the start of the adapter, and is no part of the saved one, is in it again.
        """

        def stored(weight: Tensor) -> Tensor:
            return QuantizedLinear(weight.to(self.trained.dtype), None, self.trained.scheme(layer)).dequantize()

        init = self.adapters[0].init
        if init is None or f"{layer}.lora_a" not in self.state:
            published = as_published(self.source, layer, self.trained)
            return stored(weight) if published is None else published.dequantize()
        r, scale = len(self.state[f"{layer}.lora_a"]) // 2, self.scales[layer]
        a, b = self.state[f"{layer}.lora_a"][r:], -self.state[f"{layer}.lora_b"][:, r:]
        weight = weight.to(self.trained.dtype).float()
        rest = rest_of(weight, a, b, scale, *init, lambda weight: stored(weight).float())
        return stored(rest).float() + scale * b @ a


def merge_checkpoint(adapter: Adapter, checkpoint_dir: Path, out_dir: Path, base: Base = "original") -> dict[str, Any]:
    """Write the checkpoint that computes what `adapter` on the base in `checkpoint_dir` computes; see Merge."""
    return Merge([adapter], checkpoint_dir, base).write(out_dir)


def check_replaceable(out_dir: Path) -> None:
    """Raise UsageError if a merge written to `out_dir` would destroy anything but a merge."""
    if out_dir.exists() and not (out_dir / REPORT).is_file() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UsageError(f"out_dir: {out_dir} exists and holds something else than a merged model. Name another.")


def _trained_storage(adapters: Sequence[Adapter], base: Base) -> Storage:
    """The storage of the base while the adapters were trained.

    Raises:
        CheckpointError: if that matters and an adapter does not say it, or they differ.
    """
    found = []
    for adapter in adapters:
        facts = adapter.manifest or {}
        if base == "quantized" and "quantize" not in facts:
            raise CheckpointError(f"{adapter.path} does not say how its base was quantised. Take --base original.")
        found.append(Storage.of_training(facts))
    if base == "quantized" and len(set(found)) > 1:
        raise CheckpointError("These adapters were trained on bases of different quantisation. Take --base original.")
    return found[0]


def _added(
    adapters: Sequence[Adapter], weights: Sequence[float], states: Sequence[Mapping[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """One update that is the weighted sum of all: their A stacked along the rank, their B side by side and scaled.

    Raises:
        UsageError: for an adapter that is no sum with its base, but is to be added to another or weighed.
    """
    for adapter in adapters if len(adapters) > 1 or weights[0] != 1 else ():
        config = adapter.config
        if config.dora or config.train_tokens or config.train_embeddings or config.rope_scaling != "none":
            raise UsageError(
                f"{adapter.path} holds embeddings, lengths of rows (DoRA) or a context, which replace the base's.\n"
                "It can be merged alone and with weight 1 only."
            )
    layers = dict.fromkeys(
        name.removesuffix(".lora_a") for state in states for name in state if name.endswith("lora_a")
    )
    if len(states) == 1:
        return dict(states[0]), {layer: weights[0] * adapters[0].config.scale(layer) for layer in layers}
    joined: dict[str, Tensor] = {}
    for layer in layers:
        parts = [
            (state[f"{layer}.lora_a"], weight * adapter.config.scale(layer) * state[f"{layer}.lora_b"])
            for adapter, weight, state in zip(adapters, weights, states, strict=True)
            if f"{layer}.lora_a" in state
        ]
        joined[f"{layer}.lora_a"] = torch.cat([a for a, _ in parts])
        joined[f"{layer}.lora_b"] = torch.cat([b for _, b in parts], dim=1)
    return joined, dict.fromkeys(layers, 1.0)


def _digest(adapter: Adapter) -> str:
    """sha256 of the adapter's tensors, whatever file they come from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(adapter.peft_tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _was_merged(adapter: Adapter, checkpoint_dir: Path) -> bool:
    """True if `checkpoint_dir` is a merge of `adapter`, as its report says."""
    path = checkpoint_dir / REPORT
    known = read_json(path).get("adapters") if path.is_file() else None
    parts = known if isinstance(known, list) else []
    return _digest(adapter) in [part.get("sha256") for part in parts if isinstance(part, dict)]
