"""Several processes that train one adapter, each on its part of every step; only the gradients travel.

torch's DistributedDataParallel does not fit here: before each forward pass it sends every buffer, which quantised
weights are, and it waits for a gradient of each parameter in each backward pass, while an expert may get none and the
fast path writes gradients past autograd.
"""

import os
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from torch import Tensor, distributed, nn

from lit_qlora.settings import check

AT_ONCE = 2**23
"""Numbers that are sent at once: enough for the bandwidth of a link, and a copy of them is small."""


class DataParallel(DDPStrategy):
    """Processes as Lightning's DDP starts them, around the module as it is; see sum_gradients."""

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Let every process start from the adapter of the first: what made it may round differently elsewhere."""
        for parameter in module.parameters():
            if parameter.requires_grad:
                distributed.broadcast(parameter.detach(), src=0)
        return module


Devices = int | Literal["auto"]


def processes(devices: Devices, num_nodes: int) -> tuple[Devices, int]:
    """Devices on each machine, and machines; where torchrun started this process, it knows.

    Raises:
        UsageError: if something else was asked for.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return devices, num_nodes
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    machines = int(os.environ["WORLD_SIZE"]) // here
    for name, asked, started in (("devices", devices, here), ("num_nodes", num_nodes, machines)):
        check(
            asked in (1, "auto", started),
            f"{name} is {asked}, but torchrun started {here} processes on each of {machines} machines. Leave it out.",
        )
    return here, machines


def processes_here(devices: Devices) -> int:
    """Count the processes of the run on this machine."""
    return devices if devices != "auto" else max(1, torch.cuda.device_count())


def world_size(devices: Devices, num_nodes: int) -> int:
    """Count the processes of the run on all machines."""
    return processes_here(devices) * num_nodes


def is_first() -> bool:
    """Whether this process is the first of those that torchrun started, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def strategy(wanted: Literal["auto", "ddp"], devices: Devices, num_nodes: int) -> DataParallel | str:
    """How so many devices on each of so many machines work together, as Fabric takes it."""
    here = devices if devices != "auto" else torch.cuda.device_count()
    return DataParallel() if wanted == "ddp" or here > 1 or num_nodes > 1 else "auto"


@torch.no_grad()
def sum_gradients(fabric: Fabric, parameters: Iterable[nn.Parameter]) -> None:
    """Let each gradient be its sum over all processes; one that no process has stays None."""
    if fabric.world_size == 1:
        return
    learners = list(parameters)
    reached = torch.tensor([p.grad is not None for p in learners], dtype=torch.float32, device=fabric.device)
    distributed.all_reduce(reached)
    if any(p.grad is None for p in learners):  # or else nothing has to be read from the device
        for parameter, count in zip(learners, reached.tolist(), strict=True):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    for some in _in_parts([p.grad for p in learners if p.grad is not None]):
        flat = torch.cat([gradient.flatten() for gradient in some])
        distributed.all_reduce(flat)
        sums = flat.split([gradient.numel() for gradient in some])
        torch._foreach_copy_(some, [total.view_as(gradient) for total, gradient in zip(sums, some, strict=True)])


def _in_parts(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive gradients of about AT_ONCE numbers together."""
    part: list[Tensor] = []
    for gradient in gradients:
        part.append(gradient)
        if sum(g.numel() for g in part) >= AT_ONCE:
            yield part
            part = []
    if part:
        yield part
