"""The common part of the libraries on transformers."""

from typing import TYPE_CHECKING, Any

from contestants.task import Loss, Micro, Task

if TYPE_CHECKING:
    from torch import Tensor

HF_NAMES = {
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "query,value": ["q_proj", "v_proj"],
    "query,key,value,projection": ["q_proj", "k_proj", "v_proj", "o_proj"],
}

OF_DELTA_NETS = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"]


def target_modules(task: Task) -> list[str]:
    """PEFT's names of the layers that get adapters, the same as ours."""
    return HF_NAMES[task.targets] + OF_DELTA_NETS * (task.targets == "all" and "Qwen3.5" in task.shape)


def make_loss(model: Any, lengths: bool) -> Loss:
    """The loss of a model of transformers.

    Args:
        lengths: tell it the lengths of packed documents, besides positions that begin again.
    """
    import torch

    def loss(micro: Micro) -> "Tensor":
        told: dict[str, Any] = {}
        labels = micro.ids
        if micro.documents:
            told["position_ids"] = torch.cat([torch.arange(n) for n in micro.documents])[None].to(micro.ids.device)
            labels = labels.masked_fill(told["position_ids"] == 0, -100)  # no label across a border
            if lengths:
                told["packed_seq_lengths"] = torch.tensor(micro.documents, dtype=torch.int32)
        with torch.autocast(micro.ids.device.type, dtype=torch.bfloat16):
            value: Tensor = model(input_ids=micro.ids, labels=labels, **told).loss
        return value

    return loss
