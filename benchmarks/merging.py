"""Measure time and memory of a merge, and its effect on the answers, on a real shape with random weights.

python benchmarks/merging.py --shape llama-2-7b --scheme bnb.nf4

The adapter is random too, with the size of trained ones: each update has --update of its weight's norm, with singular
values that fall as 1 / i. The validation loss of random weights means nothing. KL and top-1 agreement between quantised
base + adapter and each merge are meaningful. The samples are sums in words, --samples of them.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import shapes


def make_adapter(base: Path, folder: Path, scheme: str, update: float, precision: str) -> None:
    """Write an adapter of rank 16 on all linear layers, as a run on `base` quantised by `scheme` would."""
    import torch

    from lit_qlora.checkpoint.checkpoint import open_weights
    from lit_qlora.checkpoint.identity import base_facts
    from lit_qlora.lora.adapter import save_state
    from lit_qlora.lora.layer import add_lora, lora_state
    from lit_qlora.model.config import ModelConfig
    from lit_qlora.model.gpt import GPT
    from lit_qlora.prompts.style import STYLES
    from lit_qlora.settings import LoRAConfig

    config, model_config = LoRAConfig(r=16, alpha=16, targets=("all",)), ModelConfig.load(base)
    skeleton = GPT.skeleton(model_config)
    add_lora(skeleton, config)
    weights = open_weights(base)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, spec in lora_state(skeleton).items():
        layer, _, matrix = name.rpartition(".")
        if matrix == "lora_a":
            directions = torch.linalg.qr(torch.randn(spec.size(1), 16, generator=generator)).Q.T
            state[name] = directions
        else:
            falling = 1 / torch.arange(1, 17)
            size = update * float(weights.read(f"{layer}.weight").float().norm()) / float(falling.norm())
            state[name] = torch.linalg.qr(torch.randn(spec.size(0), 16, generator=generator)).Q * falling * size
    facts = {
        "base": base_facts(base),
        "quantize": scheme,
        "quantize_head": False,
        "precision": precision,
    }
    save_state(folder, state, model_config, config, STYLES["alpaca"], facts)


def main() -> None:
    """Make the checkpoint and the adapter, run the command, and print its output, its peak and its seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="llama-2-7b", help="sizes of the model")
    parser.add_argument("--scheme", default="bnb.nf4", help="how the base was stored while the adapter was trained")
    parser.add_argument("--precision", default="bf16-true", help="dtype of that training")
    parser.add_argument("--update", type=float, default=0.02, help="norm of each update, relative to its weight")
    parser.add_argument("--samples", type=int, default=64, help="samples to measure on")
    parser.add_argument("--work_dir", type=Path, default=Path("/tmp/lit_qlora_bench"), help="where everything goes")
    arguments = parser.parse_args()
    base = arguments.work_dir / arguments.shape
    shapes.make_checkpoint(arguments.shape, base)
    adapter = arguments.work_dir / f"{arguments.shape}-{arguments.scheme}-adapter"
    make_adapter(base, adapter, arguments.scheme, arguments.update, arguments.precision)
    samples = arguments.work_dir / "sums.jsonl"
    rows = [
        {
            "instruction": f"What is {i * 7919 % 997} plus {i * 104729 % 991}?",
            "output": str(i * 7919 % 997 + i * 104729 % 991),
        }
        for i in range(arguments.samples)
    ]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = Path(__file__).resolve().parents[1] / "scripts/merge_lora.py"
    command = [
        sys.executable,
        str(script),
        "--lora_path",
        str(adapter),
        "--out_dir",
        str(arguments.work_dir / "merged"),
    ]
    for flags in ((), ("--verify", str(samples), "--tolerance", "100")):
        start = time.monotonic()
        subprocess.run([*command, *flags], check=True)
        print(f"{'with --verify' if flags else 'merged'}: {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
