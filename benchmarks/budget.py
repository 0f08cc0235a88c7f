"""Train a model from scratch on a text, and compare storages of its weights at equal bytes, on text it has not read.

python benchmarks/budget.py --text corpus.txt --tokenizer tokenizer.model --seconds 90 --out out/budget

The text may be anything. Its end is held out: effects are measured on a part of that, storages compared on the rest.
OUT/ids.npy keeps the ids of the text, OUT/model the checkpoint, OUT/budget.md the table.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results import ROOT
from shapes import SHAPES

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from lit_qlora.checkpoint.quantization_table import Table
    from lit_qlora.model.config import ModelConfig
    from lit_qlora.model.gpt import GPT
    from lit_qlora.settings import Quantization

BUDGETS = (4.25, 4.5, 4.75, 5.0, 5.5, 6.0, 7.0)
"""Bits a weight of the linear layers."""
ENCODED_AT_ONCE = 100_000
"""Characters, or some more, up to the end of a line."""
WARM_UP = 0.03
"""Share of the training in which the rate rises."""


def ids_of(arguments: argparse.Namespace) -> "np.ndarray":
    """The ids of the text, from OUT/ids.npy if it is there."""
    import numpy as np

    from lit_qlora.prompts.tokenizer import Tokenizer

    path = arguments.out / "ids.npy"
    if not path.is_file():
        tokenizer, ids = Tokenizer(arguments.out / "model"), []
        with arguments.text.open(encoding="utf-8") as file:
            while lines := file.readlines(ENCODED_AT_ONCE):
                ids += tokenizer.encode("".join(lines), bos=False)
        np.save(path, np.array(ids, dtype=np.uint16 if max(ids) < 2**16 else np.int32))
    return np.load(path)


def rows_from(ids: "np.ndarray", rows: int, length: int, seed: int) -> Iterator[tuple["Tensor", "Tensor"]]:
    """Yield tokens and labels, (rows, length) int64, from random positions of the text, without end."""
    import numpy as np
    import torch

    draw = np.random.default_rng(seed)
    while True:
        starts = draw.integers(0, len(ids) - length - 1, rows)
        both = torch.from_numpy(np.stack([ids[start : start + length + 1] for start in starts]).astype(np.int64))
        yield both[:, :-1].contiguous(), both[:, 1:].contiguous()


def initial_model(config: "ModelConfig") -> "GPT":
    """A model with small normal weights, smaller still where they add to the residual stream."""
    import torch
    from torch import nn

    from lit_qlora.device import pick_device
    from lit_qlora.model.gpt import GPT

    torch.manual_seed(0)
    model = GPT(config).to(pick_device())
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            adds = path.endswith(("projection", "down"))
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * config.n_layer) if adds else 0.02)
    return model


def train(model: "GPT", data: Iterator[tuple["Tensor", "Tensor"]], seconds: float, peak: float) -> None:
    """Train for so many seconds: AdamW, a rate that rises and then falls along a cosine."""
    import torch

    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05, fused=device.type == "cuda")
    begin, step, seen, done = time.monotonic(), 0, 0, 0.0
    while done < 1:
        tokens, labels = (part.to(device, non_blocking=True) for part in next(data))
        rate = peak * min(done / WARM_UP + 0.01, 0.5 + 0.5 * math.cos(math.pi * done), 1)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16):
            loss = model.loss(tokens, labels) / labels.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, seen = step + 1, seen + labels.numel()
        if step % 100 == 0 or step < 3:
            print(f"step {step}  loss {loss.item():.3f}  {seen / (time.monotonic() - begin):,.0f} tokens/s", flush=True)
        loss.item()  # waits for the device, so that the clock is right
        done = (time.monotonic() - begin) / seconds
    print(f"step {step}  loss {loss.item():.3f}  {seen:,} tokens", flush=True)


def save(model: "GPT", config: "ModelConfig", folder: Path) -> None:
    """Write the checkpoint, in bfloat16."""
    import torch

    from lit_qlora.checkpoint.checkpoint import save_weights

    weights = {name: weight.detach().to("cpu", torch.bfloat16) for name, weight in model.state_dict().items()}
    save_weights(folder, config, weights, weights.items())


def measure_effects(arguments: argparse.Namespace, ids: "np.ndarray") -> "Table":
    """The table of scripts/plan_quantization.py, on a text of these ids."""
    from lit_qlora.checkpoint.quantization_table import read_table
    from lit_qlora.prompts.tokenizer import Tokenizer

    folder, text = arguments.out / "model", arguments.out / "calibration.txt"
    text.write_text(Tokenizer(folder).decode(ids.tolist()), encoding="utf-8")
    command = [sys.executable, str(ROOT / "scripts/plan_quantization.py"), "--checkpoint_dir", str(folder)]
    command += ["--text", str(text), "--tokens", str(len(ids)), "--length", str(arguments.length), "--again", "true"]
    subprocess.run(command, check=True)
    table = read_table(folder)
    assert table is not None
    return table


def storages(table: "Table", config: "ModelConfig") -> dict[str, "Quantization"]:
    """The storages that are compared: uniform ones, fixed rules, and choices within budgets."""
    import torch

    from lit_qlora.settings import Budget, Quantization

    ends = rf"blocks\.(0|{config.n_layer - 1})\..*"
    found = {
        "nf4-dq, head too": Quantization("bnb.nf4-dq", not config.tied_head),
        "nf4-dq, head in 16 bit": Quantization("bnb.nf4-dq"),
        "nf4, head too": Quantization("bnb.nf4", not config.tied_head),
        "nf4, head in 16 bit": Quantization("bnb.nf4"),
        "nf4-dq, head in 8 bit": Quantization("bnb.nf4-dq", layers=(("head", "bnb.int8"),)),
        "nf4-dq, first and last block in 8 bit": Quantization("bnb.nf4-dq", layers=((ends, "bnb.int8"),)),
        "nf4-dq, these and head in 8 bit": Quantization(
            "bnb.nf4-dq", layers=((ends, "bnb.int8"), ("head", "bnb.int8"))
        ),
        "int8, head too": Quantization("bnb.int8", not config.tied_head),
    }
    budgets = {f"budget of {bits:g} bits": Budget(bits, bits=True) for bits in BUDGETS}
    return found | {name: table.within(budget, config, torch.bfloat16) for name, budget in budgets.items()}


def compare(arguments: argparse.Namespace, table: "Table", ids: "np.ndarray") -> dict[str, Any]:
    """Bytes, KL from the model as it is and loss of each storage, and of the choice for as many bytes, on these ids."""
    import torch

    from lit_qlora.checkpoint.checkpoint import load_model
    from lit_qlora.device import pick_device
    from lit_qlora.evaluate.quantization import Effects, rows_of
    from lit_qlora.model.config import ModelConfig
    from lit_qlora.settings import Budget, Quantization

    config = ModelConfig.load(arguments.out / "model")
    rows = rows_of(ids.tolist(), arguments.length)
    effects = Effects(load_model(arguments.out / "model", torch.float32, pick_device()), rows)
    before = loss_of(effects, Quantization("none"))
    found: dict[str, Any] = {"tokens": rows.numel(), "loss": before, "storages": []}
    for name, storage in storages(table, config).items():
        size, bits = table.sizes(storage, config, torch.bfloat16)
        best = table.within(Budget(size, bits=False), config, torch.bfloat16)
        facts = {"name": name, "bytes": size, "bits": bits, "sum_of_effects": table.predicted(storage)}
        facts |= {"kl": effects.of_storage(storage), "loss_rise": loss_of(effects, storage) - before}
        facts |= {"best_kl": facts["kl"], "best_loss_rise": facts["loss_rise"]}
        if best != storage:
            facts |= {"best_kl": effects.of_storage(best), "best_loss_rise": loss_of(effects, best) - before}
        found["storages"].append(facts)
    return found


def loss_of(effects: Any, storage: "Quantization") -> float:
    """The loss of the model in a storage, nats a token."""
    import torch

    from lit_qlora.evaluate.quantization import quantized
    from lit_qlora.quantize import Storage

    of, model = Storage(torch.float32, *storage), effects.model
    linears = [path for path, module in model.named_modules() if type(module) is torch.nn.Linear]
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad(), quantized(model, {path: of.scheme(path) for path in linears if of.quantizes(path)}):
        for part in effects.rows:
            total += model.loss(part[:, :-1].contiguous(), part[:, 1:].contiguous()).double().cpu()
    return float(total) / sum(part[:, 1:].numel() for part in effects.rows)


def as_table(found: dict[str, Any]) -> str:
    """Write what was found, the smallest storage first."""
    lines = [
        f"Loss of the model as it is: {found['loss']:.4f} nats a token, over {found['tokens']:,} tokens",
        "",
        "| storage | MB | bits a weight | KL | loss | KL of the choice at as many bytes | loss | sum of effects |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for facts in sorted(found["storages"], key=lambda facts: facts["bytes"]):
        cells = [facts["name"], f"{facts['bytes'] / 1e6:.2f}", f"{facts['bits']:.2f}"]
        for prefix in ("", "best_"):
            cells += [f"{facts[f'{prefix}kl']:.5f}", f"{facts[f'{prefix}loss_rise']:+.5f}"]
        lines.append(f"| {' | '.join([*cells, format(facts['sum_of_effects'], '.5f')])} |")
    return "\n".join(lines)


def main() -> None:
    """Train, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="text file in UTF-8")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.model of SentencePiece")
    parser.add_argument("--shape", choices=SHAPES, default="llama-100m", help="the model, but for its vocabulary")
    parser.add_argument("--seconds", type=float, default=90, help="of training")
    parser.add_argument("--rows", type=int, default=32, help="rows of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--rate", type=float, default=1e-3, help="largest learning rate")
    parser.add_argument("--calibration", type=int, default=16_384, help="tokens on which effects are measured")
    parser.add_argument("--test", type=int, default=65_536, help="tokens on which storages are compared")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything")
    arguments = parser.parse_args()

    from lit_qlora.model.config import ModelConfig
    from lit_qlora.prompts.tokenizer import Tokenizer

    folder = arguments.out / "model"
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.tokenizer.resolve() != (folder / "tokenizer.model").resolve():
        shutil.copy(arguments.tokenizer, folder / "tokenizer.model")
    ids = ids_of(arguments)
    kept = arguments.calibration + arguments.test
    if len(ids) < 4 * kept:
        parser.error(f"the text has {len(ids):,} tokens. {kept:,} are held out, so give at least {4 * kept:,}.")
    known, calibration, test = ids[:-kept], ids[-kept : -arguments.test], ids[-arguments.test :]
    fields = SHAPES[arguments.shape] | {"vocab_size": Tokenizer(folder).size}
    config = ModelConfig(name=f"random/{arguments.shape}", **fields)
    model = initial_model(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(known):,} tokens", flush=True)
    train(model, rows_from(known, arguments.rows, arguments.length, 0), arguments.seconds, arguments.rate)
    save(model, config, folder)
    del model
    found = compare(arguments, measure_effects(arguments, calibration), test)
    (arguments.out / "budget.json").write_text(json.dumps(found, indent=1) + "\n")
    (arguments.out / "budget.md").write_text(as_table(found) + "\n")
    print(as_table(found))


if __name__ == "__main__":
    main()
