"""From examples to token ids, with what is trained marked by position."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lit_qlora.data.sources import Example
from lit_qlora.errors import DataError
from lit_qlora.prompts import Style
from lit_qlora.tokenizer import Tokenizer


class Sample(NamedTuple):
    """Prompt and answer as one row of token ids."""

    tokens: list[int]
    prompt_length: int
    """How many of the first tokens are given, not learnt; at least 1, since nothing predicts the first token."""

    @property
    def labelled(self) -> int:
        """Number of tokens that are learnt."""
        return len(self.tokens) - self.prompt_length


@dataclass
class DataReport:
    """What became of the examples of a file."""

    lengths: list[int] = field(default_factory=list)
    """Tokens of each sample before anything was cut."""
    cut_prompts: int = 0
    cut_answers: int = 0

    def describe(self) -> str:
        """One line for the start of a run."""
        lengths = sorted(self.lengths)
        cuts = [f"{self.cut_prompts} prompts cut" if self.cut_prompts else ""]
        if self.cut_answers:
            cuts.append(f"{self.cut_answers} answers cut ({100 * self.cut_answers / len(lengths):.2g} %)")
        return ", ".join(
            [
                f"median {lengths[len(lengths) // 2]} tokens",
                f"p99 {lengths[int(0.99 * (len(lengths) - 1))]}",
                f"longest {lengths[-1]}",
                *(text for text in cuts if text),
            ]
        )


def encode_examples(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    style: Style,
    max_length: int,
    mask_prompt: bool = True,
    allow_cut_answers: bool = False,
) -> tuple[list[Sample], DataReport]:
    """Encode each example and cut it to `max_length` tokens.

    The beginning of the prompt goes first (its BOS stays), then the end of the answer; the end-of-text token and at
    least one token of the answer survive every cut, or the model would never learn to stop.

    Raises:
        DataError: if most answers are cut, which would teach half-sentences, unless `allow_cut_answers`.
    """
    samples: list[Sample] = []
    report = DataReport()
    for example in examples:
        prompt = style.encode_prompt(tokenizer, example.instruction, example.input)
        answer = style.encode_answer(tokenizer, example.output)
        report.lengths.append(len(prompt) + len(answer))
        if len(prompt) + len(answer) > max_length:
            keep = max(max_length - len(answer), 1 + int(tokenizer.use_bos))
            if keep < len(prompt):
                report.cut_prompts += 1
                bos = prompt[: int(tokenizer.use_bos)]
                prompt = bos + prompt[len(prompt) - keep + len(bos) :]
            if len(prompt) + len(answer) > max_length:
                report.cut_answers += 1
                answer = [*answer[: max_length - len(prompt) - 1], answer[-1]]
        samples.append(Sample(prompt + answer, max(1, len(prompt)) if mask_prompt else 1))
    if report.cut_answers > len(samples) / 2 and not allow_cut_answers:
        raise DataError(
            f"{report.cut_answers} of {len(samples)} answers do not fit into {max_length} tokens, "
            "counting their prompts.\nRaise data.max_length, or go on with --data.allow_cut_answers."
        )
    return samples, report
