"""What several tests share: small random models and checkpoints, made on the spot."""

import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined, so before the package is imported
    from tests.interpreter import spare_work

    spare_work()

from lit_qlora import cli
from lit_qlora.checkpoint.checkpoint import save_weights
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT
from lit_qlora.prompts.pieces import BOS, EOS, Piece
from lit_qlora.prompts.wordings import WORDINGS


def _is_text(piece: Piece) -> bool:
    return isinstance(piece, str) or piece == BOS or not piece.required


TEXT_STYLES = [
    name
    for name, wording in WORDINGS.items()
    if wording.end == EOS and all(map(_is_text, wording.prompt("a", "b", "c", True)))
]
"""Prompt styles that every tokenizer can write, because nothing in them but BOS and the last EOS has to be a token."""
ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)  # for models as small as these, more threads only wait for each other
FSYNC = os.fsync
os.fsync = os.fstat  # type: ignore[assignment] # what tests write need not outlive the machine; waiting takes minutes


def tiny_config(**changes: object) -> ModelConfig:
    """A Llama of two blocks with grouped queries; `changes` override its fields."""
    fields: dict = {
        "name": "test/tiny",
        "n_layer": 2,
        "n_embd": 64,
        "n_head": 4,
        "n_kv_head": 2,
        "head_size": 16,
        "ffn_size": 128,
        "vocab_size": 320,
        "block_size": 96,
    }
    return ModelConfig(**fields | changes)


def tiny_model(seed: int = 0, std: float = 0.1, **changes: object) -> GPT:
    """A random model of tiny_config, with norms that are not all one and weights that matter."""
    torch.manual_seed(seed)
    model = GPT(tiny_config(**changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=std)
    return model.eval()


def load_script(path: str | Path) -> ModuleType:
    """Import a script such as "scripts/merge_lora.py" as a module, without running it."""
    path = ROOT / path
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)  # as for a script that is started
        spec.loader.exec_module(module)
    return module


def run_here(path: str, *flags: object) -> "subprocess.CompletedProcess[str]":
    """What a script's command answers, in this process, which spares the seconds that its imports take."""
    said, complained = io.StringIO(), io.StringIO()
    status: Any = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(complained):
        patch.syspath_prepend((ROOT / path).parent)  # as for a script that is started
        main = load_script(path).main
        try:
            cli.run(main, get_type_hints(main)["config"], [str(flag) for flag in flags])
        except SystemExit as end:
            status = end.code
    return subprocess.CompletedProcess([path], status, said.getvalue(), complained.getvalue())


def write_tokenizer(directory: Path) -> None:
    """A SentencePiece tokenizer of 300 pieces, bytes included."""
    from sentencepiece import SentencePieceTrainer

    text = [f"Q: What is {a} plus {b}?\nA: {a + b}" for a in range(30) for b in range(30)]
    buffer = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=buffer,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    (directory / "tokenizer.model").write_bytes(buffer.getvalue())


def write_checkpoint(directory: Path, model: GPT) -> Path:
    """Save `model` as a checkpoint without a tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_weights(directory, model.config, weights, weights.items())
    return directory


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete checkpoint: random weights and a tokenizer. Read only."""
    directory = write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny", tiny_model())
    write_tokenizer(directory)
    return directory


def write_examples(directory: Path) -> Path:
    """Forty small sums as JSON lines in Alpaca columns."""
    path = directory / "train.jsonl"
    rows = [
        {"instruction": f"What is {a} plus {b}?", "input": "", "output": f"{a + b}"} for a in range(8) for b in range(5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def examples_file(tmp_path: Path) -> Path:
    """Examples that a test may change."""
    return write_examples(tmp_path)


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Nothing may connect to another machine."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: object) -> None:
        if self.family == socket.AF_INET and isinstance(address, tuple) and address[0].startswith("127."):
            connect(self, address)
            return
        if self.family in (socket.AF_INET, socket.AF_INET6):
            raise OSError(f"a test tried to reach {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        yield
