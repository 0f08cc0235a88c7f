"""Say which models a GPU can fine-tune, or which GPU a model needs: no weights, no GPU, no network.

python scripts/fits.py                              # well-known models on GPUs of 8 to 80 GB
python scripts/fits.py --gpu "RTX 4090"             # all of them on this GPU; --gpu 24 is any of 24 GB
python scripts/fits.py --model Qwen/Qwen3-8B --lora.r 64 --length 4096
python scripts/fits.py --model Qwen/Qwen3-30B-A3B --lora.r 8 --optimizer.name adamw8bit
python scripts/fits.py --model meta-llama/Llama-3.1-70B --devices 2      # two GPUs share the base
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_qlora import cli
from lit_qlora.errors import UsageError, did_you_mean
from lit_qlora.settings import LoRAConfig, OptimizerConfig, Scheme, check
from lit_qlora.settings.checks import Settings
from lit_qlora.settings.limits import Count, Positive

if TYPE_CHECKING:
    from lit_qlora.model.config import ModelConfig
    from lit_qlora.run.fits import Fit, Gpu
    from lit_qlora.run.plan import Planner
    from lit_qlora.settings import TrainConfig

GIB = 2**30
CHECKPOINTS = Path("checkpoints")
LENGTH = 2048
"""Tokens of a row by default."""
SIZES = (8, 12, 16, 24, 40, 48, 80)
"""GB of usual GPUs."""
TABLE = (
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "meta-llama/Llama-3.2-3B",
    "google/gemma-4-E2B-it",
    "google/gemma-4-E4B-it",
    "Qwen/Qwen3-4B",
    "meta-llama/Llama-2-7b-hf",
    "mistralai/Mistral-7B-v0.1",
    "meta-llama/Llama-3.1-8B",
    "Qwen/Qwen3-8B",
    "google/gemma-2-9b",
    "google/gemma-3-12b-pt",
    "meta-llama/Llama-2-13b-hf",
    "microsoft/phi-4",
    "Qwen/Qwen3-14B",
    "openai/gpt-oss-20b",
    "mistralai/Mistral-Small-24B-Base-2501",
    "google/gemma-4-26B-A4B-it",
    "google/gemma-3-27b-pt",
    "huggyllama/llama-30b",
    "Qwen/Qwen3-32B",
    "meta-llama/Llama-3.1-70B",
)
"""Models of the table without --gpu and --model."""


@dataclass(frozen=True, kw_only=True)
class FitsConfig(Settings):
    """Say which models a GPU can fine-tune, or which GPU a model needs, from the plan that a run makes of itself.

    For --gpu "H100 80GB" and H200 it estimates tokens a second, by operations and the rates measured on these two.

    Runs have bf16-true, or 16-mixed on a GPU without bfloat16.
    """

    gpu: str | None = None
    """Memory of the GPU in GB, or its name, such as "RTX 4090" or T4. By default GPUs of 8 to 80 GB."""
    model: str | None = None
    """A well-known model, ORG/NAME, or a folder with a checkpoint or its config.json. By default well-known models."""
    host: Positive = 64.0
    """Free memory of the host in GiB, where activations may go."""
    length: Count | None = None
    """Tokens of a row. By default 2,048. In a table, models with a shorter context have rows of that length, and are
    named below it."""
    quantize: Scheme = "bnb.nf4-dq"
    """Storage of the frozen base weights."""
    quantize_head: bool = False
    """Quantise the output head too."""
    devices: Count = 1
    """GPUs of one host that share the base (--strategy sharded), and the host's memory."""
    sequence_parallel: Count = 1
    """GPUs of the host that share each row. Without --devices each of them holds the whole base."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoRAConfig = field(default_factory=lambda: LoRAConfig(r=16, alpha=32.0, targets=("all",)))
    json: bool = False
    """Print a JSON list instead of a table."""

    @property
    def wanted(self) -> int:
        """Tokens of a row, for models that can read so many."""
        return self.length or LENGTH

    @property
    def on_host(self) -> float:
        """Free bytes of the host for each GPU."""
        return self.host * GIB / max(self.devices, self.sequence_parallel)

    def __post_init__(self) -> None:
        """Check combinations of settings."""
        super().__post_init__()
        check(
            self.devices == 1 or self.devices % self.sequence_parallel == 0,
            f"sequence_parallel {self.sequence_parallel} does not divide {self.devices} devices into equal groups.",
        )


def main(config: FitsConfig) -> None:
    """Plan each run, and print a table."""
    with uncollected():
        fits = list(find_fits(config))
    if config.json:
        import json

        print(json.dumps([asdict(fit) for fit in fits], indent=1))
    elif config.gpu is None and config.model is None:
        print(overview(fits, config.wanted))
    else:
        print(listing(fits, config))


@contextmanager
def uncollected() -> Iterator[None]:
    """Let Python look for no cycles of garbage inside.

    Planning makes 150,000 modules that are in use. To look through them again and again takes two fifths of the time.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def find_fits(config: FitsConfig) -> "Iterator[Fit]":
    """Yield what fits, model by model, from the smallest GPU on."""
    from lit_qlora.run.fits import find_fit
    from lit_qlora.settings import TrainConfig
    from lit_qlora.sharded import why_whole

    state = state_bytes(config.optimizer)
    for model in models(config):
        if config.sequence_parallel > 1 and (reason := why_whole(model, config.sequence_parallel)):
            check(
                config.model is None,
                f"sequence_parallel {config.sequence_parallel} does not suit {model.name}: {reason}.",
            )
            continue
        planner = None
        for gpu in gpus(config):
            planner = planner or planner_of(config, gpu, model, TrainConfig(), state)
            context = planner.gpt.config.block_size
            check(
                config.model is None or config.length is None or config.length <= context,
                f"length {config.wanted:,}: {model.name} reads {context:,} tokens. Take a smaller --length, or "
                "lengthen its context (--lora.rope_scaling).",
            )
            yield find_fit(planner, gpu, config.wanted, config.on_host)


def planner_of(config: FitsConfig, gpu: "Gpu", model: "ModelConfig", train: "TrainConfig", state: float) -> "Planner":
    """The planner of runs with these settings."""
    from lit_qlora.run.fits import planner_for

    sharded = config.devices if config.devices > 1 else 0
    kind = {"quantize_head": config.quantize_head, "sharded": sharded, "parts": config.sequence_parallel}
    return planner_for(gpu.card, model, config.lora, config.quantize, train, state, **kind)


def state_bytes(config: OptimizerConfig) -> float:
    """Bytes of an optimizer's state for each parameter; other optimizers than AdamW are tried on the CPU.

    Raises:
        UsageError: if it is not known, or fails.
    """
    import torch

    from lit_qlora.settings import TrainConfig
    from lit_qlora.train.optim import measure_state_bytes

    return 8.0 if config.name == "adamw" else measure_state_bytes(config, TrainConfig(), torch.device("cpu"))


def gpus(config: FitsConfig) -> "list[Gpu]":
    """The GPUs of the table; they are alike but for their memory."""
    from lit_qlora.run.fits import gpu_called

    return [gpu_called(text) for text in ([config.gpu] if config.gpu else map(str, SIZES))]


def models(config: FitsConfig) -> "Iterator[ModelConfig]":
    """Yield the models of the table."""
    from lit_qlora.convert.published_shapes import SHAPES, read_shape

    if config.model is None:
        yield from map(read_shape, SHAPES if config.gpu else TABLE)
        return
    for folder in (Path(config.model), CHECKPOINTS / config.model):
        if found := read_folder(folder):
            yield found
            return
    if config.model not in SHAPES:
        known = list(SHAPES)
        hint = did_you_mean(config.model, known)
        raise UsageError(
            f"model {config.model!r} is neither a folder with model_config.json or config.json nor known.{hint}\n"
            f"Give the folder of its config.json, or one of {', '.join(known)}."
        )
    yield read_shape(config.model)


def read_folder(folder: Path) -> "ModelConfig | None":
    """The configuration in a checkpoint of ours or Hugging Face's; None if the folder holds neither."""
    from lit_qlora.convert.families import read_config
    from lit_qlora.files.reading import read_json
    from lit_qlora.model.config import ModelConfig

    if (folder / "model_config.json").is_file():
        return ModelConfig.load(folder)
    path = folder / "config.json"
    return read_config(read_json(path), str(folder)) if path.is_file() else None


def overview(fits: "list[Fit]", length: int) -> str:
    """A table of models and GPUs in Markdown: rows at a time, longest row."""
    names = list(dict.fromkeys(fit.gpu for fit in fits))
    cells: dict[str, list[str]] = {}
    for fit in fits:
        cells.setdefault(fit.model, []).append(cell(fit))
    table = as_markdown(["model", *names], [[model, *row] for model, row in cells.items()])
    return "\n".join([table, *shortened(fits, length)])


def shortened(fits: "list[Fit]", length: int) -> list[str]:
    """Name the models whose context is shorter than the wanted rows, which are cut to it; nothing if there are none."""
    short = {fit.model: fit.context for fit in fits if fit.context < length}
    if not short:
        return []
    named = ", ".join(f"{model} ({context:,})" for model, context in short.items())
    return ["", f"Rows are as long as the context of models that cannot read {length:,} tokens: {named}"]


def cell(fit: "Fit") -> str:
    """Write "4 · 9k": 4 rows at a time, 9k tokens in the longest; * if a single row needs recomputation."""
    if not fit.longest:
        return "-"
    return f"{fit.rows}{'' if fit.recompute == 'none' else '*'} · {tokens(fit.longest)}"


def tokens(count: int) -> str:
    """Write a number of tokens, in thousands of 1,024 from there on."""
    return str(count) if count < 1024 else f"{count // 1024}k"


def listing(fits: "list[Fit]", config: FitsConfig) -> str:
    """A row for each model or GPU, with the setting; for one model also the smallest GPU.

    On the GPUs whose speed was measured it has tokens a second too, an estimate.
    """
    by = "gpu" if config.model else "model"
    head = [by, "rows at a time", "recompute, one row", "GiB of", "there are", "longest row"]
    timed = any(fit.tokens_per_second for fit in fits)
    head += ["tokens/s, about"] if timed else []
    rows: list[list[Any]] = []
    for fit in fits:
        setting = fit.recompute + (f" (plain path: {fit.slow_because})" if fit.slow_because else "")
        told = [setting, f"{fit.planned_gib:.2f}", f"{fit.room_gib:.2f}"]
        speed = f"{fit.tokens_per_second:,.0f}" if fit.tokens_per_second else "-"
        longest = f"{fit.longest:,}" if fit.longest else "does not fit"
        rows.append([getattr(fit, by), fit.rows or "-", *told, longest, *([speed] if timed else [])])
    return "\n".join([*needs(config), as_markdown(head, rows), *shortened(fits, config.wanted)])


def needs(config: FitsConfig) -> list[str]:
    """Say which memory a model needs at least, and if nothing is recomputed; nothing for several models or one GPU."""
    if config.model is None or config.gpu:
        return []
    from lit_qlora.run.fits import least_gb
    from lit_qlora.settings import TrainConfig

    (model,), gpu, state = models(config), gpus(config)[0], state_bytes(config.optimizer)
    planners = [
        planner_of(config, gpu, model, train, state) for train in (TrainConfig(), TrainConfig(recompute="none"))
    ]
    length = min(config.wanted, planners[0].gpt.config.block_size)
    least, whole = (least_gb(planner, length, config.on_host) for planner in planners)
    count = max(config.devices, config.sequence_parallel)
    need = "need a GPU" if count == 1 else f"need {count} GPUs"
    return [
        f"{model.name}: rows of {length:,} tokens {need} of {least} GB, or {whole} GB without recomputation",
        "",
    ]


def as_markdown(head: list[str], rows: list[list[Any]]) -> str:
    """Write a table in Markdown."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


if __name__ == "__main__":
    cli.run(main, FitsConfig)
