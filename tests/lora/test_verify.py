"""What merging does to a model is measured on samples as the training saw them, and too much of it is refused."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from lit_qlora.checkpoint.checkpoint import content_hash, load_model
from lit_qlora.errors import DataError, NumericalError
from lit_qlora.lora.adapter import read_adapter, save_adapter
from lit_qlora.lora.layer import add_lora
from lit_qlora.lora.merge import Merge
from lit_qlora.lora.verify import check_tolerance, read_batches, recommend, verify
from lit_qlora.model.gpt import IGNORE
from lit_qlora.prompts.style import STYLES
from lit_qlora.settings import LoRAConfig
from tests.conftest import run_here, tiny_model, write_checkpoint, write_tokenizer
from tests.lora.test_adapter import trained


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter trained on its 4-bit weights, and samples."""
    directory = tmp_path_factory.mktemp("run")
    base = write_checkpoint(directory / "base", tiny_model(std=0.15))
    write_tokenizer(base)
    config = LoRAConfig(targets=("all",))
    facts = {
        "base": {"name": "x", "path": str(base), "sha256": content_hash(base)},
        "quantize": "bnb.nf4",
        "quantize_head": False,
        "precision": "32-true",
    }
    model = trained(load_model(base, quantize="bnb.nf4"), config)
    save_adapter(directory / "final", model, config, STYLES["qa"], facts)
    rows = [{"instruction": f"What is {i} plus {i}?", "output": f"{2 * i}"} for i in range(9)]
    (directory / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def merges(run_dir: Path) -> list[Merge]:
    adapter = read_adapter(run_dir / "final")
    return [Merge([adapter], run_dir / "base", base) for base in ("original", "quantized")]


def test_samples_are_those_of_the_training(run_dir):
    adapter = read_adapter(run_dir / "final")
    batches = read_batches(str(run_dir / "val.jsonl"), adapter, run_dir / "base", 5, 2)
    assert [len(batch.tokens) for batch in batches] == [2, 2, 1]
    labelled = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
    assert 5 * 2 <= labelled <= 5 * 4  # a number and the end
    (run_dir / "empty.jsonl").write_text("")
    with pytest.raises(DataError):
        read_batches(str(run_dir / "empty.jsonl"), adapter, run_dir / "base", None, 2)


def test_figures_are_what_their_names_say(run_dir):
    found = merges(run_dir)
    batches = read_batches(str(run_dir / "val.jsonl"), found[0].adapters[0], run_dir / "base", None, 4)
    figures = verify(found, batches)
    model = load_model(run_dir / "base", quantize="bnb.nf4")
    found[0].attach_to(model)
    for merge in found:
        merge.write(run_dir / merge.base)
        merged = load_model(run_dir / merge.base).eval()
        rows = []
        with torch.no_grad():
            for batch in batches:
                p, q = (
                    m(batch.tokens).double().log_softmax(-1)[batch.labels != IGNORE] for m in (model.eval(), merged)
                )
                rows += [
                    (*pair, label) for *pair, label in zip(p, q, batch.labels[batch.labels != IGNORE], strict=True)
                ]
        expected = {
            "val_loss_trained": -sum(float(p[label]) for p, _, label in rows) / len(rows),
            "val_loss": -sum(float(q[label]) for _, q, label in rows) / len(rows),
            "kl": sum(float((p.exp() * (p - q)).sum()) for p, q, _ in rows) / len(rows),
            "top1": sum(int(p.argmax() == q.argmax()) for p, q, _ in rows) / len(rows),
            "tokens": len(rows),
        }
        assert figures[merge.base] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert figures["quantized"]["kl"] < 1e-6 < 1e-4 < figures["original"]["kl"]
    assert figures["quantized"]["top1"] == 1


def test_the_lower_loss_is_recommended_and_a_higher_one_refused():
    def row(loss: float) -> dict[str, float]:
        return {"val_loss_trained": 1.0, "val_loss": loss}

    figures = {"original": row(1.2), "quantized": row(1.01)}
    assert recommend(figures) == "quantized"
    check_tolerance("quantized", figures, 0.02)
    with pytest.raises(NumericalError, match=r"1.2000 instead of 1.0000: \+0.2000(.|\n)*--base quantized it is 1.0100"):
        check_tolerance("original", figures, 0.1)
    with pytest.raises(NumericalError):
        check_tolerance("original", {"original": row(float("nan"))}, 0.1)
    check_tolerance("original", {"original": row(0.5)}, 0.0)  # better is not worse


run = partial(run_here, "scripts/merge_lora.py")


def test_the_command_measures_reports_and_refuses(run_dir):
    flags = ("--lora_path", run_dir / "final", "--out_dir", run_dir / "merged", "--verify", run_dir / "val.jsonl")
    done = run(*flags, "--tolerance", 5)
    assert done.returncode == 0, done.stderr
    report = json.loads((run_dir / "merged/merge_report.json").read_text())
    assert report["verified_on"] == str(run_dir / "val.jsonl")
    assert set(report["verified"]) == {"original", "quantized"}
    assert report["recommended"] in report["verified"]
    assert f"recommended: --base {report['recommended']}" in done.stdout
    assert report["onto"] == report["recommended"]
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (run_dir / "merged").iterdir())
    rise = {base: row["val_loss"] - row["val_loss_trained"] for base, row in report["verified"].items()}
    worse = max(rise, key=lambda base: rise[base])
    assert rise[worse] > 1e-3  # so that there is something to refuse
    assert report["onto"] != worse
    done = run(*flags, "--base", worse, "--tolerance", rise[worse] / 2)
    assert done.returncode == NumericalError.status
    assert "Nothing was written" in done.stderr
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (run_dir / "merged").iterdir()) == before
    assert run(*flags, "--base", worse, "--tolerance", 5).returncode == 0
    assert json.loads((run_dir / "merged/merge_report.json").read_text())["onto"] == worse


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--weights", "[1,2]"), "2 numbers for 1 adapters"),
        (("--weights", "0"), "not 0"),
        (("--tolerance", "-1"), "not negative"),
        (("--lora_path", "[]"), "Name at least one adapter"),
        (("--verify_samples", "0"), "verify_samples"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(run_dir, flags, why):
    done = run("--lora_path", run_dir / "nowhere", *flags)
    assert done.returncode == 2
    assert why in done.stderr


def test_several_adapters_are_merged_by_the_command(run_dir):
    paths = f"[{run_dir / 'final'},{run_dir / 'final'}]"
    done = run("--lora_path", paths, "--weights", "[0.25,0.75]", "--out_dir", run_dir / "twice")
    assert done.returncode == 0, done.stderr
    merge = Merge([read_adapter(run_dir / "final")], run_dir / "base")
    merge.write(run_dir / "once")
    once, twice = (load_model(run_dir / name).state_dict() for name in ("once", "twice"))
    assert all(torch.allclose(once[name], twice[name], rtol=1e-5, atol=1e-6) for name in once)


def test_an_adapter_is_refused_on_another_base(run_dir, tmp_path):
    other = write_checkpoint(tmp_path / "other", tiny_model(seed=5))
    done = run("--lora_path", run_dir / "final", "--checkpoint_dir", other, "--out_dir", tmp_path / "out")
    assert done.returncode == 4
    assert "holds other weights" in done.stderr
    assert not (tmp_path / "out").exists()


def test_attaching_an_adapter_twice_as_strong_doubles_its_update(run_dir):
    adapter = read_adapter(run_dir / "final")
    model = load_model(run_dir / "base")
    add_lora(model, adapter.config)
    scale = model.get_submodule("blocks.0.attn.query").scale
    strong = load_model(run_dir / "base")
    Merge([adapter], run_dir / "base", weights=[2.0]).attach_to(strong)
    assert strong.get_submodule("blocks.0.attn.query").scale == 2 * scale
