"""Unsloth."""

import os
from typing import Any

from contestants.hf import make_loss, target_modules
from contestants.task import Built, Task


def build(task: Task, varlen: bool = False) -> Built:
    """As its notebooks do it; with `varlen` its packed attention also on a torch whose varlen_attn it finds too old."""
    os.environ |= {"UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_RETURN_LOGITS": "0"}
    if varlen:
        _name_enable_gqa()
    import unsloth  # before all other libraries, as it asks for  # isort: skip
    import torch

    model, _ = unsloth.FastLanguageModel.from_pretrained(
        model_name=task.dir,
        max_seq_length=max(2048, task.rows * task.length if task.workload == "packed" else task.length),
        dtype=torch.bfloat16,
        load_in_4bit=task.quantize,
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=task.r,
        target_modules=target_modules(task),
        lora_alpha=16,
        lora_dropout=task.dropout,
        bias="none",
        use_gradient_checkpointing="unsloth" if task.checkpointing else False,
        random_state=0,
    )
    # None keeps the way of checkpointing that get_peft_model was told.
    unsloth.FastLanguageModel.for_training(model, use_gradient_checkpointing=None if task.checkpointing else False)
    return Built(model.train(), make_loss(model, lengths=True))


def _name_enable_gqa() -> None:
    """Give varlen_attn of torch 2.11 the argument enable_gqa, whose name unsloth 2026.10 looks for."""
    import inspect

    from torch.nn.attention import varlen

    plain = varlen.varlen_attn
    if "enable_gqa" in inspect.signature(plain).parameters:
        return

    def varlen_attn(*tensors: Any, window_size: Any = (-1, -1), enable_gqa: bool = False, **settings: Any) -> Any:
        assert not enable_gqa, "only for models whose heads all have keys of their own"
        return plain(*tensors, window_size=window_size, **settings)

    varlen.varlen_attn = varlen_attn
    if asked := getattr(varlen, "_can_use_cudnn", None):  # which unsloth asks with enable_gqa as the last of six
        known = len(inspect.signature(asked).parameters)
        varlen._can_use_cudnn = lambda *arguments: asked(*arguments[:known])
