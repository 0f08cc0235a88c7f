"""Learn from preferences with LoRA: DPO, IPO, ORPO, SimPO, CPO, KTO and others.

python finetune/preference.py --checkpoint_dir checkpoints/meta-llama/Llama-2-7b-hf --quantize bnb.nf4-dq
    --data.path pairs.jsonl --preference.loss dpo --preference.beta 0.1
"""

from lora import make_ask

from lit_qlora import cli
from lit_qlora.run.finetune import finetune
from lit_qlora.settings import PreferenceRunConfig


def main(config: PreferenceRunConfig) -> None:
    """Train the adapter that `config` describes and leave it in OUT/final."""
    finetune(config, make_ask)


if __name__ == "__main__":
    cli.run(main, PreferenceRunConfig)
