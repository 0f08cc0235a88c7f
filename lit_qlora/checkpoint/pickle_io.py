"""PyTorch's own files (pytorch_model.bin) a tensor at a time, and without running what is in them.

They are pickles, which can hold any program. torch.load(weights_only=True) builds tensors and nothing else and
refuses the rest; of a mapped file only the pages of the tensor that is asked for are read.
"""

import pickle
from pathlib import Path

import torch
from torch import Tensor

from lit_qlora.errors import CheckpointError


def read_specs(path: Path) -> dict[str, Tensor]:
    """Name -> an empty tensor on the meta device with the dtype and shape of the one in the file."""
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in _map(path).items()}


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of the file, on the CPU. The file is mapped anew each time: a mapping keeps every page it touched."""
    return _map(path)[name].clone(memory_format=torch.contiguous_format)


def _map(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} holds more than tensors, so opening it could run a program. It is refused and nothing was run.\n"
            "Take a model that is published as safetensors."
        ) from None
    except (RuntimeError, OSError, EOFError, KeyError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} is not a complete PyTorch file of today's (zip) kind: {reason}") from None
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise CheckpointError(f"{path} is not a dictionary of tensors, so it is no model.")
    return content
