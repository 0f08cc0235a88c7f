"""Talk to a model.

python scripts/chat.py --lora_path out/lora/tiny-world/final
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_qlora import cli
from lit_qlora.errors import UsageError
from lit_qlora.settings import SamplingConfig
from lit_qlora.use import UseConfig, check_style, choose_style, encode_prompt

if TYPE_CHECKING:
    from lit_qlora.adapter import Loaded
    from lit_qlora.prompts import Style

HELP = "/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer."


@dataclass(frozen=True, kw_only=True)
class Config(SamplingConfig, UseConfig):
    """Talk to a model; it remembers the conversation as far as its context reaches."""

    style: str = "auto"
    """Prompt style: alpaca, plain or qa; 'none' gives the model what is typed as it is; 'auto' is the style that
    checkpoint or adapter were trained with, else none."""

    def __post_init__(self) -> None:
        """Check what can be checked before the model is loaded."""
        super().__post_init__()
        check_style(self.style)


def main(config: Config) -> None:
    """Load the model, then answer line after line."""
    loaded = config.load()
    conversation = Conversation(loaded, choose_style(config.style, loaded.style), config)
    terminal = sys.stdin.isatty()
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # a stray byte from a pipe is no reason to end the conversation
    note(HELP)
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            note(f"\n{HELP}")
            continue
        if line == "/quit":
            break
        if line == "/reset":
            conversation.turns.clear()
            note("The conversation is forgotten.")
        elif line.startswith("/") and " " not in line:
            note(f"{line} is not a command. {HELP}")
        elif line:
            try:
                conversation.answer(line)
            except UsageError as error:
                note(str(error))
            except KeyboardInterrupt:  # came just before or after the answer
                note("")


class Conversation:
    """What was said, and how it goes on.

    Each turn is the ids of one training sample, prompt, answer and end-of-text token, because a style has no words
    for a second turn; the next prompt follows behind them.

    Attributes:
        turns: ids of each turn that is still remembered, oldest first.
    """

    def __init__(self, loaded: "Loaded", style: "Style | None", sampling: SamplingConfig) -> None:
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.style, self.sampling = style, sampling
        self.turns: list[list[int]] = []

    def answer(self, line: str) -> None:
        """Write the answer to `line` to stdout as it comes, and remember both. Ctrl-C ends the answer early.

        Raises:
            UsageError: if `line` alone does not fit into the model's context.
        """
        from lit_qlora.generate import room_for_answer, stream, stream_text

        prompt = encode_prompt(self.tokenizer, self.style, line)
        room_for_answer(self.model, len(prompt), wanted=1)  # before anything is forgotten for its sake
        context = self.recall(len(prompt)) + prompt
        said: list[int] = []

        def remembered():
            for token in stream(self.model, context, self.sampling, self.tokenizer.stop_ids, self.tokenizer.size):
                said.append(token)
                yield token

        try:
            for piece in stream_text(self.tokenizer, remembered(), self.style.gap if self.style else ""):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass
        print(flush=True)
        self.turns.append([*prompt, *said, self.tokenizer.eos_id])
        if len(context) + len(said) == self.model.config.block_size:
            note(f"The answer ends where the model's context of {self.model.config.block_size} tokens is full.")

    def recall(self, prompt_length: int) -> list[int]:
        """Ids of all remembered turns, after forgetting the oldest until prompt and answer fit behind the rest."""
        block_size = self.model.config.block_size
        # At most half of the context is kept free, or a large max_new_tokens would leave no memory at all.
        needed = prompt_length + min(self.sampling.max_new_tokens, block_size // 2)
        forgotten = 0
        while self.turns and sum(map(len, self.turns)) + needed > block_size:
            self.turns.pop(0)
            forgotten += 1
        if forgotten:
            turns = "oldest turn is" if forgotten == 1 else f"{forgotten} oldest turns are"
            note(f"The {turns} forgotten: the model's context holds {block_size} tokens.")
        return [token for turn in self.turns for token in turn]


def note(text: str) -> None:
    """Tell the person something that the model did not say."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main, Config)
