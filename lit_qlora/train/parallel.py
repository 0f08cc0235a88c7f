"""Several processes that train one adapter, each on its part of every step; they exchange only the gradients.

torch's DistributedDataParallel does not fit here. Before each forward pass it sends every buffer, and quantised weights
are buffers. In each backward pass it waits for a gradient of every parameter. But an expert may get none, and the fast
path writes gradients without autograd.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Literal

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from torch import Tensor, distributed, nn

from lit_qlora.errors import ResourceError
from lit_qlora.settings import Strategy, check
from lit_qlora.train.launcher import Children, Launcher

AT_ONCE = 2**23
"""Elements sent at once: enough to fill a link, and a copy of them is small."""


class DataParallel(DDPStrategy):
    """Processes started as Lightning's DDP does, with the module as it is; see sum_gradients.

    Attributes:
        children: the processes that this one started.
    """

    def __init__(self) -> None:
        super().__init__()
        self.children = Children()

    def _configure_launcher(self) -> None:
        self._launcher = Launcher(self.children, self.cluster_environment, self.num_processes, self.num_nodes)

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Send the first process's adapter to all; its initialisation may round differently on other machines."""
        for parameter in module.parameters():
            if parameter.requires_grad:
                distributed.broadcast(parameter.detach(), src=0)
        return module


Devices = int | Literal["auto"]


def processes(devices: Devices, num_nodes: int) -> tuple[Devices, int]:
    """Return devices per machine, and machines; under torchrun, its own counts.

    Raises:
        UsageError: if the settings contradict torchrun.
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


def row_groups(devices: Devices, num_nodes: int, sequence_parallel: int) -> int:
    """Count the groups of processes that share a row, which each take other rows.

    Raises:
        UsageError: if sequence_parallel does not divide the number of processes.
    """
    processes = world_size(devices, num_nodes)
    check(
        processes % sequence_parallel == 0,
        f"sequence_parallel {sequence_parallel} does not divide {processes} devices into equal groups.\n"
        "Give --devices a multiple of it.",
    )
    return processes // sequence_parallel


def is_first() -> bool:
    """Tell whether this process is torchrun's first, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def strategy(wanted: Strategy, devices: Devices, num_nodes: int) -> DataParallel | str:
    """Choose Fabric's strategy for so many devices on each of so many machines.

    A sharded base changes nothing here: its adapters are in each process.
    """
    here = devices if devices != "auto" else torch.cuda.device_count()
    return DataParallel() if wanted != "auto" or here > 1 or num_nodes > 1 else "auto"


@contextmanager
def launched(fabric: Fabric) -> Iterator[Children]:
    """Start the processes of this machine, unless that is done, and let them end together.

    Yields:
        Those that this one started.
    """
    children = getattr(fabric.strategy, "children", Children())
    with children.led() if fabric.local_rank == 0 else ends_with_parent():
        fabric.launch()
        yield children


@contextmanager
def ends_with_parent(every: float = 2.0) -> Iterator[None]:
    """End this process if the one that started it ends meanwhile.

    A process that waits for another one on a GPU does not notice that this is gone, up to the timeout of their group.

    Args:
        every: seconds between two looks.
    """
    parent, done = os.getppid(), Event()

    def watch() -> None:
        while not done.wait(every):
            if os.getppid() != parent:
                os.write(2, b"\nerror: The process that started this one has ended, so this one ends too.\n")
                os._exit(ResourceError.status)

    Thread(target=watch, daemon=True, name="parent").start()
    try:
        yield
    finally:
        done.set()


@torch.no_grad()
def sum_gradients(fabric: Fabric, parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its sum over all processes; one that no process has remains None."""
    if fabric.world_size == 1:
        return
    learners = list(parameters)
    reached = torch.tensor([p.grad is not None for p in learners], dtype=torch.float32, device=fabric.device)
    distributed.all_reduce(reached)
    if any(p.grad is None for p in learners):  # otherwise nothing has to be read from the device
        for parameter, count in zip(learners, reached.tolist(), strict=True):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    for some in _in_parts([p.grad for p in learners if p.grad is not None]):
        flat = torch.cat([gradient.flatten() for gradient in some])
        distributed.all_reduce(flat)
        sums = flat.split([gradient.numel() for gradient in some])
        torch._foreach_copy_(some, [total.view_as(gradient) for total, gradient in zip(sums, some, strict=True)])


def _in_parts(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Group consecutive gradients of about AT_ONCE elements together."""
    part: list[Tensor] = []
    for gradient in gradients:
        part.append(gradient)
        if sum(g.numel() for g in part) >= AT_ONCE:
            yield part
            part = []
    if part:
        yield part
