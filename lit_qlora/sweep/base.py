"""The base of a sweep's trials, read and quantised once."""

import gc

import torch
from torch import nn

from lit_qlora.device import pick_device, reset_peak
from lit_qlora.model.gpt import GPT
from lit_qlora.quantize import QuantizedLinear, Storage
from lit_qlora.run.finetune import load_base
from lit_qlora.settings import FinetuneConfig

Key = tuple[str, Storage, torch.device]


class SharedBase:
    """Loads the base of one trial after another, and keeps it for the next; see finetune.Load.

    A trial gets a model of its own around the same linear layers. Training replaces their tensors only by equal ones in
    another layout, which the next trial then finds. Trials that change the base get one of their own: PiSSA, OLoRA and
    LoftQ, and 16-mixed, which rounds weights to float16 for good.

    Attributes:
        loads: how many times a base was read.
    """

    def __init__(self) -> None:
        self.key: Key | None = None
        self.model: GPT | None = None
        self.loads = 0

    def __call__(self, config: FinetuneConfig, storage: Storage, device: torch.device) -> GPT:
        """Return a model with the base of this run, without adapters."""
        key = (str(config.checkpoint_dir.resolve()), storage, device)
        if key != self.key or changes_base(config):
            self.release()
            self.loads += 1
            model = load_base(config, storage, device)
            if changes_base(config):
                return model
            self.key, self.model = key, model
        assert self.model is not None
        return around(self.model)

    def release(self) -> None:
        """Let go of the base."""
        self.key = self.model = None
        free_memory()


def changes_base(config: FinetuneConfig) -> bool:
    """Tell if a run leaves another base behind than it got."""
    return config.lora.init != "default" or config.precision == "16-mixed"


def around(base: GPT) -> GPT:
    """Make another model with the linear layers and the parameters of `base`, which has no adapters."""
    model = GPT.skeleton(base.config)
    for path, module in list(base.named_modules()):
        if isinstance(module, QuantizedLinear | nn.Linear):
            model.set_submodule(path, module)
    for name, parameter in base.named_parameters():
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, parameter)
    return model


def free_memory() -> None:
    """Free what a trial has left over, and forget its peak of memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    reset_peak(pick_device())
