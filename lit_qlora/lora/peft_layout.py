"""PEFT's layout of a LoRA adapter: its names, its settings, and layers that combine several of ours.

Where Hugging Face stacks several of our layers into one, the A matrices are stacked along the rank. B is then
block-diagonal, which is the same function exactly. https://huggingface.co/docs/peft
Experts that are stacked have a layout of their own, see lit_qlora.lora.peft_experts.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lit_qlora.checkpoint.safetensors_io import name_some
from lit_qlora.checkpoint.shards import Weights
from lit_qlora.convert.families import FAMILIES, WRAPPERS, Family, family_of, fill, template
from lit_qlora.convert.families.rules import DROP, Either, Fused, Transposed, parts_of
from lit_qlora.convert.families.wrappers import in_text_class, in_wrapper
from lit_qlora.errors import CheckpointError
from lit_qlora.lora.layer import add_lora, lora_state
from lit_qlora.lora.peft_config import PeftConfig
from lit_qlora.lora.peft_experts import (
    LINEAR,
    PARAMETERS,
    UNCONVERTED,
    Place,
    Stacks,
    by_block,
    is_expert,
    is_single,
    is_stacked,
    peft_names,
    stack_singles,
)
from lit_qlora.lora.peft_routers import Read, as_adapters, is_of_block, number_of_experts
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT
from lit_qlora.settings import TARGETS, LoRAConfig, first_match

_PREFIX = "base_model.model."
_BASE = ".base_layer.weight"
_EMBEDDING_A = ".lora_embedding_A"
_TOKENS = ".token_adapter.trainable_tokens_delta"


def to_ours(
    tensors: Mapping[str, Tensor], config: PeftConfig, location: str
) -> tuple[dict[str, Tensor], LoRAConfig, dict[str, Tensor]]:
    """The tensors of an adapter that PEFT made, of one scale, our settings for it, and its copies of the base.

    Our settings have one rank, the highest, which from_peft fills up with zeros; the ratio of two scales goes into B.
    An adapter of the embedding becomes the embedding that it makes of the base, as if all of it had been trained.
    Routers that were trained as a whole get an adapter of full rank, which from_peft makes of them.

    Raises:
        CheckpointError: if a rank contradicts the configuration, or a layer has no counterpart in any family.
    """
    tensors, copies = _without_copies(tensors, config)
    tensors, config = _with_whole_embedding(tensors, copies, config, location)
    modules = list(dict.fromkeys(_module_of(name) for name in tensors if ".lora_" in name))
    others = [name for name in tensors if ".lora_" not in name]
    if not modules:
        raise CheckpointError(f"{location} adapts no layer.")
    for key, said, found in (
        ("use_dora", config.dora, any(name.endswith("lora_magnitude_vector") for name in tensors)),
        ("trainable_token_indices", bool(config.tokens), any(name.endswith(_TOKENS) for name in others)),
        ("modules_to_save", config.whole, any(name.endswith(".weight") for name in others)),
    ):
        if said != found:
            raise CheckpointError(f"{location}: {key} is {'on' if said else 'off'}, but its tensors say otherwise.")
    rank, scale = max(map(config.rank, modules)), config.scale(modules[0])
    scaled = dict(tensors)
    for name, tensor in tensors.items():
        module = _module_of(name)
        own = config.rank(module)
        whole = len(tensor) % own == 0 if is_stacked(module) else len(tensor) == own
        if ".lora_A." in name and not whole:
            raise CheckpointError(f"{location}: {name} has rank {len(tensor)}, but adapter_config.json says {own}.")
        if ".lora_B." in name and config.scale(module) != scale:
            scaled[name] = tensor.float() * (config.scale(module) / scale)
    words, experts = _words(modules, location), number_of_experts(tensors, location)
    if experts and "router" in words:
        raise CheckpointError(f"{location} has some routers in modules_to_save and adapters of others: merge it.")
    lora = LoRAConfig(
        r=rank,
        alpha=scale * rank,
        dropout=config.dropout,
        targets=(*words, "router") if experts else words,
        rank_pattern={"router": experts} if experts else {},
        alpha_pattern={"router": experts} if experts else {},
        dora=config.dora,
        train_tokens=config.tokens,
        train_head_rows=config.head_rows,
        train_embeddings=any(name.endswith(".weight") and not is_of_block(name) for name in others),
        tied=any("gate_up_proj" in module and (is_stacked(module) or is_single(module)) for module in modules),
    )
    return scaled, lora, copies


def _without_copies(tensors: Mapping[str, Tensor], config: PeftConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors that were trained, and those of the base, which PEFT stores where a target is embedding or head."""
    copies = {
        name: _their_name(name)
        for name in tensors
        if name.endswith(_BASE) or (name.endswith(".weight") and ".lora_" not in name and not config.whole)
    }
    trained = {name: tensor for name, tensor in tensors.items() if name not in copies}
    return trained, {theirs: tensors[name] for name, theirs in copies.items()}


def _with_whole_embedding(
    tensors: dict[str, Tensor], copies: Mapping[str, Tensor], config: PeftConfig, location: str
) -> tuple[dict[str, Tensor], PeftConfig]:
    """The tensors with W + scale B A instead of an adapter of the embedding."""
    found = next((name for name in tensors if name.endswith(_EMBEDDING_A)), None)
    if found is None:
        return tensors, config
    path = found.removesuffix(_EMBEDDING_A)
    weight = copies.get(_their_name(f"{path}.weight"))
    if weight is None or config.dora or config.whole or config.tokens:
        lacks = "without a copy of the base's" if weight is None else "with DoRA, trained tokens or modules_to_save"
        raise CheckpointError(
            f"{location} has an adapter of the embedding {lacks}, which is not understood here.\n"
            "Merge it with PEFT, and convert the model that comes out."
        )
    a, b = tensors[found], tensors[f"{path}.lora_embedding_B"]
    rows = weight.float() + config.scale(_module_of(f"{path}.lora_")) * (b.float() @ a.float()).T
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{path}.lora_embedding_")}
    return rest | {f"{path}.weight": rows}, replace(config, whole=True)


def check_copies(copies: Mapping[str, Tensor], base: Weights, model: ModelConfig, location: str) -> None:
    """Raise CheckpointError unless the copies that an adapter has of its base equal `base`."""
    family = family_of(model)
    for theirs, copy in copies.items():
        rule = family.weights.get(in_wrapper(theirs, model.wrapper) if model.wrapper else theirs)
        if rule not in ("embed.weight", "head.weight"):
            raise CheckpointError(f"{location} holds {theirs}, which is no embedding and no head of {model.name}.")
        check_vocabulary(len(copy), model, location)
        ours = base.read("embed.weight" if model.tied_head else str(rule))
        if not torch.equal(copy, ours.to(copy.dtype)):
            raise CheckpointError(
                f"{location} holds another {theirs} than {model.name}: it was trained on another base, or changed it.\n"
                "Give --checkpoint_dir the base that it was trained on."
            )


def check_vocabulary(rows: int, model: ModelConfig, location: str) -> None:
    """Raise CheckpointError if an embedding or a head has other rows than the model."""
    if rows != model.vocab_size:
        raise CheckpointError(
            f"{location} was trained with a vocabulary that had been resized to {rows} tokens; {model.name} has "
            f"{model.vocab_size}.\nMerge it with PEFT into the resized model, and convert the model that comes out."
        )


def to_peft(
    state: Mapping[str, Tensor], model: ModelConfig, config: LoRAConfig
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Convert our adapter tensors to PEFT's names and configuration.

    Raises:
        CheckpointError: for a layer that PEFT cannot adapt, such as gpt-oss's experts, which are slices of one tensor.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    parameters: dict[str, None] = {}
    rows = {name: len(weight) for name, weight in GPT.skeleton(model).named_parameters()}
    stacked, layers = _stacked(_layers(state), model, config)
    groups = _group(layers, model)
    for home, members in groups:
        rank, alpha = _size(home, members, config)
        a = torch.cat([state[f"{layer}.lora_a"] for layer in members])
        parts = {"lora_A.weight": a, "lora_B.weight": state[f"{members[0]}.lora_b"]}
        if config.dora:
            parts["lora_magnitude_vector"] = state[f"{members[0]}.magnitude"]
        if home.fused:
            blocks, first = {}, 0
            for layer in members:
                b = state[f"{layer}.lora_b"]
                block = torch.zeros(len(b), len(a))
                block[:, first : first + b.size(1)] = b
                blocks[home.part(layer)], first = block, first + b.size(1)
            numbers = template(members[0])[1]
            for part in home.fused.parts:
                blocks.setdefault(part, torch.zeros(rows[fill(part, numbers)], len(a)))
            parts["lora_B.weight"] = home.fused.join(blocks, model)
            if config.dora:
                columns = {home.part(layer): state[f"{layer}.magnitude"][:, None] for layer in members}
                parts["lora_magnitude_vector"] = home.fused.join(columns, model)[:, 0]
        # transformers 5 renamed GPT-NeoX's head. With both names the adapter fits any version: PEFT skips unknown ones.
        aliases = [other.module for other in _homes(members[0], family_of(model))]
        names = [home.module, *(name for name in aliases if _leaf(name) != _leaf(home.module))]
        beside = model.n_expert and model.family not in UNCONVERTED and _is_beside_experts(members[0])
        beside = beside or members[0].endswith(".router")  # of which most are no linear layers in transformers
        for module in _with_text_class(names, model):
            target = f"{module}.weight" if beside else module
            ranks[target], alphas[target] = rank, alpha
            parameters |= {target: None} if beside else {}
            for part, tensor in parts.items():
                tensors[f"{_PREFIX}{module}.{part}"] = tensor.contiguous().cpu()
    wrapped = {}
    for first_name, place in stacked.items():
        parts = place.join(state)
        for parameter in _with_text_class([first_name], model):
            parameters[parameter] = None
            ranks[parameter], alphas[parameter] = place.size()
            wrapped[f"{_PREFIX}{parameter}"] = parts
    tensors |= peft_names(wrapped)
    embedding = _embedding(model)
    if config.train_tokens:
        trained = {embedding: state["embed.rows"]}
        trained |= {_head(model): state["head.rows"]} if _trains_head_rows(model, config) else {}
        for name, learnt in trained.items():
            tensors |= {f"{_PREFIX}{module}{_TOKENS}": learnt.cpu() for module in _with_text_class([name], model)}
    if config.train_embeddings:
        tied = [home.module for home in _homes("head", family_of(model))] if model.tied_head else []
        modules = _with_text_class([embedding, *tied], model)
        tensors |= {f"{_PREFIX}{module}.weight": state["embed.rows"].cpu() for module in modules}
    everywhere = config.first_layers is None and config.last_layers is None
    return tensors, {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "r": config.r,
        "lora_alpha": config.alpha,
        # PEFT's own layer for experts refuses dropout, which only training needs.
        "lora_dropout": 0.0 if model.n_expert else config.dropout,
        "target_modules": _targets({_leaf(x) if everywhere else x for x in ranks if x not in parameters}, model),
        # PEFT takes a module called as an expert's layers are for one of these, wherever it lies.
        "target_parameters": sorted({_in_block(x) if everywhere else x for x in parameters}) or None,
        "rank_pattern": _patterns(ranks, config.r),
        "alpha_pattern": _patterns(alphas, config.alpha),
        "bias": "none",
        "fan_in_fan_out": any(home.transposed for home, _ in groups),
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "modules_to_save": [_leaf(embedding)] if config.train_embeddings else None,
        "trainable_token_indices": _token_indices(model, config),
        "ensure_weight_tying": config.train_embeddings and model.tied_head,
    }


def _with_text_class(modules: Iterable[str], model: ModelConfig) -> list[str]:
    """List these modules, and their names in the class of the language model alone, where an adapter fits both."""
    modules = list(modules)
    if model.wrapper and WRAPPERS[model.wrapper].text_class:
        modules += [in_text_class(module, model.wrapper) for module in modules]
    return list(dict.fromkeys(modules))


def _targets(modules: Iterable[str], model: ModelConfig) -> list[str] | str:
    """Return PEFT's target_modules; inside a wrapper a pattern, since encoders have layers with the same last names."""
    if not model.wrapper:
        return sorted(modules)
    layers = _with_text_class([WRAPPERS[model.wrapper].names[-1][0] + "layers"], model)
    begins = [name.removesuffix(".layers") for name in layers]
    inside, names = ("|".join(sorted(map(re.escape, of))) for of in (begins, modules))
    return rf"(({inside})\.(layers\..*\.)?)?({names})"


def _as_in_wrapper(tensors: Mapping[str, Tensor], model: ModelConfig, location: str) -> dict[str, Tensor]:
    """Return an adapter's tensors under the names of the wrapper's class, whichever class it was trained on.

    Raises:
        CheckpointError: if it has another adapter for each class.
    """
    if not model.wrapper:
        return dict(tensors)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        known = _PREFIX + in_wrapper(name.removeprefix(_PREFIX), model.wrapper)
        if known in found and not torch.equal(found[known], tensor):
            raise CheckpointError(f"{location} holds two adapters of {known}, under two names.")
        found[known] = tensor
    return found


def check_layers(model: ModelConfig, config: LoRAConfig) -> str:
    """Return a caveat about PEFT's use of an adapter with these settings, or ''.

    Raises:
        CheckpointError: if its layout cannot hold one, naming a layer.
    """
    skeleton = GPT.skeleton(model)
    add_lora(skeleton, config)
    if config.train_embeddings and model.tied_head and _leaf(_embedding(model)) != "embed_tokens":
        raise CheckpointError(
            f"PEFT cannot train {_embedding(model)} with the head that is tied to it, so an adapter cannot hold "
            "lora.train_embeddings.\nlora.train_tokens can name the tokens that matter."
        )
    stacked, layers = _stacked(_layers(lora_state(skeleton)), model, config)
    for place in stacked.values():
        place.size()
    for home, members in _group(layers, model):
        _size(home, members, config)
        if config.dora and home.fused and len(members) < len(home.fused.parts):
            raise CheckpointError(
                f"{', '.join(members)} and others are one layer in Hugging Face's model ({home.module}).\n"
                "PEFT knows DoRA of the whole of it only: name all of them in lora.targets."
            )
    gates = [_homes(layer, family_of(model))[0].module for layer in layers if layer.endswith(".query_gate")]
    if model.n_expert and gates and _leaf(gates[0]) == "gate_proj":
        return f"PEFT 0.21 takes {gates[0]} for an expert's: it refuses this adapter; here and merged it counts."
    if config.rope_scaling != "none":
        return (
            "PEFT knows no RoPE scaling of an adapter: the folder's README.md has the lines that give it to the base."
        )
    if _trains_head_rows(model, config) and model.head_bias:
        return "PEFT 0.21 forgets the bias of a head whose rows learn; here and merged it counts."
    if config.dora and model.n_expert and any(".mlp." in layer for layer in layers):
        return "PEFT 0.21 knows no DoRA of experts and of MLPs beside them: it refuses this adapter; merged it counts."
    return ""


def _stacked(layers: Iterable[str], model: ModelConfig, config: LoRAConfig) -> tuple[dict[str, Place], list[str]]:
    """The parameters that PEFT adapts as stacks of experts, by their names, and the other layers.

    Raises:
        CheckpointError: for DoRA, which PEFT lacks there.
    """
    layers, stacks = list(layers), Stacks.of(model, config)
    experts = [layer for layer in layers if is_expert(layer)]
    if not experts or stacks is None or not stacks.are_needed(experts):
        return {}, layers
    if config.dora:
        raise CheckpointError(
            f"{experts[0]} is part of a stack in Hugging Face's model, and PEFT knows no DoRA of stacks.\n"
            "Leave out lora.dora, or the experts (mlp, all) among lora.targets."
        )
    found: dict[str, Place] = {}
    for block, members in by_block(experts).items():
        for name in _adapted(members):
            found[stacks.parameter(block, name)] = Place(stacks, block, name, members)
    return found, [layer for layer in layers if not is_expert(layer)]


def _adapted(members: Iterable[str]) -> list[str]:
    """The parameters that hold some of these layers of experts."""
    kinds = {layer.rpartition(".")[2] for layer in members}
    return [name for name, own in PARAMETERS.items() if kinds.intersection(own)]


def _is_beside_experts(layer: str) -> bool:
    """Tell whether a layer is of an MLP that is no expert, in a model that has experts."""
    return ".mlp." in layer and not is_expert(layer)


def from_peft(
    tensors: Mapping[str, Tensor],
    config: LoRAConfig,
    model: ModelConfig,
    *,
    stacked: bool,
    location: str,
    version: str = "",
    read: Read | None = None,
) -> dict[str, Tensor]:
    """Convert PEFT's tensors to ours; the inverse of to_peft.

    Args:
        tensors: by their names in peft_experts.named.
        stacked: the rank of a layer that holds several of ours is divided among them, as to_peft does; otherwise
            PEFT trained it as one, and each of ours gets the whole of A and its own rows of B.
        version: of the PEFT that wrote the adapter, "" if it is not known.
        read: of the base, see as_adapters.

    Raises:
        CheckpointError: for a tensor without a layer in this model, or a missing tensor.
    """
    skeleton = GPT.skeleton(model)
    add_lora(skeleton, replace(config, rope_scaling="none", rope_factor=1.0))  # `model` is perhaps scaled already
    shapes = {name: tensor.shape for name, tensor in lora_state(skeleton).items()}
    tensors = as_adapters(_as_in_wrapper(tensors, model, location), _PREFIX, model, read, location)
    if any(map(is_single, map(_module_of, tensors))):
        tensors, version = stack_singles(tensors, model.n_expert), LINEAR
    left = dict(tensors)
    known = {_module_of(name) for name in tensors}
    state, layers = {}, _layers(shapes)
    stacks = Stacks.of(model, config)
    if stacks is not None and (stacks.only or any(map(is_stacked, known))):
        state = _take_stacks(left, known, shapes, stacks, stacked, version, location)
        layers = [layer for layer in layers if not is_expert(layer)]
    for home, members in _group(layers, model, known):
        names = ("lora_A.weight", "lora_B.weight", *(("lora_magnitude_vector",) if config.dora else ()))
        found = {name: left.pop(f"{_PREFIX}{home.module}.{name}", None) for name in names}
        a, b, magnitude = found["lora_A.weight"], found["lora_B.weight"], found.get("lora_magnitude_vector")
        if a is None or b is None or (config.dora and magnitude is None):
            if stacked:
                raise CheckpointError(f"{location}: the adapter of {home.module} is missing.")
            for name in (f"{layer}.lora_{matrix}" for layer in members for matrix in "ab"):
                state[name] = torch.zeros(shapes[name])  # PEFT can adapt only some layers of a kind
            continue
        for alias in _homes(members[0], family_of(model)):
            for name, tensor in found.items():
                twin = left.get(f"{_PREFIX}{alias.module}.{name}")
                if twin is not None and torch.equal(twin, tensor):  # type: ignore[arg-type]
                    del left[f"{_PREFIX}{alias.module}.{name}"]
        rows = home.fused.split(b, model) if home.fused else {}
        lengths = home.fused.split(magnitude[:, None], model) if home.fused and magnitude is not None else {}
        first = 0
        for layer in members:
            rank = shapes[f"{layer}.lora_a"][0]
            part = slice(first, first + rank) if stacked and home.fused else slice(None)
            own = rows[home.part(layer)] if home.fused else b
            if layer == "head":
                check_vocabulary(len(own), model, location)
            state[f"{layer}.lora_a"] = _widen(a[part], rank, dim=0)
            state[f"{layer}.lora_b"] = _widen(own[:, part], rank, dim=1)
            if magnitude is not None:
                state[f"{layer}.magnitude"] = lengths[home.part(layer)][:, 0] if home.fused else magnitude
            first += rank
    if "embed.rows" in shapes:
        state["embed.rows"] = _take_embedding(left, config, model, location)
    if "head.rows" in shapes:
        state["head.rows"] = _take_head_rows(left, model, location)
    if left:
        raise CheckpointError(
            f"{location}: {len(left)} tensors belong to no layer of {model.name}:\n  {name_some(left)}"
        )
    return state


def _take_stacks(
    left: dict[str, Tensor],
    known: set[str],
    shapes: Mapping[str, torch.Size],
    stacks: Stacks,
    stacked: bool,
    version: str,
    location: str,
) -> dict[str, Tensor]:
    """Take the tensors of stacked experts out of `left`, and return ours of them."""
    state: dict[str, Tensor] = {}
    for block, members in by_block(filter(is_expert, _layers(shapes))).items():
        for name in PARAMETERS:
            module = stacks.parameter(block, name, known)
            a, b = (left.pop(f"{_PREFIX}{module}.lora_{letter}.weight", None) for letter in "AB")
            if a is not None and b is not None:
                state |= stacks.split(block, name, a, b, members if stacked else None, version, location)
            elif stacked and name in _adapted(members):
                raise CheckpointError(f"{location}: the adapter of {module} is missing.")
        for name in (f"{layer}.lora_{letter}" for layer in members for letter in "ab"):
            # PEFT can adapt only one of the parameters, at a lower rank than other layers.
            tensor, dim = state.get(name, torch.zeros(shapes[name])), int(name.endswith("b"))
            state[name] = _widen(tensor, shapes[name][dim], dim)
    return state


def _take_embedding(left: dict[str, Tensor], config: LoRAConfig, model: ModelConfig, location: str) -> Tensor:
    """Take the trained embeddings and their copies out of `left`."""
    name = f"{_PREFIX}{_embedding(model)}"
    rows = left.pop(f"{name}{_TOKENS}" if config.train_tokens else f"{name}.weight", None)
    if rows is None:
        others = [other for other in left if other.endswith(".weight") and ".lora_" not in other]
        holds = f"holds {others[0].removeprefix(_PREFIX)}, and " if others else ""
        raise CheckpointError(
            f"{location}: modules_to_save {holds}is understood for the embeddings ({name}) and routers alone.\n"
            "Other layers can learn as adapters: target_modules, target_parameters."
        )
    if config.train_embeddings:
        check_vocabulary(len(rows), model, location)
    if config.train_embeddings and model.tied_head:
        heads = [left.pop(f"{_PREFIX}{home.module}.weight", None) for home in _homes("head", family_of(model))]
        if not any(head is not None and torch.equal(head, rows) for head in heads):
            raise CheckpointError(
                f"{location} has parted embedding and head, which are one in {model.name}, by modules_to_save or by an "
                "adapter of the embedding.\nOnly what was trained with ensure_weight_tying is understood."
            )
    return rows


def _take_head_rows(left: dict[str, Tensor], model: ModelConfig, location: str) -> Tensor:
    """Take the trained rows of the head out of `left`."""
    rows = left.pop(f"{_PREFIX}{_head(model)}{_TOKENS}", None)
    if rows is None:
        raise CheckpointError(f"{location}: the trained rows of the head ({_head(model)}) are missing.")
    return rows


def _trains_head_rows(model: ModelConfig, config: LoRAConfig) -> bool:
    """Tell whether rows of a head of its own are trained."""
    return config.train_head_rows and not model.tied_head


def _token_indices(model: ModelConfig, config: LoRAConfig) -> list[int] | dict[str, list[int]] | None:
    """Return PEFT's trainable_token_indices: a list for the embedding alone, else one for each module."""
    tokens: Any = list(config.train_tokens)  # type: ignore[arg-type]
    if _trains_head_rows(model, config):
        return {_leaf(name): tokens for name in (_embedding(model), _head(model))}
    return tokens or None


def _embedding(model: ModelConfig) -> str:
    """Return Hugging Face's name of the embedding."""
    return _homes("embed", family_of(model))[0].module


def _head(model: ModelConfig) -> str:
    """Return Hugging Face's name of the output head."""
    return _homes("head", family_of(model))[0].module


def _layers(names: Iterable[str]) -> list[str]:
    """List our layers with adapters, from the names of an adapter's tensors."""
    return [name.removesuffix(".lora_a") for name in names if name.endswith(".lora_a")]


def _size(home: "_Home", members: list[str], config: LoRAConfig) -> tuple[int, float]:
    """Return rank and alpha of the Hugging Face layer of these layers, with the scale of each."""
    if len({config.scale(layer) for layer in members}) > 1:
        raise CheckpointError(
            f"{', '.join(members)} are one layer in Hugging Face's model ({home.module}), with one scale.\n"
            "Choose lora.rank_pattern and lora.alpha_pattern such that alpha / r is the same for them."
        )
    rank = sum(map(config.rank, members))
    more = rank / config.rank(members[0])
    return rank, first_match(config.alpha_pattern, members[0], config.alpha) * (more**0.5 if config.rslora else more)


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Make PEFT's patterns for a value of each module: by the last part of its name if all such modules agree."""
    leaves: dict[str, set[Any]] = {}
    for module, value in values.items():
        leaves.setdefault(_ending(module), set()).add(value)
    return {
        _ending(module) if len(leaves[_ending(module)]) == 1 else module: value
        for module, value in values.items()
        if value != default
    }


@dataclass(frozen=True, kw_only=True)
class _Home:
    """The Hugging Face layer that is one of ours, or contains it."""

    module: str
    fused: Fused | None
    transposed: bool
    """True for a Conv1D, with A and B like a Linear's."""

    @staticmethod
    def part(layer: str) -> str:
        """Return the name of our layer's weight in `fused`."""
        return f"{template(layer)[0]}.weight"


def _homes(layer: str, family: Family) -> list[_Home]:
    """List Hugging Face's layers for one of our linear layers, with the name in transformers' memory first."""
    ours, numbers = template(layer)
    found = []
    for theirs, rule in reversed(list(family.weights.items())):
        transposed = isinstance(rule, Transposed)
        rule = rule.rule if isinstance(rule, Transposed) else rule
        rule = rule.holding(f"{ours}.weight") if isinstance(rule, Either) else rule
        if isinstance(rule, str | Fused) and f"{ours}.weight" in parts_of(rule):
            module = fill(theirs.removesuffix(".weight"), numbers)
            fused = rule if isinstance(rule, Fused) else None
            found.append(_Home(module=module, fused=fused, transposed=transposed))
    if not found:
        raise CheckpointError(
            f"{layer} is no layer of its own in Hugging Face's model, so PEFT's layout cannot hold its adapter."
        )
    return found


def _group(layers: Iterable[str], model: ModelConfig, known: Iterable[str] = ()) -> list[tuple[_Home, list[str]]]:
    """Group our layers by Hugging Face's layer, under its name in `known`, else the one in transformers."""
    family = family_of(model)
    groups: dict[str, tuple[_Home, list[str]]] = {}
    for layer in layers:
        options = _homes(layer, family)
        home = next((option for option in options if option.module in known), options[0])
        groups.setdefault(home.module, (home, []))[1].append(layer)
    return list(groups.values())


def _widen(tensor: Tensor, rank: int, dim: int) -> Tensor:
    """Fill up with zeros to the rank, which changes no result."""
    if tensor.shape[dim] >= rank:
        return tensor.contiguous()
    shape = list(tensor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)


def _words(modules: Iterable[str], location: str) -> tuple[Any, ...]:
    """Find our target words for modules of any family."""
    known: dict[str, dict[str, None]] = {f"experts.{name}": {"mlp": None} for name in PARAMETERS}
    known |= {f"{name}s.{{e}}": {"mlp": None} for name in PARAMETERS}  # see is_single
    for family in FAMILIES.values():
        for theirs, rule in family.weights.items():
            for part in parts_of(rule):
                if part != DROP and theirs.endswith(".weight"):
                    words = [word for word in part.split(".") if word in TARGETS]
                    words = ["router"] if "router" in words else words
                    known.setdefault(_tail(theirs.removesuffix(".weight")), {}).update(dict.fromkeys(words))
    if unknown := sorted({_leaf(module) for module in modules if not known.get(_tail(module))}):
        raise CheckpointError(f"{location} adapts layers that have no counterpart here: {', '.join(unknown)}.")
    return tuple(dict.fromkeys(word for module in sorted(modules, key=_leaf) for word in known[_tail(module)]))


def _tail(module: str) -> str:
    """Return the part of a path that identifies a layer in its block: "self_attn.q_proj" (c_proj is ambiguous)."""
    return ".".join(template(module)[0].rsplit(".", 2)[-2:])


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _ending(name: str) -> str:
    """Return the last part of the name of a module; of a parameter that is a weight, its module's too."""
    return _tail(name) if name.endswith(".weight") else _leaf(name)


def _in_block(name: str) -> str:
    """Return what follows the number of the block in a name."""
    parts = name.split(".")
    return ".".join(parts[next((i + 1 for i, part in enumerate(parts) if part.isdecimal()), 0) :])


def _their_name(name: str) -> str:
    """Return transformers' name of the weight that one of PEFT's tensors holds."""
    return name.removeprefix(_PREFIX).replace(_BASE, ".weight")


def _module_of(name: str) -> str:
    """Return the module that one of PEFT's tensors adapts."""
    return name.removeprefix(_PREFIX).split(".lora_")[0]
