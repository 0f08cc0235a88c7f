"""Time the answers of a model of a real shape with random weights made on the GPU, and append a row to results.csv.

python benchmarks/generate.py --quantize bnb.nf4-dq --rows 1 --profile
python benchmarks/generate.py --library transformers --quantize bnb.nf4-dq

The clock starts after the first tokens, which compile kernels and capture a graph; the time of the prompt and of these
tokens is printed apart. The bandwidth is the bytes of all weights that one token reads, as they are stored, divided by
the time of a step; several rows read more, see lit_qlora.generation.product.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from results import RESULTS, append_row, current_commit
from shapes import SHAPES, random_model
from torch import nn

from lit_qlora.device import pick_device
from lit_qlora.generation import generate
from lit_qlora.generation.sequences import Decoding
from lit_qlora.lora.layer import LoRALinear, add_lora
from lit_qlora.model.gpt import GPT
from lit_qlora.model.mlp import MoE
from lit_qlora.quantize import storage_bytes
from lit_qlora.settings import SCHEMES, GenerationConfig, LoRAConfig

WARM_UP = 4  # tokens that do not count
MEMORY_SPEED = 3.0e12  # bytes a second that an H100 reads at best, of the 3.35e12 that its memory is sold with


def ours(arguments: argparse.Namespace) -> tuple[nn.Module, Callable[[int, Callable[[], None]], None]]:
    """Make our model, and a function that generates so many tokens and calls back after each."""
    model = random_model(arguments.shape, arguments.quantize)
    if arguments.r:
        add_lora(model, LoRAConfig(r=arguments.r, alpha=2 * arguments.r, targets="all"))
        for module in model.modules():
            if isinstance(module, LoRALinear):
                nn.init.normal_(module.lora_b, std=0.02)
    prompts = random_prompts(arguments)

    def run(tokens: int, tell: Callable[[], None]) -> None:
        config = GenerationConfig(max_new_tokens=tokens)
        generate(
            model, prompts, config, (), stop=lambda _: tell(), fixed_shapes=False if arguments.way == "plain" else None
        )

    return model, run


def transformers(arguments: argparse.Namespace) -> tuple[nn.Module, Callable[[int, Callable[[], None]], None]]:
    """Make the same with transformers' generate and the layers of bitsandbytes."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.generation.streamers import BaseStreamer

    shape, scheme = SHAPES[arguments.shape], arguments.quantize
    device = pick_device()
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape["vocab_size"],
                hidden_size=shape["n_embd"],
                intermediate_size=shape["ffn_size"],
                num_hidden_layers=shape["n_layer"],
                num_attention_heads=shape["n_head"],
                num_key_value_heads=shape["n_kv_head"],
                max_position_embeddings=shape["block_size"],
            )
        ).eval()
        torch.set_default_dtype(torch.float32)
    for path, module in list(model.named_modules()):
        if scheme != "none" and type(module) is nn.Linear and path != "lm_head":
            layer = Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16)
            layer.weight = Params4bit(
                module.weight.data,
                requires_grad=False,
                quant_type=scheme.removeprefix("bnb.").removesuffix("-dq"),
                compress_statistics=scheme.endswith("-dq"),
            )
            model.set_submodule(path, layer.to(device))
    prompts = torch.tensor(random_prompts(arguments), device=device)

    class Streamer(BaseStreamer):
        """Calls back after each token of the answer; the first call, for the prompt, is skipped."""

        def __init__(self, tell: Callable[[], None]) -> None:
            self.tell, self.prompt = tell, True

        def put(self, value: Any) -> None:
            if not self.prompt:
                self.tell()
            self.prompt = False

        def end(self) -> None:
            pass

    def run(tokens: int, tell: Callable[[], None]) -> None:
        cache = {"cache_implementation": "static"} if arguments.way == "static" else {}
        model.generate(
            prompts, attention_mask=torch.ones_like(prompts), min_new_tokens=tokens, max_new_tokens=tokens,
            do_sample=False, streamer=Streamer(tell), pad_token_id=0, **cache,
        )  # fmt: skip

    if arguments.rows > 1:
        raise SystemExit("transformers streams one answer at a time: --rows 1")
    return model, run


def random_prompts(arguments: argparse.Namespace) -> list[list[int]]:
    """Ids of each row's prompt."""
    draw = torch.Generator().manual_seed(0)
    shape = (arguments.rows, arguments.prompt)
    ids: list[list[int]] = torch.randint(3, SHAPES[arguments.shape]["vocab_size"], shape, generator=draw).tolist()
    return ids


def bytes_a_token(model: nn.Module) -> int:
    """Bytes of all weights that a token reads: not the embedding, which gives one row, nor experts it does not take."""
    unread = 0
    for mixture in (module for module in model.modules() if isinstance(module, MoE)):
        left = 1 - mixture.router.config.n_expert_per_token / mixture.router.config.n_expert
        unread += round(left * sum(storage_bytes(mixture.experts).values()))
    embedded = next(module.weight for module in model.modules() if isinstance(module, nn.Embedding))
    return sum(storage_bytes(model).values()) - unread - embedded.numel() * embedded.element_size()


def measure(run: Callable[[int, Callable[[], None]], None], rows: int, tokens: int) -> tuple[list[float], float]:
    """Seconds of each counted step, sorted, and seconds before the first of them in a second run."""
    for _ in range(2):
        told: list[float] = []
        start = time.perf_counter()
        run(tokens, lambda told=told: told.append(time.perf_counter()))  # type: ignore[misc]
    each = told[rows - 1 :: rows]
    return sorted(b - a for a, b in pairwise(each[WARM_UP:])), each[WARM_UP] - start


def main() -> None:
    """Measure once and append the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=("ours", "transformers"), default="ours", help="who generates")
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b", help="sizes of the model")
    parser.add_argument("--quantize", choices=SCHEMES, default="bnb.nf4-dq", help="storage of the base")
    parser.add_argument("--r", type=int, default=0, help="rank of an adapter that is not merged; 0 for none")
    parser.add_argument("--rows", type=int, default=1, help="texts at a time")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each text")
    parser.add_argument(
        "--way",
        choices=("default", "plain", "static"),
        default="default",
        help="plain: without fixed shapes; static: transformers with a static cache, which it compiles for",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="the table that gets the row")
    parser.add_argument("--commit", default=current_commit(), help="what was measured")
    parser.add_argument("--profile", action="store_true", help="say where the time of a step goes")
    arguments = parser.parse_args()
    if arguments.way != "default" and (arguments.way == "plain") != (arguments.library == "ours"):
        parser.error(f"--way {arguments.way} is not one of --library {arguments.library}")

    model, run = (ours if arguments.library == "ours" else transformers)(arguments)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times, first = measure(run, arguments.rows, arguments.tokens)
    median, read = statistics.median(times), bytes_a_token(model)
    adapter = f" r{arguments.r}" if arguments.r else ""
    row = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": arguments.commit,
        "gpu": torch.cuda.get_device_name() if on_gpu else "none",
        "torch": torch.__version__.split("+")[0],
        "program": "generate.py",
        "shape": arguments.shape,
        "micro_batch": arguments.rows,
        "tokens": arguments.prompt,
        "flags": f"{arguments.library} {arguments.quantize}{adapter} {arguments.way}, {arguments.tokens} new tokens",
        "tokens_per_second": round(arguments.rows / median, 1),
        "slowest": round(arguments.rows / times[-1], 1),
        "fastest": round(arguments.rows / times[0], 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else "",
    }
    append_row(arguments.results, row)
    print(json.dumps({k: row[k] for k in ("flags", "tokens_per_second", "slowest", "fastest", "peak_gib")}))
    print(
        f"  {1e3 * median:.3f} ms a step, mean {1e3 * statistics.mean(times):.3f}; {read / 1e9:.2f} GB of weights at "
        f"{read / median / 1e12:.2f} TB/s, {100 * read / median / MEMORY_SPEED:.0f} % of what the memory can do"
    )
    print(f"  {first:.3f} s to the {WARM_UP + 1}th token, prompt and graph included")
    if arguments.profile and isinstance(model, GPT):
        _profile(model, arguments)


@torch.no_grad()
def _profile(model: GPT, arguments: argparse.Namespace) -> None:
    from torch.profiler import ProfilerActivity, profile

    decoding = Decoding(model.eval(), random_prompts(arguments), 8, None)
    if arguments.way == "default":
        decoding.settle()
    newest = decoding.logits.argmax(dim=-1)
    decoding.append(newest)
    decoding.advance()
    decoding.append(newest)
    activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    with profile(activities=[activity]) as recorded:
        decoding.advance()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    sums: dict[str, tuple[int, float]] = {}
    for event in recorded.events():
        if "cuda" in str(event.device_type).lower() or not torch.cuda.is_available():
            calls, spent = sums.get(event.name, (0, 0.0))
            sums[event.name] = calls + 1, spent + event.time_range.elapsed_us()
    print(f"{sum(s for _, s in sums.values()) / 1e3:.2f} ms in {sum(c for c, _ in sums.values())} kernels")
    for name, (calls, spent) in sorted(sums.items(), key=lambda item: -item[1][1])[:20]:
        print(f"  {spent / 1e3:8.3f} ms {calls:5d} x {spent / calls:8.2f} us  {name[:100]}")


if __name__ == "__main__":
    main()
