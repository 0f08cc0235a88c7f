"""Settings of training: length, learning rate, execution."""

from dataclasses import dataclass
from typing import Annotated, Literal

from lit_qlora.settings.checks import Settings, check
from lit_qlora.settings.limits import Count, CountOrZero, NotNegative, Positive, Share, ShareBelowOne, at_least

Recompute = Literal["none", "mlp", "attn", "offload", "full", "full-offload"]
Schedule = Literal["constant", "linear", "cosine", "cosine-restarts", "polynomial", "inverse-sqrt", "wsd"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Length, learning rate and execution of training."""

    prefix = "train."
    first = ("epochs", "learning_rate", "batch_size", "micro_batch_size")

    epochs: Positive = 3.0
    """Passes over the training data."""
    max_steps: CountOrZero | None = None
    """Take N optimizer steps, however many epochs that is; the schedule ends there too. 0 saves the initial adapter and
    ends. By default epochs decides."""
    batch_size: Count = 32
    """Samples per optimizer step, over all devices."""
    micro_batch_size: Count = 4
    """Maximum samples per forward pass on one device. Changes memory and speed, not the result."""
    learning_rate: Positive = 3e-4
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """Course of the learning rate after the warm-up; docs/schedules.png shows each. wsd is warm-up, stable, decay."""
    warmup: NotNegative = 0.03
    """Linear warm-up: a share of the steps if below 1, else a number of steps."""
    warmup_epochs: NotNegative | None = None
    """Length of the warm-up in epochs, instead of warmup."""
    warmup_from_zero: bool = False
    """Warm up as transformers and TRL do: step s of W has s / W of the peak, from 0 on, and a share of the steps is
    rounded up. By default step s has (s + 1) / W, and a share is rounded to the nearest."""
    floor: Share = 0.0
    """Final learning rate of the schedule, as a share of the peak."""
    cycles: Count | None = None
    """Schedule cosine-restarts: number of times the rate falls. By default 3."""
    power: Positive | None = None
    """Schedule polynomial: the rate is this power of the remaining share of the run. By default 2."""
    decay: Positive | None = None
    """Schedule wsd: length of the final decay, a share of the steps if below 1, else a number of steps. By default
    0.1."""
    weight_decay: NotNegative = 0.01
    """Weight decay of matrices; vectors get none. adamw, lion and adafactor decouple it from the gradient; adam, sgd,
    rmsprop and adadelta add it to the gradient."""
    neftune: NotNegative = 0.0
    """Add uniform noise of magnitude N / sqrt(tokens x width) to the embeddings in training, e.g. 5; 0 adds none
    (NEFTune, Jain et al. 2023)."""
    hidden_dropout: ShareBelowOne = 0.0
    """Probability of zeroing, in training, an element of the embeddings, of the weights of attention, or of what
    attention and MLP of each block add. The adapters' own dropout is lora.dropout. Models with heads of more than 256
    features (Gemma 4) take the plain path with it."""
    router_balance_loss: NotNegative = 0.0
    """Add N times the load-balancing loss of a mixture's routers, e.g. 0.01, in training (Fedus et al. 2021, with the
    experts of all blocks counted together, as transformers does). It is exact over a step, so a step of several
    micro-batches costs one more forward pass. The log has it as router_balance."""
    router_z_loss: NotNegative = 0.0
    """Add N times the z-loss of a mixture's routers, e.g. 0.001, in training, which keeps their scores small (Zoph et
    al. 2022). The log has it as router_z."""
    max_norm: Annotated[float, at_least(0)] = 1.0
    """Clip gradients to this global norm; 0 does not clip."""
    save_every: CountOrZero = 0
    """Optimizer steps between run checkpoints; 0 leaves it to train.save_minutes."""
    save_minutes: NotNegative = 10.0
    """Minutes between run checkpoints; 0 leaves it to train.save_every."""
    keep_last: Count = 2
    """Number of run checkpoints that are kept. The best and the final one are kept besides."""
    recompute: Literal["auto"] | Recompute = "auto"
    """The part of a block that is recomputed in the backward pass instead of saved. In order of memory, most first:
    none, mlp, attn, offload, full, full-offload. 'offload' is attn with the remaining activations in host memory, and
    queries, keys and values of as many blocks as there is time for. 'full-offload' is full with the input of each block
    in host memory, for the longest rows. 'auto' is the fastest mix that fits. On the plain path all but none act as
    full."""
    fast: bool = True
    """Use the fast path where GPU, precision and model allow it; else the run says why not. It computes the same."""
    fp8: bool = False
    """Multiply with the frozen weights of the blocks in FP8. This is faster and rounds more coarsely, in validation
    too. Adapters and head stay in 16 bit. It needs the fast path and a GPU with FP8 (Ada, Hopper or newer)."""
    keep_dequantized: CountOrZero | Literal["auto"] = "auto"
    """Number of blocks whose quantised weights are also cached in 16 bit, in spare GPU memory (0.4 GB a block for a
    7B). This saves two dequantisations per micro-batch, up to half of a short one's time. 'auto': as many as fit. In
    the other blocks dequantised weights are carried over to the next forward pass where there is room; 0 turns off
    both. Results are bit-identical, and the memory is released when it runs out."""
    cuda_graphs: Literal["auto", "never"] = "auto"
    """'auto' launches small micro-batches as CUDA graphs if their lengths are common and memory is left: up to 1,280
    tokens of a 7B, 4,096 of a 1B or of Qwen3.5-4B. A sample of 135 tokens then takes a third of the time. Rows are
    padded to one of a few lengths. 'never' launches kernel by kernel."""

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
        check(
            self.warmup_epochs is None or self.warmup == TrainConfig.warmup,
            "train.warmup and train.warmup_epochs both set the length of the warm-up. Leave one out.",
        )
        check(self.schedule != "constant" or not self.floor, "train.floor has no effect on a constant rate.")
