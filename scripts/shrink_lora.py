"""Cut an adapter to a smaller rank, with the least loss; without --rank, only print the loss of each rank.

python scripts/shrink_lora.py --lora_path out/lora/Llama-2-7b-hf/final --verify val.jsonl
python scripts/shrink_lora.py --lora_path out/lora/Llama-2-7b-hf/final --rank 4
"""

from dataclasses import dataclass
from pathlib import Path

from lit_qlora import cli
from lit_qlora.inference import adapter_folder, base_of
from lit_qlora.settings import check

NOT_KEPT = ("format", "files", "state", "lora", "init", "loftq_steps")
"""Entries of the larger adapter's manifest that are not true of the smaller adapter."""


@dataclass(frozen=True, kw_only=True)
class ShrinkConfig:
    """Cut an adapter to a smaller rank, with the least loss; the result is a PEFT folder again."""

    lora_path: Path
    """Adapter, such as OUT/final of finetune/lora.py."""
    checkpoint_dir: Path | None = None
    """Base of the adapter. By default its path during training."""
    rank: int | None = None
    """New rank. Without rank and max_loss nothing is written."""
    max_loss: float | None = None
    """Share of the update's norm that may be lost, instead of a rank. The smallest rank within it is taken."""
    out_dir: Path | None = None
    """Folder for the new adapter. By default beside the old one, final-r4 for final."""
    verify: str | None = None
    """File of samples, such as data.val_path of finetune/lora.py, to measure the loss of each rank."""
    verify_samples: int | None = None
    """Measure on the first N samples only. By default on all."""
    verify_batch_size: int = 4
    """Samples per forward pass while measuring. Changes memory and speed, not the result."""

    def __post_init__(self) -> None:
        """Check the settings before anything is read."""
        check(self.rank is None or self.rank >= 1, f"rank must be at least 1, got {self.rank}.")
        check(self.rank is None or self.max_loss is None, "rank and max_loss both say how far to cut. Leave one out.")
        check(self.max_loss is None or 0 <= self.max_loss < 1, f"max_loss must be in [0, 1), got {self.max_loss}.")
        writes = self.rank is not None or self.max_loss is not None
        check(writes or self.out_dir is None, "out_dir has no effect without rank or max_loss.")
        check(self.verify_samples is None or self.verify_samples >= 1, "verify_samples must be at least 1.")
        check(self.verify_batch_size >= 1, "verify_batch_size must be at least 1.")


def main(config: ShrinkConfig) -> None:
    """Decompose, print the loss of each rank, and write the adapter of the chosen rank."""
    from lit_qlora.checkpoint.checkpoint import open_weights
    from lit_qlora.checkpoint.identity import base_facts
    from lit_qlora.lora.adapter import check_base, our_tensors, read_adapter, save_state
    from lit_qlora.lora.elsewhere import read_caveats
    from lit_qlora.lora.shrink import candidates, cut, loss_at, smallest_rank, spectra
    from lit_qlora.model.config import ModelConfig
    from lit_qlora.prompts.style import read_style

    path = adapter_folder(config.lora_path)
    adapter = read_adapter(path)
    facts = {k: v for k, v in (adapter.manifest or {}).items() if k not in NOT_KEPT}
    checkpoint_dir = config.checkpoint_dir or base_of(path)
    check_base(adapter, checkpoint_dir)
    model = ModelConfig.load(checkpoint_dir)
    state = our_tensors(adapter, model, open_weights(checkpoint_dir).read)
    found = spectra(state, adapter.config)
    ranks = candidates(found)
    check(
        config.rank is None or config.rank < ranks[-1], f"rank is {config.rank}; the adapter has {ranks[-1]} already."
    )
    rank = config.rank if config.max_loss is None else smallest_rank(found, config.max_loss)
    out_dir = config.out_dir or path.with_name(f"{path.name}-r{rank}")
    check(rank is None or not out_dir.exists(), f"out_dir: {out_dir} exists. Name another.")
    ranks = sorted({*ranks, *([rank] if rank else [])})
    losses = {}
    if config.verify:
        from lit_qlora.lora.verify import losses_of, read_batches

        batches = read_batches(config.verify, adapter, checkpoint_dir, config.verify_samples, config.verify_batch_size)
        losses = losses_of(adapter, checkpoint_dir, {r: cut(state, found, adapter.config, r) for r in ranks}, batches)
    print(f"| rank | lost of the update | of the worst layer's | MB |{' val loss |' if losses else ''}")
    print(f"|---:|---:|---:|---:|{'---:|' if losses else ''}")
    per_rank = sum(spectrum.left.size(0) + spectrum.right.size(1) for spectrum in found.values()) * 4 / 1e6
    for r in ranks:
        whole, worst = loss_at(found, r)
        chosen = " <" if r == rank else ""
        loss = f" {losses[r]:.4f} |" if losses else ""
        print(f"| {r}{chosen} | {whole:.2%} | {worst:.2%} | {r * per_rank:.2f} |{loss}")
    if rank is None:
        return
    cut_state, smaller = cut(state, found, adapter.config, rank)
    origin = {"shrunk_from": {"path": str(path), "r": adapter.config.r, "lost": loss_at(found, rank)[0]}}
    save_state(
        out_dir,
        cut_state,
        model,
        smaller,
        read_style(path),
        {"base": base_facts(checkpoint_dir), **facts, **origin},
    )
    print(f"rank {rank}: {out_dir}", *read_caveats(out_dir, model.tied_head), sep="\n  ")


if __name__ == "__main__":
    cli.run(main, ShrinkConfig)
