"""Fine-tune with many settings on a base that is read and quantised once, and compare them.

python finetune/sweep.py --config finetune/configs/sweeps/demo.yaml
python finetune/sweep.py --quantize bnb.nf4 --sweep.grid '{lora.r: [2, 8], train.learning_rate: [1e-3, 1e-2]}'
"""

from lora import make_ask

from lit_qlora import cli
from lit_qlora.settings import SweepConfig


def main(config: SweepConfig) -> None:
    """Run the trials, and leave OUT/trial-001 and so on, with sweep.html, sweep.md and sweep.json."""
    from lit_qlora.sweep.conduct import sweep

    sweep(config, make_ask)


if __name__ == "__main__":
    cli.run(main, SweepConfig)
