"""Answer one prompt.

python scripts/generate.py --prompt "What does the fox eat?" --lora_path out/lora/tiny-world/final
"""

import sys
import time
from dataclasses import dataclass

from lit_qlora import cli
from lit_qlora.settings import SamplingConfig
from lit_qlora.use import UseConfig, check_style, choose_style, encode_prompt, peak_memory


@dataclass(frozen=True, kw_only=True)
class Config(SamplingConfig, UseConfig):
    """Answer one prompt. The answer goes to stdout, its speed and the memory used to stderr."""

    prompt: str = "What does the fox eat?"
    """What is asked, or the text to go on with."""
    input: str = ""
    """What the prompt is about, for styles that keep the two apart."""
    style: str = "auto"
    """Prompt style: alpaca, plain or qa; 'none' gives the model the prompt as it is; 'auto' is the style that
    checkpoint or adapter were trained with, else none."""

    def __post_init__(self) -> None:
        """Check what can be checked before the model is loaded."""
        super().__post_init__()
        check_style(self.style)


def main(config: Config) -> None:
    """Load, answer, report."""
    from lit_qlora.generate import generate, room_for_answer

    loaded = config.load()
    model, tokenizer = loaded.model, loaded.tokenizer
    style = choose_style(config.style, loaded.style)
    prompt = encode_prompt(tokenizer, style, config.prompt, config.input)
    room = room_for_answer(model, len(prompt), config.max_new_tokens)

    start = time.perf_counter()
    (answer,) = generate(model, [prompt], config, tokenizer.stop_ids, tokenizer.size)
    seconds = time.perf_counter() - start

    print(tokenizer.decode(answer).removeprefix(style.gap if style else ""))
    speed = f"{len(answer) / seconds:.1f} tokens/s"
    print(f"{len(answer)} tokens in {seconds:.2f} s: {speed}, {peak_memory()}", file=sys.stderr)
    if len(answer) == room < config.max_new_tokens:
        print(
            f"The answer ends where the model's context of {model.config.block_size} tokens is full: "
            f"{len(prompt)} of prompt and {room} of answer, not {config.max_new_tokens}.",
            file=sys.stderr,
        )


if __name__ == "__main__":
    cli.run(main, Config)
