"""Prompt styles: how an instruction becomes the text that the model reads. A style is a row in STYLES.

The style that an adapter was trained with travels with it, and with the merged checkpoint, in prompt_style.json;
generation, chat and evaluation read it from there.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lit_qlora.errors import CheckpointError, UsageError, did_you_mean

FILE_NAME = "prompt_style.json"


class _Encodes(Protocol):
    def encode(self, text: str, bos: bool | None = None, eos: bool = False, continuation: bool = False) -> list[int]:
        """As lit_qlora.tokenizer.Tokenizer.encode."""
        ...


@dataclass(frozen=True)
class Style:
    """A prompt style; training, generation, chat and evaluation all encode through it, so their ids are the same."""

    render: Callable[[str, str], str]
    """(instruction, input) -> the prompt."""
    gap: str = ""
    """Text between prompt and answer that the answer begins with, such as a space."""

    def encode_prompt(self, tokenizer: _Encodes, instruction: str, input: str = "") -> list[int]:
        """Ids of the prompt, with BOS where the model uses it; what the model answers to."""
        return tokenizer.encode(self.render(instruction, input))

    def encode_answer(self, tokenizer: _Encodes, answer: str) -> list[int]:
        """Ids of the answer with its end-of-text token; what the model learns to say."""
        return tokenizer.encode(self.gap + answer, continuation=True, eos=True)


def alpaca(instruction: str, input: str = "") -> str:
    """The prompt of Stanford Alpaca. Taori et al. 2023."""
    if input:
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        )
    return (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:\n"
    )


def plain(instruction: str, input: str = "") -> str:
    """The instruction and the input as they are, a line each."""
    return f"{instruction}\n{input}\n" if input else f"{instruction}\n"


def qa(instruction: str, input: str = "") -> str:
    """Question and answer, as in most few-shot evaluations."""
    return f"Q: {instruction}\n{input}\nA:" if input else f"Q: {instruction}\nA:"


STYLES: dict[str, Style] = {
    "alpaca": Style(alpaca),
    "plain": Style(plain),
    "qa": Style(qa, gap=" "),
}


def find_style(name: str) -> Style:
    """The style of this name. Raises UsageError with the nearest name for one that does not exist."""
    if name not in STYLES:
        hint = did_you_mean(name, list(STYLES))
        raise UsageError(f"data.prompt {name!r} is not a prompt style.{hint} Known: {', '.join(STYLES)}.")
    return STYLES[name]


def read_style(directory: Path) -> str | None:
    """The name of the style that the checkpoint or adapter in `directory` was made with, if it says so."""
    path = directory / FILE_NAME
    if not path.is_file():
        return None
    try:
        name = str(json.loads(path.read_text())["style"])
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f'{path} is not of the form {{"style": "alpaca"}}.') from None
    if name not in STYLES:
        raise CheckpointError(f"{path}: {name!r} is not a prompt style. Known: {', '.join(STYLES)}.")
    return name


def style_json(name: str) -> str:
    """What prompt_style.json holds."""
    return json.dumps({"style": name}) + "\n"
