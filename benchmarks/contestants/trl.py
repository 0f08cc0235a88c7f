"""TRL's DPO over a model of Unsloth, as the notebooks of Unsloth have it."""

import os
from typing import TYPE_CHECKING, Any

from contestants import unsloth
from contestants.task import Built, Micro, Task

if TYPE_CHECKING:
    from torch import Tensor


def build(task: Task, precomputed: bool = False) -> Built:
    """The step of DPOTrainer without its loop.

    Args:
        precomputed: the log-probabilities of the reference are known, as with precompute_ref_log_probs; by default each
            step computes them with the adapter off.
    """
    built = unsloth.build(task)
    os.environ["UNSLOTH_RETURN_LOGITS"] = "1"  # which TRL reads
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from unsloth import PatchDPOTrainer

    PatchDPOTrainer()
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(task.dir)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    settings = DPOConfig(
        output_dir=f"{task.dir}-dpo",
        beta=0.1,
        bf16=True,
        per_device_train_batch_size=task.rows,
        gradient_checkpointing=False,  # Unsloth has its own, which get_peft_model was told
        max_length=task.length + task.answer + 1,
        report_to="none",
    )
    pairs = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    trainer: Any = DPOTrainer(
        model=built.model, ref_model=None, args=settings, train_dataset=pairs, processing_class=tokenizer
    )
    trainer.precompute_ref_logps = precomputed

    def loss(micro: Micro) -> "Tensor":
        with torch.autocast(micro.ids.device.type, dtype=torch.bfloat16):
            value: Tensor = trainer.compute_loss(built.model, inputs(task, micro.ids, precomputed))
        return value

    return Built(built.model, loss)


def inputs(task: Task, ids: "Tensor", precomputed: bool) -> dict[str, "Tensor"]:
    """Pairs (B, prompt + 2 answers) under the names of TRL 1 and of the versions before it."""
    import torch

    prompt, chosen, rejected = ids.split((task.length, task.answer, task.answer), dim=1)
    whole = torch.cat((torch.cat((prompt, chosen), dim=1), torch.cat((prompt, rejected), dim=1)))
    answers = (torch.arange(whole.size(1), device=ids.device) >= task.length).long().expand_as(whole)
    told = {"input_ids": whole, "attention_mask": torch.ones_like(whole), "completion_mask": answers.contiguous()}
    for name, part in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        told |= {f"{name}_input_ids": part, f"{name}_attention_mask": torch.ones_like(part)}
    if precomputed:
        told |= dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps"), torch.zeros(len(ids), device=ids.device))
    return told
