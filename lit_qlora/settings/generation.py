"""How an answer is made."""

from dataclasses import dataclass
from typing import Annotated, Literal

from lit_qlora.settings.checks import Settings, check
from lit_qlora.settings.limits import FINITE, Count, CountOrZero, NotNegative, Positive, Seed, Share, ShareAboveZero


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(Settings):
    """How an answer is made: the likeliest token after token, tokens that are drawn, or a search with beams."""

    max_new_tokens: Count = 128
    """Most tokens of an answer."""
    min_new_tokens: CountOrZero = 0
    """Tokens that an answer has before it may end."""
    do_sample: bool | None = None
    """Draw the next token (true) or take the likeliest (false); by default tokens are drawn where temperature, top_k,
    top_p, min_p or typical_p is given."""
    temperature: NotNegative | None = None
    """1 draws from the model's own distribution, below 1 from a sharper one, 0 takes the likeliest token; by default 1
    where tokens are drawn."""
    top_k: Count | None = None
    """Draw among the k likeliest tokens only."""
    top_p: ShareAboveZero = 1.0
    """Draw among the likeliest tokens that together reach this probability only."""
    min_p: Share = 0.0
    """Draw among the tokens only that are at least this share as likely as the likeliest."""
    typical_p: ShareAboveZero = 1.0
    """Draw among the tokens only that surprise as much as is to be expected and together reach this probability."""
    repetition_penalty: Positive = 1.0
    """Above 1 makes tokens less likely that prompt or answer have already, below 1 likelier."""
    no_repeat_ngram_size: CountOrZero = 0
    """No run of so many tokens occurs twice in prompt and answer; 0 allows it."""
    num_return_sequences: Count = 1
    """Answers to each prompt."""
    num_beams: Count = 1
    """Answers that are pursued at the same time, of which the likeliest is given; 1 does not search. Where tokens are
    drawn, so are those that go on, among all that the answers could go on with."""
    length_penalty: Annotated[float, FINITE] = 1.0
    """Beams compare log-probability / tokens ** length_penalty, so above 0 favours longer answers, below 0 shorter."""
    early_stopping: bool | Literal["never"] = False
    """When a search with beams ends: true as soon as num_beams answers are finished, false when the best unfinished one
    is behind at its present length, 'never' when it could not catch up at any length."""
    num_beam_groups: Count = 1
    """Groups of beams that search one after the other, each kept apart from those before it by diversity_penalty."""
    diversity_penalty: NotNegative = 0.0
    """What a token loses in log-probability for each beam of an earlier group that has chosen it at the same place."""
    seed: Seed = 1337
    """Seed of the drawing."""

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return self.do_sample is not False and self.temperature != 0 and (self.do_sample is True or bool(self._draws()))

    def __post_init__(self) -> None:
        """Check that no setting would be without effect."""
        super().__post_init__()
        check(
            self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens must be at most max_new_tokens = {self.max_new_tokens}, got {self.min_new_tokens}.",
        )
        if self.do_sample is False and self.temperature != 0:
            check(not self._draws(), f"do_sample is false, so {self._draws()} would have no effect. Leave one out.")
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
                "num_return_sequences above 1 would give the same answer again; set do_sample true or num_beams.",
            )
        else:
            check(
                self.num_beam_groups == 1 or not self.samples,
                "Groups of beams are kept apart by a penalty and draw nothing: num_beam_groups or do_sample.",
            )
            check(
                self.num_return_sequences <= self.num_beams,
                f"num_return_sequences ({self.num_return_sequences}) must not exceed num_beams ({self.num_beams}).",
            )
        check(
            (self.num_beam_groups > 1) == (self.diversity_penalty > 0),
            "num_beam_groups above 1 and a diversity_penalty above 0 need each other: groups without it are all alike.",
        )

    def _draws(self) -> str:
        """Names of the settings that were given and concern drawing, ', ' between them."""
        given = {
            "temperature": self.temperature is not None and self.temperature > 0,
            "top_k": self.top_k is not None,
            "top_p": self.top_p < 1,
            "min_p": self.min_p > 0,
            "typical_p": self.typical_p < 1,
        }
        return ", ".join(name for name, is_given in given.items() if is_given)
