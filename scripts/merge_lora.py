"""Fold an adapter into its base model; the result is an ordinary checkpoint.

python scripts/merge_lora.py --lora_path out/lora/Llama-2-7b-hf/final
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lit_qlora import cli
from lit_qlora.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Fold an adapter into its base model; the result is an ordinary checkpoint. Needs no GPU and no bitsandbytes."""

    lora_path: Path | None = None
    """The adapter, such as OUT/final of finetune/lora.py; by default that of the newest run under out/lora."""
    checkpoint_dir: Path | None = None
    """The base that the adapter was trained on; by default where it was then."""
    out_dir: Path | None = None
    """Where the merged checkpoint goes; by default OUT/merged, beside the adapter."""
    base: Literal["original", "quantized"] = "original"
    """What the update is added to: the 16- or 32-bit weights, or the weights as 4- or 8-bit training saw them."""


def main(config: MergeConfig) -> None:
    """Merge and say how large the update is."""
    from lit_qlora.adapter import read_adapter
    from lit_qlora.merge import merge_checkpoint

    lora_path = config.lora_path or newest_adapter()
    adapter = read_adapter(lora_path)
    checkpoint_dir = config.checkpoint_dir
    if checkpoint_dir is None:
        if adapter.manifest is None:
            raise CheckpointError(f"{lora_path} does not say which base it was trained on. Give --checkpoint_dir.")
        checkpoint_dir = Path(adapter.manifest["base"]["path"])
    out_dir = config.out_dir or lora_path.resolve().parent / "merged"
    report = merge_checkpoint(adapter, checkpoint_dir, out_dir, config.base)
    print(
        f"merged {len(report['layers'])} layers of {report['base']['name']} (onto the {config.base} weights)\n"
        f"  the largest update is {report['largest_update']:.2%} of its weight; rounding to the base's dtype lost "
        f"{report['largest_rounding']:.2%}\n"
        f"  {out_dir}   details in merge_report.json"
    )


def newest_adapter() -> Path:
    """OUT/final of the newest run at the default place of finetune/lora.py."""
    found = sorted(Path("out/lora").glob("*/final"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise CheckpointError("No adapter is under out/lora. Train one with finetune/lora.py or give --lora_path.")
    return found[-1]


if __name__ == "__main__":
    cli.run(main, MergeConfig)
