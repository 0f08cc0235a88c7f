"""One contestant of benchmarks/peers.py: builds its model once, then times a round of steps for each line it is sent.

A line of standard input is a JSON object {"steps": 8, "recompute": "none"}; the answer is a line that begins with
"RESULT". Whatever else a library prints goes past it. The work is the same for all: the same random numbers as tokens,
adapters in float32 or as the library has them, fused AdamW, gradients of one step after the other, no clipping.

python benchmarks/contestant.py '{"name": "peft", "dir": "/tmp/lit_qlora_bench/llama-2-7b-hf", ...}'  (see Task)
"""

import json
import math
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import SHAPES

if TYPE_CHECKING:
    from torch import Tensor, nn

HF_NAMES = {
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "query,value": ["q_proj", "v_proj"],
}
LITGPT_NAMES = {"llama-2-7b": "Llama-2-7b-hf", "llama-3-8b": "Meta-Llama-3-8B"}
EXAMPLES_A_STEP = 16  # of the workload "short"
LONGEST_EXAMPLE = 512
SHORT_WARM_UP = 5  # rounds of the workload "short" that are not timed, in which ours sees a shape often enough


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a contestant is asked to do."""

    name: str
    """One of BUILDERS."""
    checkpointing: bool = False
    """Whether the library computes activations again, in the way it recommends."""
    shape: str
    dir: str
    """Folder of a Hugging Face checkpoint of this shape; for all but ours."""
    workload: str
    """fixed: rows of one length. short: one example a micro-batch, 16 of them a step. packed: examples end to end."""
    rows: int
    length: int
    r: int
    targets: str
    quantize: bool
    dropout: float
    graphs: bool = True
    """Whether ours replays CUDA graphs of the workload "short"."""


@dataclass(frozen=True, eq=False)
class Micro:
    """A micro-batch: ids (B, T), and the lengths of the documents in its only row if it is packed."""

    ids: "Tensor"
    documents: list[int] | None = None


Loss = Callable[[Micro], "Tensor"]


def example_lengths(count: int, seed: int = 0) -> list[int]:
    """Lengths like those of Alpaca's examples: log-normal, median 110, mean about 127."""
    draw = random.Random(seed)
    return [min(LONGEST_EXAMPLE, max(40, int(draw.lognormvariate(math.log(110), 0.55)))) for _ in range(count)]


def make_steps(task: Task, count: int) -> list[list[Micro]]:
    """The micro-batches of each step."""
    import torch

    from lit_qlora.device import pick_device

    generator = torch.Generator().manual_seed(0)
    vocab = SHAPES[task.shape]["vocab_size"]

    def ids(rows: int, length: int) -> "Tensor":
        return torch.randint(3, vocab, (rows, length), generator=generator).to(pick_device())

    if task.workload == "fixed":
        return [[Micro(ids(task.rows, task.length))] for _ in range(count)]
    lengths = iter(example_lengths(100_000))
    if task.workload == "short":
        return [[Micro(ids(1, next(lengths))) for _ in range(EXAMPLES_A_STEP)] for _ in range(count)]
    steps = []
    for _ in range(count):
        documents, room = [], task.rows * task.length
        while room:
            documents.append(min(room, next(lengths)))
            room -= documents[-1]
        steps.append([Micro(ids(1, sum(documents)), documents)])
    return steps


def build_ours(task: Task) -> tuple["nn.Module", Loss, Any]:
    """This package, on random weights made on the GPU."""
    import torch
    from step import random_model

    from lit_qlora.data import Batch
    from lit_qlora.fused import fuse, why_not
    from lit_qlora.fused.graphs import padded_length
    from lit_qlora.lora import add_lora
    from lit_qlora.model import IGNORE
    from lit_qlora.settings import LoRAConfig

    model = random_model(task.shape, "bnb.nf4-dq" if task.quantize else "none")
    targets = tuple(task.targets.split(","))
    add_lora(model, LoRAConfig(r=task.r, alpha=16, targets=targets, dropout=task.dropout))  # type: ignore[arg-type]
    if reason := why_not(model):
        raise RuntimeError(f"the fast path is not taken: {reason}")
    short = task.workload == "short" and task.graphs
    fused = fuse(model, graph_tokens=padded_length(LONGEST_EXAMPLE) if short else 0)

    @cache  # made once, on the host, as the data of a run is
    def batch(micro: Micro) -> Batch:
        ids, documents = micro.ids.cpu(), micro.documents or [micro.ids.size(1)]
        positions = torch.cat([torch.arange(n) for n in documents]).expand_as(ids)
        labels = ids.roll(-1, 1).masked_fill(positions.roll(-1, 1) == 0, IGNORE)
        if not micro.documents:
            return Batch(ids, labels)
        numbers = torch.arange(len(documents), dtype=torch.int32)
        return Batch(ids, labels, None, positions, numbers.repeat_interleave(torch.tensor(documents))[None])

    def loss(micro: Micro) -> "Tensor":
        value: Tensor = model.loss(*batch(micro)) / micro.ids.numel()
        return value

    return model.train(), loss, fused


def build_peft(task: Task, liger: bool = False) -> tuple["nn.Module", Loss, None]:
    """PEFT on transformers and bitsandbytes, with or without Liger's kernels."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from lit_qlora.device import pick_device

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(rope=True, swiglu=True, rms_norm=True, fused_linear_cross_entropy=True)
    settings: dict[str, Any] = {"attn_implementation": "sdpa", "device_map": pick_device(), "dtype": torch.bfloat16}
    if task.quantize:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(task.dir, **settings)
    model.config.use_cache = False
    again = {"use_reentrant": False}
    if task.quantize:
        model = prepare_model_for_kbit_training(model, task.checkpointing, again)
    elif task.checkpointing:
        model.gradient_checkpointing_enable(again)
        model.enable_input_require_grads()
    adapters = LoraConfig(
        r=task.r, lora_alpha=16, lora_dropout=task.dropout, target_modules=HF_NAMES[task.targets], task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, adapters)
    return model.train(), _hf_loss(model, lengths=False), None


def build_unsloth(task: Task, varlen: bool = False) -> tuple["nn.Module", Loss, None]:
    """Unsloth; with `varlen` its packed attention also on a torch whose varlen_attn it finds too old."""
    os.environ |= {"UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_RETURN_LOGITS": "0"}
    if varlen:
        _name_enable_gqa()
    import unsloth  # before all other libraries, as it asks for  # isort: skip
    import torch

    model, _ = unsloth.FastLanguageModel.from_pretrained(
        model_name=task.dir,
        max_seq_length=max(2048, task.rows * task.length if task.workload == "packed" else task.length),
        dtype=torch.bfloat16,
        load_in_4bit=task.quantize,
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=task.r,
        target_modules=HF_NAMES[task.targets],
        lora_alpha=16,
        lora_dropout=task.dropout,
        bias="none",
        use_gradient_checkpointing="unsloth" if task.checkpointing else False,
        random_state=0,
    )
    unsloth.FastLanguageModel.for_training(model, use_gradient_checkpointing=task.checkpointing)
    return model.train(), _hf_loss(model, lengths=True), None


def _name_enable_gqa() -> None:
    """Give varlen_attn of torch 2.11 the argument enable_gqa, whose name unsloth 2026.10 looks for."""
    import inspect

    from torch.nn.attention import varlen

    plain = varlen.varlen_attn
    if "enable_gqa" in inspect.signature(plain).parameters:
        return

    def varlen_attn(*tensors: Any, window_size: Any = (-1, -1), enable_gqa: bool = False, **settings: Any) -> Any:
        assert not enable_gqa, "only for models whose heads all have keys of their own"
        return plain(*tensors, window_size=window_size, **settings)

    varlen.varlen_attn = varlen_attn


def _hf_loss(model: Any, lengths: bool) -> Loss:
    """The loss of a model of transformers.

    Args:
        lengths: tell it the lengths of packed documents, besides positions that begin again.
    """
    import torch

    def loss(micro: Micro) -> "Tensor":
        told: dict[str, Any] = {}
        labels = micro.ids
        if micro.documents:
            told["position_ids"] = torch.cat([torch.arange(n) for n in micro.documents])[None].to(micro.ids.device)
            labels = labels.masked_fill(told["position_ids"] == 0, -100)  # nothing is learnt across a border
            if lengths:
                told["packed_seq_lengths"] = torch.tensor(micro.documents, dtype=torch.int32)
        with torch.autocast(micro.ids.device.type, dtype=torch.bfloat16):
            value: Tensor = model(input_ids=micro.ids, labels=labels, **told).loss
        return value

    return loss


def build_litgpt(task: Task) -> tuple["nn.Module", Loss, None]:
    """litgpt, with random weights of its own."""
    import torch
    from lightning import Fabric
    from lightning.fabric.plugins import BitsandbytesPrecision
    from litgpt.lora import GPT, Block, Config, mark_only_lora_as_trainable
    from litgpt.utils import chunked_cross_entropy

    if task.workload == "packed":
        raise NotImplementedError("litgpt packs no examples")
    every = task.targets == "all"
    config = Config.from_name(
        LITGPT_NAMES[task.shape],
        lora_r=task.r,
        lora_alpha=16,
        lora_dropout=task.dropout,
        lora_query=True,
        lora_key=every,
        lora_value=True,
        lora_projection=every,
        lora_mlp=every,
    )
    if task.quantize:
        fabric = Fabric(accelerator="cuda", devices=1, plugins=BitsandbytesPrecision("nf4-dq", torch.bfloat16))
    else:
        fabric = Fabric(accelerator="cuda", devices=1, precision="bf16-true")
    with fabric.init_module(empty_init=False):
        model = GPT(config)
    mark_only_lora_as_trainable(model)
    model.max_seq_length = max(task.length, 512)
    if task.checkpointing:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    model = fabric.setup_module(model)

    def loss(micro: Micro) -> "Tensor":
        logits = model(micro.ids, lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        value: Tensor = chunked_cross_entropy(logits, micro.ids[..., 1:])
        return value

    return model.train(), loss, None


BUILDERS: dict[str, Callable[[Task], tuple["nn.Module", Loss, Any]]] = {
    "ours": build_ours,
    "peft": build_peft,
    "peft-liger": lambda task: build_peft(task, liger=True),
    "unsloth": build_unsloth,
    "unsloth-varlen": lambda task: build_unsloth(task, varlen=True),
    "litgpt": build_litgpt,
}
LIBRARIES = {
    "ours": "bitsandbytes",
    "peft": "peft",
    "peft-liger": "liger_kernel",
    "unsloth": "unsloth",
    "unsloth-varlen": "unsloth",
    "litgpt": "litgpt",
}


def tell(**facts: Any) -> None:
    """Answer peers.py."""
    print("\nRESULT " + json.dumps(facts), flush=True)


def compete(task: Task) -> None:
    """Build, then answer line by line until the input ends."""
    start = time.monotonic()
    try:
        model, loss, fused = BUILDERS[task.name](task)
    except (ImportError, NotImplementedError) as error:
        tell(missing=f"{type(error).__name__}: {error}")
        return
    import torch

    from lit_qlora.device import peak_gib, pick_device

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    data: list[list[Micro]] = []

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def step(micros: list[Micro]) -> None:
        for micro in micros:
            (loss(micro) / len(micros)).backward()
        optimizer.step()
        optimizer.zero_grad()

    tell(
        ready=round(time.monotonic() - start, 1),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        torch=torch.__version__.split("+")[0],
        version=version(LIBRARIES[task.name].replace("_", "-")),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )
    recompute, first = "none", True
    for line in sys.stdin:
        wanted = json.loads(line)
        data = data or make_steps(task, wanted["steps"])
        if fused is not None and wanted["recompute"] != recompute:
            recompute = wanted["recompute"]
            fused.set_recompute([recompute] * len(fused.blocks))
            torch.cuda.empty_cache()  # does nothing without a GPU
        # Warms the card, and in the first round what is compiled or captured on first use.
        for micros in data * SHORT_WARM_UP if first and task.workload == "short" else data[:2]:
            step(micros)
        first = False
        wait()
        torch.cuda.reset_peak_memory_stats() if torch.cuda.is_available() else None
        begin = time.perf_counter()  # a round takes seconds, so events would say the same
        for micros in data:
            step(micros)
        wait()
        tell(
            milliseconds=1e3 * (time.perf_counter() - begin),
            tokens=sum(micro.ids.numel() for micros in data for micro in micros),
            examples=sum(len(micro.documents or micro.ids) for micros in data for micro in micros),
            peak_gib=peak_gib(pick_device()),
        )


def make_checkpoint(task: Task) -> None:
    """Write random bf16 weights of this shape as a Hugging Face folder, unless they are there already."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers

    from lit_qlora import shards
    from lit_qlora.config import ModelConfig
    from lit_qlora.device import pick_device
    from lit_qlora.export import their_config
    from lit_qlora.families import their_tensors
    from lit_qlora.model import GPT

    folder = Path(task.dir)
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = ModelConfig(name=f"random/{task.shape}", **SHAPES[task.shape])
    with torch.device("meta"):
        ours = {name: p.to(torch.bfloat16) for name, p in GPT(config).named_parameters()}
    specs = {theirs.name: theirs.join(ours, config) for theirs in their_tensors(ours, config)}

    def tensor(spec: "Tensor") -> "Tensor":
        norm = spec.ndim == 1
        made = torch.ones(spec.shape) if norm else 0.02 * torch.randn(spec.shape, device=pick_device())
        return made.to(torch.bfloat16)

    shards.write(folder, "model.safetensors", specs, ((name, tensor(spec)) for name, spec in specs.items()))
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "<pad>", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.block_size}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind | named, indent=2))
    content = their_config(folder, config, ours) | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    (folder / "config.json").write_text(json.dumps(content, indent=2))  # last: it makes the folder a checkpoint


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    own = Task(**asked)
    make_checkpoint(own) if own.name == "make" else compete(own)
