"""Merge an adapter into its base; the result is an ordinary checkpoint.

python scripts/merge_lora.py --lora_path out/lora/Llama-2-7b-hf/final
python scripts/merge_lora.py --lora_path out/lora/Llama-2-7b-hf/final --verify val.jsonl --tolerance 0.01
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_qlora import cli
from lit_qlora.errors import CheckpointError, UserError
from lit_qlora.inference import adapter_folder, base_of, peak_memory
from lit_qlora.settings import check

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lit_qlora.data import Batch
    from lit_qlora.lora.adapter import Adapter
    from lit_qlora.lora.merge import Base, Merge

OWN_SAMPLES = 64
"""Most validation samples of the run that are measured on unasked."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Merge one or several adapters into their base; the result is an ordinary checkpoint. No GPU is needed."""

    lora_path: tuple[Path, ...] | Path | None = None
    """Adapter, such as OUT/final of finetune/lora.py, for which OUT stands too, or a list of adapters to add, e.g.
    [a/final,b/final]. By default the adapter of the newest run under out/lora."""
    weights: tuple[float, ...] | float | None = None
    """Factor of each adapter's update, e.g. [0.7,0.3]. By default 1. -1 takes an adapter out of a merged checkpoint
    (checkpoint_dir) again, up to rounding."""
    checkpoint_dir: Path | None = None
    """Base of the adapter. By default its path during training."""
    out_dir: Path | None = None
    """Folder for the merged checkpoint. By default OUT/merged, beside the adapter."""
    base: Literal["auto", "original", "quantized"] = "auto"
    """Weights that the update is added to: the 16- or 32-bit weights, or the weights as 4- or 8-bit training saw
    them. 'auto' takes the better one that --verify finds; if nothing is measured it is original."""
    verify: str = "auto"
    """File of samples, such as data.val_path of finetune/lora.py, to measure the effect of merging. It compares
    quantised base + adapter with the merge onto the original and onto the quantised base. 'auto' takes up to 64 of the
    run's own validation samples, if they are still there and the machine has room for both models; 'none' measures
    nothing."""
    verify_samples: int | None = None
    """Measure on the first N samples only. By default on all of a file."""
    verify_batch_size: int = 4
    """Samples per forward pass while measuring. Changes memory and speed, not the result."""
    tolerance: float = 0.05
    """Maximum nats per token by which merging may raise the loss on the file of --verify. Above it nothing is
    written."""

    def __post_init__(self) -> None:
        """Check the settings before anything is read."""
        if isinstance(self.lora_path, Path):
            object.__setattr__(self, "lora_path", (self.lora_path,))
        if isinstance(self.weights, int | float):
            object.__setattr__(self, "weights", (self.weights,))
        check(self.lora_path != (), "lora_path is empty. Name at least one adapter.")
        if self.weights is not None:
            wanted = len(self.lora_path) if self.lora_path else 1
            check(len(self.weights) == wanted, f"weights has {len(self.weights)} numbers for {wanted} adapters.")
            check(
                all(w and math.isfinite(w) for w in self.weights), f"weights must be finite and not 0: {self.weights}."
            )
        check(self.verify_samples is None or self.verify_samples >= 1, "verify_samples must be at least 1.")
        check(self.verify_batch_size >= 1, "verify_batch_size must be at least 1.")
        check(0 <= self.tolerance < math.inf, f"tolerance must be finite and not negative, got {self.tolerance}.")


def main(config: MergeConfig) -> None:
    """Measure if asked, merge, and print the size of the update."""
    from lit_qlora.lora.adapter import read_adapter
    from lit_qlora.lora.merge import Merge, check_replaceable

    paths = [adapter_folder(path) for path in config.lora_path or (newest_adapter(),)]
    adapters = [read_adapter(path, heads=True) for path in paths]
    checkpoint_dir = config.checkpoint_dir or base_of(paths[0])
    out_dir = config.out_dir or paths[0].resolve().parent / "merged"
    check(
        out_dir.resolve() != checkpoint_dir.resolve(),
        f"out_dir: {out_dir} is the base itself. Give --out_dir another name.",
    )
    check_replaceable(out_dir)
    if heads := [str(adapter.path) for adapter in adapters if adapter.score is not None]:
        check(len(adapters) == 1, f"{heads[0]} has a trained head, and a sum of adapters has none. Merge it alone.")
        check(
            config.verify in ("auto", "none"),
            f"verify measures texts, and {heads[0]} reads labels. Leave it out; scripts/classify.py measures these.",
        )
        config = replace(config, verify="none")
    merge = Merge(adapters, checkpoint_dir, "original" if config.base == "auto" else config.base, config.weights)
    facts: dict[str, Any] = {}
    if config.verify != "none":
        merge, facts = measured(config, adapters, checkpoint_dir, merge)
    report = merge.write(out_dir, facts)
    shown = out_dir.relative_to(Path.cwd()) if out_dir.is_relative_to(Path.cwd()) else out_dir
    print(
        f"merged {len(report['layers'])} layers of {report['base']['name']} (onto the {merge.base} weights)\n"
        f"  the largest update is {report['largest_update']:.2%} of its weight; rounding to the base's dtype lost "
        f"{report['largest_rounding']:.2%}\n"
        f"  {shown}   details in merge_report.json   {peak_memory()} at most"
    )


def measured(
    config: MergeConfig, adapters: "Sequence[Adapter]", checkpoint_dir: Path, merge: "Merge"
) -> "tuple[Merge, dict[str, Any]]":
    """Measure both ways to merge, and return the better one unless --base names another, with facts for its report.

    Raises:
        NumericalError: if that one loses more than the tolerance.
    """
    from lit_qlora.lora.merge import Merge
    from lit_qlora.lora.verify import check_tolerance, recommend, report_lines, verify

    bases: list[Base] = ["original"] if merge.trained.plain else ["original", "quantized"]
    merges = [Merge(adapters, checkpoint_dir, base, config.weights) for base in bases]
    try:
        batches, samples = read_samples(config, adapters, checkpoint_dir, merge)
        metrics = verify(merges, batches)
    except UserError as error:
        if config.verify != "auto":
            raise
        reason = str(error).partition("\n")[0]
        print(f"The effect of merging is not measured: {reason}\n  --verify FILE measures it on other samples.")
        return merge, {"not_measured": reason}
    print(*report_lines(metrics), sep="\n")
    recommended = recommend(metrics)
    wanted = recommended if config.base == "auto" else config.base
    chosen = next((one for one in merges if one.base == wanted), merge)
    check_tolerance(chosen.base if chosen.base in metrics else "original", metrics, config.tolerance)
    return chosen, {"verified_on": samples, "verified": metrics, "recommended": recommended}


def read_samples(
    config: MergeConfig, adapters: "Sequence[Adapter]", checkpoint_dir: Path, merge: "Merge"
) -> "tuple[list[Batch], str]":
    """Return the samples of the file, or the run's own, with a name for them.

    Raises:
        UserError: if there are none, or the machine is too small for a measurement that nobody has asked for.
    """
    from lit_qlora.lora.verify import check_affordable, own_batches, read_batches

    most, size = config.verify_samples, config.verify_batch_size
    if config.verify != "auto":
        return read_batches(config.verify, adapters[0], checkpoint_dir, most, size), config.verify
    check_affordable(merge)
    return own_batches(adapters[0], checkpoint_dir, most or OWN_SAMPLES, size), "validation samples of the run"


def newest_adapter() -> Path:
    """Return OUT/final of the newest run at the default path of finetune/lora.py."""
    found = sorted(Path("out/lora").glob("*/final"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise CheckpointError("No adapter is under out/lora. Train one with finetune/lora.py or give --lora_path.")
    return found[-1]


if __name__ == "__main__":
    cli.run(main, MergeConfig)
