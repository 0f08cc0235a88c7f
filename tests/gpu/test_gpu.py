"""What only a CUDA device can show: its quantisation is the CPU's, and the path to a trained adapter works on it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.inference import load_for_inference
from lit_qlora.lora.layer import add_lora, lora_state
from lit_qlora.quantize import QuantizedLinear
from lit_qlora.settings import SCHEMES, DataConfig, FinetuneConfig, LoRAConfig, Precision, Scheme, TrainConfig
from tests.conftest import load_script, tiny_config, tiny_model, write_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
QUANTIZED = [scheme for scheme in SCHEMES if scheme != "none"]
SHAPES = [(64, 64), (7, 13), (33, 96), (4096, 4096), (11008, 4096), (1024, 14336)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_quantised_weights_are_those_of_bitsandbytes(
    scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    import bitsandbytes.functional as functional

    weight = torch.randn(shape, dtype=dtype, device="cuda")
    layer = QuantizedLinear(weight, None, scheme)
    if scheme == "bnb.int8":
        assert torch.equal(layer.packed.cpu(), QuantizedLinear(weight.cpu(), None, scheme).packed)
        return
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type=scheme[4:7], compress_statistics=scheme.endswith("-dq")
    )
    assert torch.equal(layer.packed, packed)
    assert torch.equal(layer.dequantize(), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_gpu_computes_the_gradients_of_the_cpu(scheme: Scheme, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path, tiny_model())
    tokens = torch.randint(0, 320, (2, 9))
    gradients = []
    for device in ("cpu", "cuda"):
        model = load_model(base, torch.float32, device, scheme)
        torch.manual_seed(0)
        add_lora(model, LoRAConfig(dropout=0.0, targets="all"))
        for name, tensor in lora_state(model).items():
            generator = torch.Generator().manual_seed(len(name))
            tensor.copy_(0.05 * torch.randn(tensor.shape, generator=generator))
        model.loss(tokens[:, :-1].to(device), tokens[:, 1:].to(device)).backward()
        gradients.append({n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None})
    for name in gradients[0]:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], rtol=2e-2, atol=2e-2)


def test_loading_never_holds_more_than_the_quantised_model_and_a_layer(tmp_path: Path) -> None:
    config: dict[str, Any] = {"n_layer": 8, "n_embd": 1024, "head_size": 256, "ffn_size": 8192, "vocab_size": 512}
    base = write_checkpoint(tmp_path, tiny_model(**config))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load_model(base, torch.bfloat16, "cuda", "bnb.nf4")
    kept, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    largest = 8192 * 1024 * 4  # read as float32, then rounded to bf16
    assert peak <= kept + 2 * largest
    assert kept < 0.6 * sum(p.numel() for p in tiny_model(**config).parameters())
    del model


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-true", "16-mixed", "32-true"])
@pytest.mark.parametrize("scheme", ["none", "bnb.nf4-dq", "bnb.int8"])
def test_the_recipe_learns_in_every_precision(
    scheme: Scheme, precision: Precision, tiny_checkpoint: Path, examples_file: Path, tmp_path: Path
) -> None:
    script = load_script("finetune/lora.py")
    config = FinetuneConfig(
        checkpoint_dir=tiny_checkpoint,
        out_dir=tmp_path / "out",
        quantize=scheme,
        precision=precision,
        lora=LoRAConfig(targets="all"),
        data=DataConfig(path=str(examples_file), prompt="qa"),
        train=TrainConfig(learning_rate=3e-3, batch_size=8),
    )
    script.main(config)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["val_loss"] < 0.8 * summary["val_loss_before"]
    loaded = load_for_inference(tiny_checkpoint, tmp_path / "out/final", quantize=scheme)
    assert next(loaded.model.parameters()).is_cuda
    assert loaded.model.config == tiny_config()
