"""Compare the speed of the training step with a recorded one, independently of the GPU's clock and power.

Training steps of four blocks and the head of Llama-2-7B take turns with a large bf16 product. The tokens per second are
divided by the rate of that product. benchmarks/speed.json records the last ratio; tests/gpu tests it.

python benchmarks/speed.py [--record | --check]
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from shapes import SHAPES, random_model

from lit_qlora.fused import fuse
from lit_qlora.lora.layer import add_lora
from lit_qlora.settings import LoRAConfig

RECORD = Path(__file__).with_name("speed.json")
SLOWER = 0.9  # a ratio below this share of the recorded one is a failure
ROWS, LENGTH, SIZE = 2, 2048, 8192
SETTINGS = ("none", "attn")
SHAPES["llama-2-7b, 4 blocks"] = SHAPES["llama-2-7b"] | {"n_layer": 4}


def measure(rounds: int) -> dict[str, float]:
    """Tokens for each TFLOP of the large product, by setting of recompute."""
    model = random_model("llama-2-7b, 4 blocks", "bnb.nf4-dq")
    add_lora(model, LoRAConfig(r=16, alpha=32, targets="all", dropout=0.05))
    fused = fuse(model.train())
    tokens = torch.randint(0, model.config.vocab_size, (ROWS, LENGTH))
    x, y = (torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(x)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]

    def turn(steps: int, products: int) -> float:
        """Milliseconds of a step divided by those of a product."""
        events[0].record()
        for _ in range(steps):
            (model.loss(tokens, tokens) / tokens.numel()).backward()
        events[1].record()
        for _ in range(products):
            torch.mm(x, y, out=out)
        events[2].record()
        torch.cuda.synchronize()
        return (events[0].elapsed_time(events[1]) / steps) / (events[1].elapsed_time(events[2]) / products)

    ratios = {}
    for setting in SETTINGS:
        fused.set_recompute([setting] * 4)  # type: ignore[list-item]
        turn(3, 30)  # compiles and warms up
        products = statistics.median(turn(6, 150) for _ in range(rounds))
        ratios[setting] = ROWS * LENGTH / (products * 2 * SIZE**3 / 1e12)
    return ratios


def main() -> int:
    """Measure, and record or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="turns of step and product; the median counts")
    parser.add_argument("--record", action="store_true", help="write what was measured to speed.json")
    parser.add_argument("--check", action="store_true", help="end with status 1 if it is 10 %% below what was recorded")
    arguments = parser.parse_args()
    gpu, ratios = torch.cuda.get_device_name(), measure(arguments.rounds)
    recorded = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    slow = False
    for setting, ratio in ratios.items():
        known = recorded.get(gpu, {}).get(setting)
        compared = f"{ratio / known:.3f} of the recorded {known:.2f}" if known else "nothing recorded for this GPU"
        print(f"recompute {setting}: {ratio:.2f} tokens for each TFLOP of a large product, {compared}")
        slow = slow or not known or ratio < SLOWER * known
    if arguments.record:
        content = recorded | {gpu: {setting: round(ratio, 3) for setting, ratio in ratios.items()}}
        RECORD.write_text(json.dumps(content, indent=2) + "\n")
    return int(arguments.check and slow)


if __name__ == "__main__":
    sys.exit(main())
