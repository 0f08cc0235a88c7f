"""Fine-tune GPT and Llama models with LoRA on a 4-bit base.

The names below are imported on first use, so that `import lit_qlora.cli` stays quick.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "DataConfig": "settings",
    "DistillConfig": "settings",
    "EvalConfig": "settings",
    "FinetuneConfig": "settings",
    "GPT": "model.gpt",
    "GenerationConfig": "settings",
    "InferenceConfig": "inference",
    "KVCache": "model.gpt",
    "LoRAConfig": "settings",
    "LoadedModel": "inference",
    "ModelConfig": "model.config",
    "OptimizerConfig": "settings",
    "PreferenceConfig": "settings",
    "PreferenceRunConfig": "settings",
    "Tokenizer": "prompts.tokenizer",
    "TrainConfig": "settings",
    "UserError": "errors",
    "add_lora": "lora.layer",
    "finetune": "run.finetune",
    "generate": "inference",
    "load_adapter": "lora.adapter",
    "load_model": "checkpoint.checkpoint",
    "merge": "lora.merge",
    "merge_checkpoint": "lora.merge",
    "quantize_linears": "quantize",
    "read_adapter": "lora.adapter",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lit_qlora' has no attribute {name!r}")
    return getattr(import_module(f"lit_qlora.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
