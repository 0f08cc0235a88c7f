"""Settings of learning from preferences, and the facts of each loss that decide which of them it reads."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from lit_qlora.settings.checks import Settings, check
from lit_qlora.settings.data import DataConfig
from lit_qlora.settings.eval import EvalConfig
from lit_qlora.settings.limits import NotNegative, Positive, Share, at_least, below
from lit_qlora.settings.run import FinetuneConfig
from lit_qlora.settings.train import TrainConfig

PreferenceLoss = Literal["dpo", "robust", "hinge", "ipo", "apo_zero", "orpo", "simpo", "cpo", "sft", "kto", "reward"]


@dataclass(frozen=True, kw_only=True)
class PublishedLoss:
    """A loss as its paper gives it; None where the paper has no such setting."""

    paper: str
    beta: float | None
    label_smoothing: float | None = None
    gamma: float | None = None
    sft_weight: float = 0.0
    """Weight of the mean loss of the tokens of chosen answers."""
    reference: bool = True
    """True if it compares with the model before training."""
    reads: tuple[str, ...] = ()
    """Other settings that it reads."""
    margins: bool = False
    """True if it reads how much better the chosen answer of a pair is."""
    paired: bool = True
    """False for answers that are good or bad, each by itself."""


PUBLISHED: dict[PreferenceLoss, PublishedLoss] = {
    "dpo": PublishedLoss(
        paper="Rafailov et al. 2023, arXiv 2305.18290; label smoothing: Mitchell 2023; margins: Amini et al. 2024, "
        "arXiv 2402.10571; lengths: Meng et al. 2024, section 4.3, arXiv 2405.14734",
        beta=0.1,
        label_smoothing=0.0,
        reads=("length_normalized", "ld_alpha"),
        margins=True,
    ),
    "robust": PublishedLoss(
        paper="Chowdhury et al. 2024, arXiv 2403.00409",
        beta=0.1,
        label_smoothing=0.1,
        reads=("ld_alpha",),
        margins=True,
    ),
    "hinge": PublishedLoss(paper="Liu et al. 2023, arXiv 2309.06657", beta=0.1, reads=("ld_alpha",), margins=True),
    "ipo": PublishedLoss(paper="Azar et al. 2023, arXiv 2310.12036", beta=0.1, reads=("ld_alpha",)),
    "apo_zero": PublishedLoss(paper="D'Oosterlinck et al. 2024, arXiv 2408.06266", beta=0.1, reads=("ld_alpha",)),
    "orpo": PublishedLoss(paper="Hong et al. 2024, arXiv 2403.07691", beta=0.1, sft_weight=1.0, reference=False),
    "simpo": PublishedLoss(
        paper="Meng et al. 2024, arXiv 2405.14734", beta=2.0, gamma=0.5, reference=False, margins=True
    ),
    "cpo": PublishedLoss(
        paper="Xu et al. 2024, arXiv 2401.08417", beta=0.1, sft_weight=1.0, reference=False, margins=True
    ),
    "sft": PublishedLoss(paper="cross-entropy of the chosen answers alone", beta=None, sft_weight=1.0, reference=False),
    "kto": PublishedLoss(
        paper="Ethayarajh et al. 2024, arXiv 2402.01306",
        beta=0.1,
        reads=("desirable_weight", "undesirable_weight"),
        paired=False,
    ),
    "reward": PublishedLoss(
        paper="Bradley & Terry 1952; of reward models: Ouyang et al. 2022, arXiv 2203.02155",
        beta=None,
        reference=False,
        margins=True,
    ),
}
"""In the order of --help."""


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig(Settings):
    """The loss that makes preferred answers likelier than others."""

    prefix = "preference."

    loss: PreferenceLoss = "dpo"
    """Loss of a pair of answers. dpo, robust (for noisy labels), hinge, ipo and apo_zero compare with the model before
    training, its reference. orpo, simpo and cpo have none. sft learns the chosen answers alone. kto learns from single
    answers that are good or bad. reward trains a head that gives each answer a number, by the order of pairs alone."""
    beta: Positive | None = None
    """Strength of the comparison; for ipo, half its inverse is the wanted difference; for orpo, the weight of the odds
    ratio. By default as published: 0.1, for simpo 2."""
    label_smoothing: Annotated[float, at_least(0), below(0.5)] | None = None
    """Losses dpo and robust: expected share of pairs whose answers are swapped. By default 0, for robust 0.1."""
    length_normalized: bool = False
    """Loss dpo: compare log-probabilities by token instead of by answer; beta is then about 2."""
    ld_alpha: Share = 1.0
    """Losses with a reference and pairs: weight of the tokens of an answer beyond the length of the shorter one of its
    pair (LD-DPO, Liu et al. 2024). 1 weighs all alike."""
    gamma: NotNegative | None = None
    """Loss simpo: the wanted difference of rewards. By default 0.5."""
    sft_weight: NotNegative | None = None
    """Weight of the mean loss of the tokens of chosen answers, which is added; for dpo that is RPO. By default as
    published: 1 for orpo, cpo and sft, else 0."""
    sft_prompts: bool = False
    """Count in that mean the tokens of the prompts too, as the authors of ORPO do."""
    desirable_weight: NotNegative = 1.0
    """Loss kto: weight of good answers. With many more bad ones raise it, so that both sums are alike."""
    undesirable_weight: NotNegative = 1.0
    """Loss kto: weight of bad answers."""
    share_prompts: bool = True
    """Read a prompt once for all its answers. It changes memory and speed, not the result. Where a model cannot, or
    with train.hidden_dropout, each answer has a prompt of its own."""

    @property
    def published(self) -> PublishedLoss:
        """The facts of the loss."""
        return PUBLISHED[self.loss]

    def or_published(self, name: Literal["beta", "label_smoothing", "gamma", "sft_weight"]) -> float:
        """Return a setting, or the published value where it is None; 0 where there is none."""
        own = getattr(self, name)
        return float((getattr(self.published, name) or 0.0) if own is None else own)

    def __post_init__(self) -> None:
        """Check that no setting would be without effect."""
        super().__post_init__()
        published, defaults = self.published, PreferenceConfig.__dataclass_fields__
        for name in ("beta", "label_smoothing", "gamma"):
            check(
                getattr(self, name) is None or getattr(published, name) is not None,
                f"preference.{name} has no effect on the loss {self.loss}. Leave it out.",
            )
        for name in ("length_normalized", "ld_alpha", "desirable_weight", "undesirable_weight"):
            check(
                getattr(self, name) == defaults[name].default or name in published.reads,
                f"preference.{name} has no effect on the loss {self.loss}. Leave it out.",
            )
        check(
            published.paired or not self.sft_weight,
            f"preference.sft_weight is of chosen answers, and the loss {self.loss} has no pairs. Leave it out.",
        )
        check(
            self.loss != "reward" or not self.sft_weight,
            "preference.sft_weight is of what a model writes, and the loss reward trains none. Leave it out.",
        )
        check(
            not self.sft_prompts or self.or_published("sft_weight") > 0,
            f"preference.sft_prompts has no effect on the loss {self.loss} without preference.sft_weight.",
        )
        check(
            self.loss != "sft" or self.sft_weight != 0,
            "preference.sft_weight 0 leaves nothing of the loss sft to learn. Leave it out.",
        )


NO_OWN_LOSS = (
    "By the loss kto an answer has none of its own: it depends on how far the model has moved on all other answers. "
    "Leave it out, or take a loss of pairs, such as dpo."
)


@dataclass(frozen=True, kw_only=True)
class PreferenceTrainConfig(TrainConfig):
    """Length, learning rate and execution of training on preferences."""

    epochs: Positive = 1.0
    """Passes over the training data."""
    learning_rate: Positive = 5e-6
    """Peak learning rate. By default that of zephyr-7b-dpo-qlora; a small adapter may take ten times as much."""


@dataclass(frozen=True, kw_only=True)
class PreferenceEvalConfig(EvalConfig):
    """The validations before and during training on preferences, and their metrics."""

    kl_text: Path | None = Path("default")
    """Text file on which to measure the distance between model and base, as kl_to_base; 'default' is a text that comes
    with the package."""


@dataclass(frozen=True, kw_only=True)
class PreferenceRunConfig(FinetuneConfig):
    """Learn from preferences with LoRA: which answer to a prompt is the better one, or if an answer is good."""

    out_dir: Path | None = None
    """Run folder. By default out/preference/<checkpoint name>."""
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    train: PreferenceTrainConfig = field(default_factory=PreferenceTrainConfig)
    eval: PreferenceEvalConfig = field(default_factory=PreferenceEvalConfig)

    def __post_init__(self) -> None:
        """Check that no setting would be without effect."""
        check(self.head == "none", "head is for finetune/lora.py; --preference.loss reward trains one on pairs.")
        super().__post_init__()
        data, train = self.data, self.train
        check(
            self.eval.train_samples == 0 or self.preference.published.paired,
            f"eval.train_samples keeps the loss of single samples. {NO_OWN_LOSS}",
        )
        check(self.distill.teacher is None, "distill.teacher is for finetune/lora.py. Leave it out.")
        for name in ("columns", "template", "answer_template", "only_last_answer", "token_dropout"):
            default = DataConfig.__dataclass_fields__[name].default
            check(getattr(data, name) == default, f"data.{name} is for finetune/lora.py. Leave it out.")
        check(data.mask_prompt, "data.mask_prompt false is for finetune/lora.py; see preference.sft_prompts.")
        check(data.weighting == "tokens", "data.weighting has no effect on comparisons, which weigh alike.")
        check(data.length_quantile == 1, "data.length_quantile would cut one answer and not the other. Leave it out.")
        check(
            not (train.router_balance_loss or train.router_z_loss),
            "train.router_balance_loss and train.router_z_loss are for finetune/lora.py. Leave them out.",
        )
        check(
            self.strategy != "sharded",
            "strategy sharded is for finetune/lora.py: a comparison takes passes that others lack. Leave it out.",
        )
        check(
            self.sequence_parallel == 1,
            "sequence_parallel is for finetune/lora.py: a comparison needs its answers in one process. Leave it out.",
        )
        if self.preference.loss == "reward":
            concerns = "concerns what a model writes, and the loss reward trains a head. Leave it out."
            for name in ("generate", "prompts", "tasks"):
                check(not getattr(self.eval, name), f"eval.{name} {concerns}")
            learns = "head" in self.lora.targets or self.lora.train_embeddings or bool(self.lora.train_tokens)
            check(not learns, f"lora.targets head, lora.train_tokens and lora.train_embeddings: each {concerns}")
        check(not train.neftune, "train.neftune would add noise to what is compared. Leave it out.")
