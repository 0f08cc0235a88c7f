"""PEFT on transformers and bitsandbytes, with or without Liger's kernels."""

from typing import Any

from contestants.hf import make_loss, target_modules
from contestants.task import Built, Task


def build(task: Task, liger: bool = False) -> Built:
    """As PEFT's guide to quantised training does it."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from lit_qlora.device import pick_device

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(rope=True, swiglu=True, rms_norm=True, fused_linear_cross_entropy=True)
    settings: dict[str, Any] = {"attn_implementation": "sdpa", "device_map": pick_device(), "dtype": torch.bfloat16}
    if task.quantize:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(task.dir, **settings)
    model.config.use_cache = False
    again = {"use_reentrant": False}
    if task.quantize:
        model = prepare_model_for_kbit_training(model, task.checkpointing, again)
    elif task.checkpointing:
        model.gradient_checkpointing_enable(again)
        model.enable_input_require_grads()
    adapters = LoraConfig(
        r=task.r, lora_alpha=16, lora_dropout=task.dropout, target_modules=target_modules(task), task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, adapters)
    return Built(model.train(), make_loss(model, lengths=False))
