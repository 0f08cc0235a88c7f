"""Routers that PEFT trained as a whole (modules_to_save), as adapters of ours.

A router has as many rows as there are experts, so an adapter of that rank holds any change of its weight: A is the
change and B the identity, with a scale of 1.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lit_qlora.convert.families import Family, family_of, fill, find_rule, template
from lit_qlora.convert.families.rules import parts_of
from lit_qlora.errors import CheckpointError
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT
from lit_qlora.model.mlp import CORRECTION

Read = Callable[[str], Tensor]
"""The base's tensor of one of our names."""


def is_of_block(name: str) -> bool:
    """Tell whether one of PEFT's tensors was trained as a whole, and belongs to a block."""
    return ".lora_" not in name and bool(template(name)[1])


def number_of_experts(tensors: Mapping[str, Tensor], location: str) -> int:
    """The rows of the routers among PEFT's tensors that were trained as a whole; 0 without one."""
    routers = {name: tensor for name, tensor in tensors.items() if is_of_block(name) and name.endswith(".weight")}
    for name, tensor in routers.items():
        if tensor.dim() != 2 or len(tensor) != len(next(iter(routers.values()))) or not len(tensor):
            raise _not_understood(name, location)
    return len(next(iter(routers.values()), ()))


def as_adapters(
    tensors: Mapping[str, Tensor], prefix: str, model: ModelConfig, read: Read | None, location: str
) -> dict[str, Tensor]:
    """PEFT's tensors, with A and B instead of each router that was trained as a whole.

    Args:
        prefix: of PEFT's names before those of transformers.
        read: of the base, which is needed if there is such a router.

    Raises:
        CheckpointError: for another layer, for a router of another shape, and where more than its weight has changed.
    """
    found, whole = dict(tensors), {name: tensor for name, tensor in tensors.items() if is_of_block(name)}
    base = GPT.skeleton(model).state_dict() if whole else {}
    for name, tensor in whole.items():
        theirs = name.removeprefix(prefix)
        ours = _ours(theirs, family_of(model))
        if ours not in base:
            raise _not_understood(theirs, location)
        assert read is not None, "a router that was trained as a whole needs its base"
        own = read(ours).cpu()
        del found[name]
        if ours.endswith(".weight"):
            if tensor.shape != own.shape:
                raise CheckpointError(
                    f"{location}: {theirs} has shape {tuple(tensor.shape)}, expected {tuple(own.shape)}."
                )
            module = name.removesuffix(".weight")
            found[f"{module}.lora_A.weight"] = tensor.float() - own.float()
            found[f"{module}.lora_B.weight"] = torch.eye(len(own))
        elif not torch.equal(tensor.flatten(), own.to(tensor.dtype)):
            raise CheckpointError(
                f"{location} has another {theirs} than {model.name}, and an adapter of a router here changes its "
                "weight alone.\nMerge it with PEFT, and convert the model that comes out."
            )
    return found


def _ours(name: str, family: Family) -> str:
    """Our name of a tensor of a router, from theirs; "" for another one."""
    rule, numbers = find_rule(name, family)
    # Some have it in the router in memory, and elsewhere in their files.
    corrections = ("blocks.{i}.mlp" + CORRECTION,) if name.endswith(".e_score_correction_bias") else ()
    parts = corrections if rule is None else parts_of(rule)
    return next((fill(part, numbers) for part in parts if ".router." in part), "")


def _not_understood(name: str, location: str) -> CheckpointError:
    return CheckpointError(
        f"{location}: modules_to_save holds {name}, and is understood for the embeddings and routers alone.\n"
        "Other layers can learn as adapters: target_modules, target_parameters."
    )
