"""Fine-tune a checkpoint with LoRA; with --quantize bnb.nf4 this is QLoRA.

python finetune/lora.py --checkpoint_dir checkpoints/meta-llama/Llama-2-7b-hf --quantize bnb.nf4 --data.path alpaca.json
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from lit_qlora import cli
from lit_qlora.run.finetune import finetune
from lit_qlora.settings import EvalConfig, FinetuneConfig

if TYPE_CHECKING:
    from lit_qlora.model.gpt import GPT
    from lit_qlora.prompts.tokenizer import Tokenizer


def main(config: FinetuneConfig) -> None:
    """Train the adapter that `config` describes and leave it in OUT/final."""
    finetune(config, make_ask)


def make_ask(config: EvalConfig, tokenizer: "Tokenizer", allow_code: bool) -> "Callable[[GPT], dict[str, float]]":
    """See ask_tasks, which imports lm-eval."""
    import ask_tasks

    return ask_tasks.make_ask(config, tokenizer, allow_code)


if __name__ == "__main__":
    cli.run(main, FinetuneConfig)
