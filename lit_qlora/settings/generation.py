"""Settings of generation."""

import secrets
from dataclasses import dataclass
from typing import Annotated, Literal

from lit_qlora.settings.checks import Settings, check
from lit_qlora.settings.limits import (
    FINITE,
    Count,
    CountOrZero,
    NotNegative,
    Positive,
    SeedOrAny,
    Share,
    ShareAboveZero,
)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(Settings):
    """The choice of an answer's tokens: the likeliest, sampling, or beam search."""

    first = ("max_new_tokens", "do_sample", "temperature", "top_p", "num_beams")

    max_new_tokens: Count = 128
    """Maximum tokens of an answer."""
    min_new_tokens: CountOrZero = 0
    """Minimum tokens of an answer before it may end."""
    do_sample: bool | None = None
    """Sample the next token (true) or take the likeliest (false). By default tokens are sampled if temperature, top_k,
    top_p, min_p or typical_p is given."""
    temperature: NotNegative | None = None
    """1 samples from the model's own distribution, below 1 from a sharper one; 0 takes the likeliest token. By default
    1 if tokens are sampled."""
    top_k: Count | None = None
    """Sample among the k likeliest tokens only. By default among all."""
    top_p: ShareAboveZero = 1.0
    """Sample among the likeliest tokens whose probabilities add up to top_p."""
    min_p: Share = 0.0
    """Sample only among tokens with at least this share of the likeliest token's probability."""
    typical_p: ShareAboveZero = 1.0
    """Sample among the tokens whose surprise is closest to the expected one, until their probabilities add up to
    typical_p."""
    repetition_penalty: Positive = 1.0
    """Above 1, tokens that prompt or answer already hold become less likely; below 1, likelier."""
    no_repeat_ngram_size: CountOrZero = 0
    """Allow no sequence of N tokens twice in prompt and answer; 0 allows all."""
    num_return_sequences: Count = 1
    """Answers to each prompt."""
    num_beams: Count = 1
    """Beams of the search, whose likeliest answer is returned; 1 does not search. With sampling, the beams are sampled
    from all their continuations."""
    length_penalty: Annotated[float, FINITE] = 1.0
    """Beams compare log-probability / tokens ** length_penalty: above 0 favours longer answers, below 0 shorter
    ones."""
    early_stopping: bool | Literal["never"] = False
    """End of a beam search. true: as soon as num_beams answers are finished. false: when the best unfinished beam is
    behind at its present length. 'never': when it could not catch up at any length."""
    num_beam_groups: Count = 1
    """Groups of beams that search in turn; diversity_penalty keeps each apart from the earlier ones."""
    diversity_penalty: NotNegative = 0.0
    """Subtracted from the log-probability of a token for each beam of an earlier group that chose it at the same
    position."""
    seed: SeedOrAny = 1337
    """Seed of sampling; -1 takes another one each time."""

    @property
    def samples(self) -> bool:
        """True if tokens are sampled."""
        return self.do_sample is not False and self.temperature != 0 and (self.do_sample is True or bool(self._draws()))

    def notes(self) -> list[str]:
        """Return what a user may want to know of these settings: without sampling, some have no effect."""
        idle = self._draws() if self.do_sample is False else ""
        return [*super().notes(), *([f"do_sample is false, so {idle} has no effect."] if idle else [])]

    def __post_init__(self) -> None:
        """Check that no setting would be without effect."""
        super().__post_init__()
        check(
            self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens must be at most max_new_tokens = {self.max_new_tokens}, got {self.min_new_tokens}.",
        )
        if self.seed == -1:
            object.__setattr__(self, "seed", secrets.randbits(32))
        check(
            not (self.do_sample and self.temperature == 0),
            "temperature 0 takes the likeliest token, so do_sample cannot be true. Leave one out.",
        )
        self._check_beams()

    def _check_beams(self) -> None:
        check(
            self.num_beams % self.num_beam_groups == 0,
            f"num_beam_groups ({self.num_beam_groups}) must divide num_beams ({self.num_beams}).",
        )
        if self.num_beams == 1:
            check(
                (self.length_penalty, self.early_stopping) == (1.0, False),
                "length_penalty and early_stopping need num_beams above 1.",
            )
            check(
                self.num_return_sequences == 1 or self.samples,
                "num_return_sequences above 1 would repeat the same answer. Set do_sample true, or num_beams.",
            )
        else:
            check(
                self.num_beam_groups == 1 or not self.samples,
                "Groups of beams do not sample. Leave out num_beam_groups or do_sample.",
            )
            check(
                self.num_return_sequences <= self.num_beams,
                f"num_return_sequences ({self.num_return_sequences}) must not exceed num_beams ({self.num_beams}).",
            )
        check(
            (self.num_beam_groups > 1) == (self.diversity_penalty > 0),
            "num_beam_groups above 1 and a diversity_penalty above 0 need each other: without it all groups are alike.",
        )

    def _draws(self) -> str:
        """Return the names of given settings that concern sampling, with ', ' between them."""
        given = {
            "temperature": self.temperature is not None and self.temperature > 0,
            "top_k": self.top_k is not None,
            "top_p": self.top_p < 1,
            "min_p": self.min_p > 0,
            "typical_p": self.typical_p < 1,
        }
        return ", ".join(name for name, is_given in given.items() if is_given)
