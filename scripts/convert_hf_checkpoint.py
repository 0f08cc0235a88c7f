"""Convert a Hugging Face model folder (config.json and weights) into a checkpoint.

python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/meta-llama/Llama-2-7b-hf
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lit_qlora import cli
from lit_qlora.settings import check


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Convert a Hugging Face model folder into a checkpoint. Memory holds a few tensors at a time."""

    checkpoint_dir: Path
    """Hugging Face folder: config.json, the tokenizer's files, and safetensors or PyTorch .bin files, sharded or
    not."""
    out_dir: Path | None = None
    """Folder for the checkpoint. By default the same folder."""
    dtype: Literal["keep", "bf16", "fp32"] = "keep"
    """Dtype of the converted weights; 'keep' leaves each tensor as it is."""
    name: str | None = None
    """Name of the model. By default the last two parts of the folder, ORG/NAME."""
    shard_gb: float = 5.0
    """Maximum gigabytes (10^9 bytes) of weights in a file."""

    def __post_init__(self) -> None:
        """Check the size of a file."""
        check(self.shard_gb > 0, f"shard_gb must be above 0, got {self.shard_gb}.")


def main(config: ConvertConfig) -> None:
    """Convert, and print a summary."""
    from lit_qlora.convert.from_hugging_face import convert_hf_checkpoint, describe

    out_dir = config.out_dir or config.checkpoint_dir
    model = convert_hf_checkpoint(config.checkpoint_dir, out_dir, config.dtype, config.name, int(config.shard_gb * 1e9))
    print(describe(model, out_dir))


if __name__ == "__main__":
    cli.run(main, ConvertConfig)
