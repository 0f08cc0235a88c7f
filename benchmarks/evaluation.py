"""Time our scoring of requests against that of lm-eval's own `hf` model, on the same random weights and requests.

python benchmarks/evaluation.py --shape llama-2-7b --quantize bnb.nf4       # a GPU: nf4 here and there
python benchmarks/evaluation.py --shape llama-100m                          # two CPU cores, float32

Requests are random ids, so no task, tokenizer or network is needed. There are four kinds: questions with four choices
of several tokens, questions with four letters after common examples (as in MMLU), pairs of sentences, and windows of a
text. lm-eval itself runs only HFLM's _loglikelihood_tokens. It needs the packages lm_eval, transformers and accelerate,
with their imports: datasets, evaluate, pytablewriter, sacrebleu, rouge_score, sqlitedict, word2number,
more_itertools, jsonlines, jinja2, typer, dill. --hf_batch_size lists its batch sizes; the fastest one counts.
Below the line of each kind stand the seconds of each part in one more run, which waits for each part.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import shapes

Request = tuple[list[int], list[int]]


def workloads(count: int, vocabulary: int, seed: int = 0) -> dict[str, list[Request]]:
    """Draw requests of four kinds, about `count` questions of each, with the lengths of common tasks."""
    draw = random.Random(seed)

    def ids(length: float) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(max(1, round(length)))]

    choices, letters, pairs = [], [], []
    for _ in range(count):
        context = ids(draw.lognormvariate(4.3, 0.5))  # 74 in the middle, as of HellaSwag and ARC
        choices += [(context, ids(draw.lognormvariate(2.5, 0.6))) for _ in range(4)]
        pairs += [([1], ids(draw.lognormvariate(2.4, 0.3))) for _ in range(2)]
    for _ in range(max(1, count // 16)):
        examples = ids(draw.lognormvariate(6.1, 0.3))  # 446, five examples that all questions of a subject have
        for _ in range(max(4, count // 4) // max(1, count // 16)):
            question = examples + ids(draw.lognormvariate(4.4, 0.4))
            letters += [(question, [letter]) for letter in range(3, 7)]
    windows = [(ids(1), ids(1024)) for _ in range(max(1, count // 32))]
    return {"choices": choices, "letters": letters, "pairs": pairs, "windows": windows}


def main() -> None:
    """Print a line for each kind of request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="llama-2-7b", help="sizes of the model")
    parser.add_argument("--quantize", choices=["none", "bnb.nf4"], default="none", help="storage, here and there")
    parser.add_argument("--questions", type=int, default=128, help="questions of each kind")
    parser.add_argument("--repeats", type=int, default=3, help="times that each is done; the middle one counts")
    parser.add_argument("--hf_batch_size", type=int, nargs="+", default=[16, 64], help="sizes that hf is given")
    parser.add_argument("--plain", action="store_true", help="read tokens by the plain model on a GPU too")
    parser.add_argument("--work_dir", type=Path, default=Path("/tmp/lit_qlora_bench"), help="where the weights go")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()

    ours_dir, theirs_dir = arguments.work_dir / arguments.shape, arguments.work_dir / f"{arguments.shape}-hf"
    shapes.make_checkpoint(arguments.shape, ours_dir)
    if not theirs_dir.is_dir():
        from lit_qlora.convert.to_hugging_face import export_hf

        export_hf(ours_dir, theirs_dir)
        for file in theirs_dir.glob("tokenizer*"):
            file.unlink()  # a toy's, whose vocabulary is another; no text is encoded
    requests = workloads(arguments.questions, shapes.SHAPES[arguments.shape]["vocab_size"])
    figures: dict[str, Any] = {
        kind: {"tokens": sum(len(context) + len(continuation) for context, continuation in asked)}
        for kind, asked in requests.items()
    }
    import torch

    # On a CPU, seconds of processor, so that other programs do not count; on a GPU the scores wait for it.
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    # One model at a time, so that neither has less memory than it would have alone.
    for name, load in (("ours", load_ours), ("hf", load_theirs)):
        score, parts = load(arguments, ours_dir if name == "ours" else theirs_dir)
        for kind, asked in requests.items():
            sizes: list[Any] = ["auto"] if name == "ours" else arguments.hf_batch_size
            score(asked[:16], sizes[0])  # warms up
            timed = {}
            for size in sizes:
                seconds = []
                for _ in range(arguments.repeats):
                    start = clock()
                    scores = score(asked, size)
                    seconds.append(clock() - start)
                timed[size] = statistics.median(seconds)
            best = min(timed, key=lambda size: timed[size])
            figures[kind][name] = {"seconds": timed[best], "batch_size": best, "scores": scores}
            figures[kind][name] |= breakdown(partial(score, asked, best), parts, clock)
        del score, parts
        release()
    for kind, row in figures.items():
        mine, other = row["ours"].pop("scores"), row["hf"].pop("scores")
        row["largest_difference"] = max(abs(a - b) for a, b in zip(mine, other, strict=True))
        row["speed"] = row["hf"]["seconds"] / row["ours"]["seconds"]
        print(
            f"{kind:8}  {len(requests[kind])} requests, {row['tokens']:,} tokens: ours {row['ours']['seconds']:.2f} s, "
            f"hf {row['hf']['seconds']:.2f} s (batches of {row['hf']['batch_size']}): {row['speed']:.2f} x; "
            f"log-likelihoods within {row['largest_difference']:.2g}",
            flush=True,
        )
        for name in ("ours", "hf"):
            x = row[name]
            spent = ", ".join(f"{part} {seconds:.3f} s" for part, seconds in x["spent"].items())
            print(f"    {name:4}  {x['tokens_read']:,} tokens read in {x['passes']} passes: {spent}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
    if os.environ.get("CLEAN_UP"):
        shutil.rmtree(theirs_dir)


Score = Callable[[Sequence[Request], Any], list[float]]
Parts = tuple[Any, Sequence[str]]
"""A model, and the names of its methods that are timed; the first one reads tokens."""


def breakdown(run: Callable[[], object], parts: Parts, clock: Callable[[], float]) -> dict[str, Any]:
    """Count the forward passes and their tokens (padding included), and time each part and the rest."""
    owner, names = parts
    methods = {name: getattr(owner, name) for name in names}
    spent, read = dict.fromkeys(names, 0.0), []

    def watched(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(tokens: Any, *args: Any, **kwargs: Any) -> Any:
            wait()
            start = clock()
            result = method(tokens, *args, **kwargs)
            wait()
            spent[name] += clock() - start
            if name == names[0]:
                read.append(tokens.numel())
            return result

        return call

    for name, method in methods.items():
        setattr(owner, name, watched(name, method))
    start = clock()
    run()
    total = clock() - start
    for name, method in methods.items():
        setattr(owner, name, method)
    spent["the rest"] = total - sum(spent.values())
    return {"passes": len(read), "tokens_read": sum(read), "spent": spent}


def wait() -> None:
    """Wait for the GPU, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def load_ours(arguments: argparse.Namespace, directory: Path) -> tuple[Score, Parts]:
    """Make a function that scores requests with our model."""
    import torch

    from lit_qlora.checkpoint.checkpoint import load_model
    from lit_qlora.evaluate.score import Scorer
    from lit_qlora.fused import reader

    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    model = load_model(directory, dtype, "cuda" if cuda else "cpu", arguments.quantize).eval()
    scorer = Scorer(model)
    if not arguments.plain:
        scorer.hidden = reader(model)

    def score(requests: Sequence[Request], size: Any) -> list[float]:
        return [value for value, _ in scorer.score(requests)]

    return score, (scorer, ("hidden", "_look_up"))


def load_theirs(arguments: argparse.Namespace, directory: Path) -> tuple[Score, Parts]:
    """Make a function that scores requests with lm-eval's own model."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

    cuda = torch.cuda.is_available()
    settings: dict[str, Any] = {"dtype": torch.bfloat16 if cuda else torch.float32}
    if arguments.quantize != "none":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=settings["dtype"]
        )
    if cuda:
        settings["device_map"] = {"": 0}
    model = AutoModelForCausalLM.from_pretrained(directory, **settings).eval()
    lm = HFLM(pretrained=model, tokenizer=PreTrainedTokenizerFast(tokenizer_object=small_tokenizer()), batch_size=1)

    def score(requests: Sequence[Request], size: int) -> list[float]:
        lm.batch_size_per_gpu = size
        found = lm._loglikelihood_tokens([(("", ""), *request) for request in requests], disable_tqdm=True)
        return [value for value, _ in found]

    return score, (lm, ("_model_call",))


def small_tokenizer() -> Any:
    """Make a tokenizer, because HFLM requires one."""
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))


def release() -> None:
    """Release the memory of a deleted model."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
