"""The state from which a run resumes: parameters that learn, the optimizer, the counters.

Random state and the order of the data are not part of it: both depend on the number of the step alone. Tensors go to a
safetensors file, everything else to JSON; nothing is pickled.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from lit_qlora.checkpoint import safetensors_io
from lit_qlora.errors import CheckpointError
from lit_qlora.files.reading import read_json

TENSORS, COUNTERS = "train_state.safetensors", "state.json"
FORMAT = 1

Writers = dict[str, Callable[[Path], Any]]


def state_files(
    fabric: Fabric, model: nn.Module, optimizer: torch.optim.Optimizer, counters: Mapping[str, Any]
) -> Writers:
    """Return a function for each file of the state that writes it: file name -> function."""
    tensors = {f"model/{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    rest = {
        "format": FORMAT,
        **counters,
        "optimizer": pack(optimizer.state_dict(), tensors, "optimizer"),
        "precision": pack(fabric.strategy.precision.state_dict(), tensors, "precision"),
    }
    return {
        TENSORS: lambda path: safetensors_io.write(path, tensors, tensors.items()),
        COUNTERS: lambda path: path.write_text(json.dumps(rest, indent=1) + "\n"),
    }


def read_counters(folder: Path) -> dict[str, Any]:
    """Read the counters that state_files wrote.

    Raises:
        CheckpointError: if the folder holds only an adapter, or a state of another format.
    """
    if not (folder / COUNTERS).is_file():
        raise CheckpointError(f"{folder} holds an adapter, but no {COUNTERS} to resume from.")
    state: dict[str, Any] = read_json(folder / COUNTERS)
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{folder / COUNTERS} has format {state.get('format')}; this version reads {FORMAT}.")
    kinds = {"step": int, "seconds": int | float, "base": dict, "data": dict, "config": dict, "versions": dict}
    if wrong := [name for name, kind in kinds.items() if name in state and not isinstance(state[name], kind)]:
        raise CheckpointError(f"{folder / COUNTERS} is damaged: {wrong[0]} is {state[wrong[0]]!r:.40}.")
    return state


@torch.no_grad()
def restore(fabric: Fabric, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Load the state in `folder` into model and optimizer.

    Raises:
        CheckpointError: if it belongs to other parameters.
    """
    state, tensors = read_counters(folder), safetensors_io.read_all(folder / TENSORS)
    learners = {f"model/{name}": p for name, p in model.named_parameters() if p.requires_grad}
    saved = {name: tensor for name, tensor in tensors.items() if name.startswith("model/")}
    if {name: p.shape for name, p in learners.items()} != {name: t.shape for name, t in saved.items()}:
        raise CheckpointError(f"{folder / TENSORS} holds other parameters than this run trains.")
    for name, parameter in learners.items():
        parameter.copy_(saved[name])
    try:
        optimizer.load_state_dict(unpack(state["optimizer"], tensors))
        fabric.strategy.precision.load_state_dict(unpack(state["precision"], tensors))
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise CheckpointError(f"{folder / COUNTERS} is damaged ({type(error).__name__}: {error}).") from None


def pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Make `value` fit for JSON; its tensors go into `tensors`, under names that begin with `name`."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().clone()  # a name each, even if two share storage
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, pack(item, tensors, f"{name}/{key}")] for key, item in value.items()]}
    if isinstance(value, tuple | list):
        return {type(value).__name__: [pack(item, tensors, f"{name}/{i}") for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name}: a {type(value).__name__} cannot be saved")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Restore the value that `pack` was given."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unpack(item, tensors) for key, item in content}
    items = [unpack(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
