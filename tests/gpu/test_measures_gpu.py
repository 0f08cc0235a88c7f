"""What validations measure on a GPU, where the fast path trains: the plain path's metrics, and nothing disturbed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric

from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.data import read_data
from lit_qlora.evaluate.measures import Losses, kl_to_base, more_measures
from lit_qlora.evaluate.validation_inputs import read_probes
from lit_qlora.fused import fuse
from lit_qlora.lora.layer import add_lora
from lit_qlora.settings import DataConfig, EvalConfig, FinetuneConfig, LoRAConfig, Scheme
from tests.conftest import tiny_model, write_checkpoint, write_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("scheme", ["none", "bnb.nf4"])
def test_a_model_in_fast_training_is_measured_and_goes_on_as_before(
    tmp_path: Path, examples_file: Path, scheme: Scheme
) -> None:
    base = write_checkpoint(tmp_path / "base", tiny_model())
    write_tokenizer(base)
    config = FinetuneConfig(
        checkpoint_dir=base,
        data=DataConfig(path=str(examples_file), prompt="qa", val_fraction=0.2, cache_dir="none"),
        eval=EvalConfig(generate=4, max_new_tokens=20, kl_text=Path("default")),
    )
    data, fabric = read_data(config), Fabric(accelerator="cuda", devices=1)
    probes = read_probes(config, data)
    model = load_model(base, torch.bfloat16, "cuda", scheme)
    add_lora(model, LoRAConfig(targets="all", dropout=0.0))
    fuse(model).set_recompute(["none"] * model.config.n_layer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(std=0.05)
    model.train()

    def fast() -> torch.Tensor:
        return torch.stack([model.loss(*batch).detach() for batch in data.val_batches])

    before, state = fast(), torch.cuda.get_rng_state()
    metrics = Losses(fabric, model, data.val_batches)(0)
    for measure in more_measures(fabric, model, data, probes, config.eval.answers, lambda *given: None):
        metrics |= measure(0)
    labelled = sum(int((batch.labels >= 0).sum()) for batch in data.val_batches)
    assert metrics["val_loss"] == pytest.approx(float(before.sum()) / labelled, rel=2e-2)
    assert {"chrf", "bleu", "exact_match", "rouge_l", "kl_to_base"} <= set(metrics)
    assert metrics["kl_to_base"] > 1e-4
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert model.training
    torch.testing.assert_close(fast(), before, rtol=1e-3, atol=1e-3)
    repeated = replace(config, eval=EvalConfig(kl_text=Path("default")))
    assert kl_to_base(fabric, model, read_probes(repeated, data).text[:96]) == metrics["kl_to_base"]
