"""Measure an adapter at parts and multiples of its update, and write a weaker or stronger one.

python scripts/weigh_lora.py --lora_path out/lora/Llama-2-7b-hf
python scripts/weigh_lora.py --lora_path out/lora/Llama-2-7b-hf --kl_budget 0.05
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lit_qlora import cli
from lit_qlora.inference import adapter_folder, base_of
from lit_qlora.settings import Settings, check
from lit_qlora.settings.limits import Count, NotNegative

if TYPE_CHECKING:
    from lit_qlora.evaluate.weigh import Strength

NOT_KEPT = ("format", "files", "state", "lora", "init", "loftq_steps")
"""Entries of the adapter's manifest that are not true of the new one."""


@dataclass(frozen=True, kw_only=True)
class WeighConfig(Settings):
    """Measure an adapter at 0, 0.25 ... 1.5 times its update: in all, and by thirds of the blocks, the others at 1."""

    lora_path: Path
    """Adapter, such as OUT/final of finetune/lora.py; a run folder OUT stands for it."""
    checkpoint_dir: Path | None = None
    """Base of the adapter. By default its path during training."""
    data: str | None = None
    """File of samples for the validation loss. By default the validation samples of the run."""
    max_samples: Count = 256
    """Measure on the first N samples."""
    batch_size: Count = 4
    """Samples per forward pass. Changes memory and speed, not the result."""
    kl_text: Path = Path("default")
    """Text file on which the distance to the base is measured, as with eval.kl_text."""
    factors: tuple[NotNegative, ...] | NotNegative = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    """Multiples of the update."""
    kl_budget: NotNegative | None = None
    """Write the adapter with the lowest validation loss whose distance to the base is at most N nats a token."""
    factor: NotNegative | None = None
    """Write the adapter of this multiple, instead."""
    out_dir: Path | None = None
    """Folder of the new adapter. By default beside the old one, final-x0.5 for final."""

    def __post_init__(self) -> None:
        """Check that no setting would be without effect."""
        super().__post_init__()
        assert isinstance(self.factors, tuple)
        check(bool(self.factors), "factors is empty, so nothing would be measured.")
        check(self.kl_budget is None or self.factor is None, "kl_budget and factor both choose. Leave one out.")
        writes = self.kl_budget is not None or self.factor is not None
        check(writes or self.out_dir is None, "out_dir has no effect without kl_budget or factor.")
        check(self.kl_budget is None or 0 in self.factors, "kl_budget needs 0 among the factors, the base itself.")


def main(config: WeighConfig) -> None:
    """Measure the curve, print it, and write the adapter that was asked for."""
    from lit_qlora.checkpoint.checkpoint import load_stored
    from lit_qlora.checkpoint.identity import base_facts
    from lit_qlora.device import pick_device
    from lit_qlora.evaluate.validation_inputs import read_text
    from lit_qlora.evaluate.weigh import Dial, scaled, within_budget
    from lit_qlora.lora.adapter import attach_adapter, check_base, our_tensors, read_adapter, save_state, weights_of
    from lit_qlora.lora.elsewhere import read_caveats
    from lit_qlora.lora.verify import own_batches, read_batches
    from lit_qlora.model.config import ModelConfig
    from lit_qlora.prompts.style import read_style
    from lit_qlora.prompts.tokenizer import Tokenizer
    from lit_qlora.quantize import Storage

    path = adapter_folder(config.lora_path)
    adapter = read_adapter(path)
    base = config.checkpoint_dir or base_of(path)
    check_base(adapter, base)
    storage = Storage.of_training(adapter.manifest or {})
    check(
        not adapter.init or storage.plain,
        f"The adapter began with lora.init {(adapter.init or ('',))[0]} on a quantised base that is not the published "
        "one, so its update has no multiples.",
    )
    if config.data:
        batches = read_batches(config.data, adapter, base, config.max_samples, config.batch_size)
    else:
        batches = own_batches(adapter, base, config.max_samples, config.batch_size)
    text = read_text(config.kl_text, Tokenizer(base))[: ModelConfig.load(base).block_size]
    model = load_stored(base, storage, pick_device())
    attach_adapter(model, adapter, base)
    assert isinstance(config.factors, tuple)
    dial = Dial(model, batches, text)
    curve = list(dial.curve(config.factors))
    print(table(curve))
    if config.kl_budget is None and config.factor is None:
        return
    chosen = dial.measure("all", config.factor) if config.factor is not None else None
    chosen = chosen or within_budget(dial, curve, config.kl_budget or 0.0)
    out_dir = config.out_dir or path.with_name(f"{path.name}-x{chosen.factor:.4g}")
    check(not out_dir.exists(), f"out_dir: {out_dir} exists. Name another.")
    facts = {name: value for name, value in (adapter.manifest or {}).items() if name not in NOT_KEPT}
    origin = {"weighed_from": {"path": str(path), "factor": chosen.factor, "kl_to_base": chosen.kl}}
    save_state(
        out_dir,
        scaled(our_tensors(adapter, model.config, weights_of(model)), chosen.factor),
        model.config,
        adapter.config,
        read_style(path),
        {"base": base_facts(base), **facts, **origin},
    )
    print(f"factor {chosen.factor:.4g}: val loss {chosen.val_loss:.4f}, KL to the base {chosen.kl:.4g}")
    print(out_dir, *read_caveats(out_dir, model.config.tied_head), sep="\n  ")


def table(curve: "list[Strength]") -> str:
    """Write validation loss and distance to the base at each factor, for all blocks and for each third."""
    parts = list(dict.fromkeys(point.part for point in curve))
    lines = [
        f"| factor |{''.join(f' val loss, {part} | KL, {part} |' for part in parts)}",
        f"|---:|{'---:|---:|' * len(parts)}",
    ]
    for factor in dict.fromkeys(point.factor for point in curve):
        row = [point for point in curve if point.factor == factor]
        lines.append(f"| {factor:g} |{''.join(f' {point.val_loss:.4f} | {point.kl:.4f} |' for point in row)}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, WeighConfig)
