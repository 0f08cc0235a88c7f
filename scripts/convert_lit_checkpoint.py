"""Convert a checkpoint into a complete Hugging Face folder, for transformers and the tools that read its models.

python scripts/convert_lit_checkpoint.py --checkpoint_dir out/lora/Llama-2-7b-hf/merged --out_dir my-model
"""

import math
from dataclasses import dataclass
from pathlib import Path

from lit_qlora import cli
from lit_qlora.settings import check


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Convert a checkpoint into a complete Hugging Face folder. Memory holds a few tensors at a time."""

    checkpoint_dir: Path
    """The checkpoint: a converted or merged model."""
    out_dir: Path
    """Folder to write: config.json, safetensors, the tokenizer's files and a model card."""
    shard_gb: float = 5.0
    """Maximum gigabytes (10^9 bytes) of weights in a file."""

    def __post_init__(self) -> None:
        """Check the size of a file."""
        check(0 < self.shard_gb < math.inf, f"shard_gb must be above 0 and finite, got {self.shard_gb}.")


def main(config: ExportConfig) -> None:
    """Convert, and print a summary."""
    from lit_qlora.checkpoint.checkpoint import count_parameters
    from lit_qlora.convert.to_hugging_face import export_hf

    model = export_hf(config.checkpoint_dir, config.out_dir, int(config.shard_gb * 1e9))
    print(f"exported {model.name} ({model.family}, {count_parameters(model):,} parameters): {config.out_dir}")


if __name__ == "__main__":
    cli.run(main, ExportConfig)
