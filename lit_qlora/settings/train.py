"""How long a model learns, how fast, and how the work of a step is done."""

from dataclasses import dataclass
from typing import Annotated, Literal

from lit_qlora.settings.checks import Settings, check
from lit_qlora.settings.limits import Count, CountOrZero, NotNegative, Positive, Share, at_least

Recompute = Literal["none", "mlp", "attn", "offload", "full"]
Schedule = Literal["constant", "linear", "cosine", "cosine-restarts", "polynomial", "inverse-sqrt", "wsd"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """How it learns."""

    prefix = "train."

    epochs: Positive = 3.0
    """Passes over the training data."""
    max_steps: Count | None = None
    """Stop after this many optimizer steps; the schedule ends there too."""
    batch_size: Count = 32
    """Samples per optimizer step, over all devices."""
    micro_batch_size: Count = 4
    """Most samples per forward pass on one device; changes memory and speed, not the result."""
    learning_rate: Positive = 3e-4
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """What the learning rate does after the warm-up; docs/schedules.png shows them. wsd is warm-up-stable-decay."""
    warmup: NotNegative = 0.03
    """Linear warm-up: a share of the steps if below 1, else a number of steps."""
    floor: Share = 0.0
    """Share of the peak that the schedule falls to, instead of zero."""
    cycles: Count | None = None
    """Schedule cosine-restarts: how often the rate falls; by default 3."""
    power: Positive | None = None
    """Schedule polynomial: the rate falls as this power of what is left of the run; by default 2."""
    decay: Positive | None = None
    """Schedule wsd: when the rate falls, a share of the steps if below 1, else a number of steps; by default 0.1."""
    weight_decay: NotNegative = 0.01
    """Weight decay of matrices; vectors have none. adamw, lion and adafactor keep it apart from the gradient; adam,
    sgd, rmsprop and adadelta add it."""
    neftune: NotNegative = 0.0
    """Uniform noise on the embeddings while training, of so much / sqrt(tokens x width), e.g. 5 (NEFTune, Jain et al.
    2023)."""
    max_norm: Annotated[float, at_least(0)] = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them alone."""
    save_every: CountOrZero = 0
    """Optimizer steps between checkpoints; 0 leaves it to train.save_minutes."""
    save_minutes: NotNegative = 10.0
    """Minutes between checkpoints; 0 leaves it to train.save_every."""
    keep_last: Count = 2
    """Checkpoints that stay when newer ones are saved; the best and the final one stay anyway."""
    recompute: Literal["auto"] | Recompute = "auto"
    """What each block computes again in the backward pass instead of keeping it, from most to least memory: none, mlp,
    attn, full; 'offload' is attn with the rest in host memory, where every other block has its queries, keys and values
    as well. 'auto' is the fastest mix that fits. Without the fast path, mlp, attn and offload are full."""
    fast: bool = True
    """Take the fast path where GPU, precision and model allow it; it computes the same."""
    fp8: bool = False
    """Multiply with the frozen weights of the blocks in FP8, which is faster and rounds what is learnt more coarsely,
    as validation does; adapters and the head stay in 16 bit. Needs the fast path and a GPU that has FP8 (from Ada and
    Hopper on)."""
    keep_dequantized: CountOrZero | Literal["auto"] = "auto"
    """Blocks of a quantised base whose weights the fast path keeps dequantised as well, in memory that would be left
    over (0.4 GB for each of a 7B), instead of dequantising them twice a micro-batch, which is half the time of a short
    one; 'auto' is as many as fit. Of the other blocks, weights that a backward pass dequantises stay for the next
    forward pass where activations were, unless this is 0. The numbers are the same bits, and the memory is given back
    where it runs out."""
    cuda_graphs: Literal["auto", "never"] = "auto"
    """'auto' launches small micro-batches (up to 1,280 tokens of a 7B, 4,096 of a 1B) as CUDA graphs where they are
    usual and there is memory left, which is three times as fast for a sample of 135 tokens; rows are padded to one of a
    few lengths. 'never' launches kernel by kernel."""

    def __post_init__(self) -> None:
        """Check that no setting would be without effect."""
        super().__post_init__()
        check(
            self.keep_dequantized in (0, "auto") or not self.fp8,
            "train.keep_dequantized has no effect with --train.fp8. Leave one out.",
        )
        for name, schedule in (("cycles", "cosine-restarts"), ("power", "polynomial"), ("decay", "wsd")):
            check(
                getattr(self, name) is None or self.schedule == schedule,
                f"train.{name} has no effect with --train.schedule {self.schedule}; it belongs to {schedule}.",
            )
        check(self.schedule != "constant" or not self.floor, "train.floor has no effect on a constant rate.")
