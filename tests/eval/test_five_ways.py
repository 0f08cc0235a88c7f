"""Five models of one adapter: each is what its name says, and differences have intervals that are right."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_qlora.checkpoint.checkpoint import content_hash, load_model
from lit_qlora.inference import InferenceConfig, load_for_inference
from lit_qlora.lora.adapter import read_adapter, save_adapter
from lit_qlora.lora.merge import merge_checkpoint
from lit_qlora.prompts.style import STYLES
from lit_qlora.settings import LoRAConfig, Quantization
from tests.conftest import ROOT, load_script, run_here, tiny_model, write_checkpoint, write_tokenizer
from tests.lora.test_adapter import TOKENS, trained

tasks = load_script("eval/lm_eval_tasks.py")
harness = load_script("eval/lm_eval_harness.py")
five_ways = load_script("eval/five_ways.py")

QUIZ = """\
task: quiz
dataset_path: json
dataset_kwargs: {data_files: {test: quiz.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in bf16, an adapter trained on its 4-bit weights, and a task."""
    directory = tmp_path_factory.mktemp("run")
    base = write_checkpoint(directory / "base", tiny_model(std=0.15).bfloat16())
    write_tokenizer(base)
    config = LoRAConfig(targets=("all",))
    facts = {"base": {"name": "x", "sha256": content_hash(base)}, "quantize": "bnb.nf4", "quantize_head": True}
    model = trained(load_model(base, quantize="bnb.nf4", quantize_head=True), config)
    save_adapter(directory / "final", model, config, STYLES["qa"], facts)
    (directory / "tasks").mkdir()
    (directory / "tasks/quiz.yaml").write_text(QUIZ)
    rows = [{"question": f"What is {i}?", "choices": ["1", "22", "333", "4"], "answer": i % 4} for i in range(24)]
    (directory / "tasks/quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_each_model_is_what_its_name_says(run_dir):
    adapter, base = read_adapter(run_dir / "final"), run_dir / "base"
    merge_checkpoint(adapter, base, run_dir / "merged")
    quantized = {"quantize": "bnb.nf4", "quantize_head": True, "precision": "32-true"}
    expected = {
        "base": load_for_inference(base, precision="32-true"),
        "quantized": load_for_inference(base, **quantized),
        "adapted": load_for_inference(base, run_dir / "final", **quantized),
        "merged": load_for_inference(run_dir / "merged", precision="32-true"),
        "requantized": load_for_inference(run_dir / "merged", **quantized),
    }
    config = InferenceConfig(checkpoint_dir=base, precision="32-true")
    seen = {}
    with torch.no_grad():
        for name, loaded in five_ways.models(config, adapter, Quantization(quantize="bnb.nf4", quantize_head=True)):
            seen[name] = loaded.model(TOKENS)
        for name, loaded in expected.items():
            torch.testing.assert_close(seen[name], loaded.model(TOKENS), rtol=1e-6, atol=1e-6)
    assert seen.keys() == expected.keys()
    assert len({float(logits.sum()) for logits in seen.values()}) == 5


def test_an_interval_is_that_of_drawing_questions_again():
    draw = np.random.default_rng(0)
    differences = draw.choice([-1.0, 0.0, 1.0], p=[0.1, 0.6, 0.3], size=200)
    low, high = five_ways.interval(differences, seed=1)
    means = [draw.choice(differences, size=200).mean() for _ in range(4000)]
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.01)
    # and it holds the truth as often as it says
    hits = 0
    for seed in range(200):
        low, high = five_ways.interval(draw.choice([0.0, 1.0], p=[0.7, 0.3], size=100), seed)
        hits += low <= 0.3 <= high
    assert 180 <= hits <= 198
    assert five_ways.interval(np.zeros(5), seed=1) == (0.0, 0.0)


def samples(scores: list[float], metric: str = "acc") -> list[dict]:
    return [{"doc_id": i, "metrics": [metric], metric: score} for i, score in enumerate(scores)]


def test_questions_are_paired_by_their_number_and_effects_have_their_signs():
    by_model = {
        "base": samples([1, 1, 0, 0]),
        "quantized": samples([1, 0, 0, 0])[::-1],
        "adapted": samples([1, 1, 1, 1]),
        "merged": samples([1, 1, 1, 0]),
        "requantized": samples([0, 1, 1, 0]),
    }
    found = five_ways.compare_task(by_model, seed=0)
    assert found["questions"] == 4
    differences = {name: effect["difference"] for name, effect in found["effects"].items()}
    assert differences == {
        "quantising cost": -0.25,
        "training gained": 0.75,
        "merging lost": -0.25,
        "merging and quantising again lost": -0.5,
    }
    assert all(x["low"] <= x["difference"] <= x["high"] for x in found["effects"].values())
    assert five_ways.compare_task({name: samples([(1.0, 2)]) for name in by_model}, seed=0) is None


def test_the_command_prints_one_table_and_keeps_everything(run_dir, monkeypatch):
    out = run_dir / "compare.json"
    flags = ["--checkpoint_dir", "base", "--lora_path", "final", "--include_path", "tasks", "--eval_tasks", "[quiz]"]
    command = [sys.executable, ROOT / "eval/lm_eval_harness.py", "--compare", "--save_filepath", out, *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=run_dir, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [line.split("|")[2].strip() for line in lines[2:]] == [
        *("base, float32", "base, nf4", "base, nf4 + adapter", "merged, float32", "merged, nf4")
    ]
    assert "quiz (acc, 24)" in lines[2]
    assert "~ within noise of chance" in done.stdout
    found = json.loads(out.read_text())
    assert set(found["comparison"]["quiz"]["effects"]) == set(five_ways.EFFECTS)
    for name, score in found["comparison"]["quiz"]["scores"].items():
        assert found["models"][name]["results"]["quiz"]["acc,none"] == pytest.approx(score)
    monkeypatch.chdir(run_dir)
    again = run_here("eval/lm_eval_harness.py", *command[2:])
    assert again.returncode == 0  # its own results may be replaced
    assert again.stdout == done.stdout


def test_a_comparison_needs_an_adapter_and_a_way_to_quantise(run_dir):
    command = ["eval/lm_eval_harness.py", "--compare"]
    done = run_here(*command)
    assert done.returncode == 2
    assert "compare needs an adapter" in done.stderr
    (run_dir / "plain").mkdir()
    config = LoRAConfig()
    facts = {"base": {"name": "x", "sha256": content_hash(run_dir / "base")}, "quantize": "none"}
    save_adapter(run_dir / "plain/final", trained(load_model(run_dir / "base"), config), config, None, facts)
    flags = ["--checkpoint_dir", run_dir / "base", "--lora_path", run_dir / "plain/final", "--include_path"]
    done = run_here(*command, *flags, run_dir / "tasks", "--eval_tasks", "quiz")
    assert done.returncode == 2
    assert "Say --quantize" in done.stderr
