"""Which device there is, and which dtype the weights and the arithmetic get on it."""

import torch

from lit_qlora.errors import UsageError
from lit_qlora.settings import Precision


def pick_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """`precision`, or the best one for `device` if it is "auto".

    Raises:
        UsageError: for one that the device cannot do well.
    """
    cuda = device.type == "cuda"
    bf16 = cuda and torch.cuda.get_device_capability(device)[0] >= 8  # before Ampere it is emulated, and slow
    if precision == "auto":
        return "bf16-true" if bf16 else "16-mixed" if cuda else "32-true"
    if precision == "16-mixed" and not cuda:
        raise UsageError("precision 16-mixed needs a GPU; on a CPU take 32-true or bf16-true.")
    return precision


def weights_dtype(precision: Precision) -> torch.dtype:
    """Dtype of the frozen weights: 16 bit only for the -true precisions, float32 where arithmetic alone is 16 bit."""
    return torch.bfloat16 if precision == "bf16-true" else torch.float32
