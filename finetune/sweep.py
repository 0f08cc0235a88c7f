"""Fine-tune with many settings on a base that is read and quantised once, and compare them.

python finetune/sweep.py --config finetune/configs/sweeps/demo.yaml
python finetune/sweep.py --quantize bnb.nf4 --sweep.grid '{lora.r: [2, 8], train.learning_rate: [1e-3, 1e-2]}'
python finetune/sweep.py --data.path pairs.jsonl --sweep.grid '{preference.loss: [dpo, ipo]}' --quantize bnb.nf4
"""

import sys

from lora import make_ask

from lit_qlora import cli
from lit_qlora.settings import PreferenceSweepConfig, SweepConfig, is_of_preferences


def main(config: SweepConfig) -> None:
    """Run the trials, and leave OUT/trial-001 and so on, with sweep.html, sweep.md and sweep.json."""
    from lit_qlora.sweep.conduct import sweep

    sweep(config, make_ask)


def prefer(config: PreferenceSweepConfig) -> None:
    """Run the trials of a sweep over preferences, as main."""
    from lit_qlora.sweep.conduct import sweep

    sweep(config, make_ask)


if __name__ == "__main__":
    if is_of_preferences(sys.argv[1:]):
        cli.run(prefer, PreferenceSweepConfig)
    else:
        cli.run(main, SweepConfig)
