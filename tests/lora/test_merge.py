"""The merged checkpoint computes what the adapter computed, for each target and each family."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_qlora.checkpoint.checkpoint import content_hash, load_model
from lit_qlora.convert.from_hugging_face import convert_hf_checkpoint
from lit_qlora.errors import CheckpointError, UsageError
from lit_qlora.files import atomic
from lit_qlora.lora import merge as merging
from lit_qlora.lora.adapter import our_tensors, read_adapter
from lit_qlora.lora.layer import add_lora, lora_state
from lit_qlora.lora.merge import Merge, merge, merge_checkpoint
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT
from lit_qlora.quantize import bitsandbytes, quantize_linears
from lit_qlora.settings import SCHEMES, LoRAConfig, Quantization, Scheme, Target
from tests.conftest import load_script, run_here, tiny_model, write_checkpoint, write_tokenizer
from tests.lora.test_adapter import FAMILIES, TARGETS, TOKENS, combined, save, trained
from tests.model.test_gpt import hugging_face_model


@pytest.mark.parametrize("targets", TARGETS, ids=",".join)
def test_merging_is_adding_the_scaled_product(targets: tuple[Target, ...]) -> None:
    model = tiny_model()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = trained(model, LoRAConfig(r=4, alpha=32, targets=targets))
    plain = GPT(model.config).eval()
    plain.load_state_dict(merge(base, lora_state(adapted), scale=32 / 4), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(plain(TOKENS), adapted(TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "targets"), combined([*FAMILIES, "llama-tied"], ["llama-gqa", "gpt_neox"]))
def test_the_merged_checkpoint_computes_what_the_adapter_computed(
    family: str, targets: tuple[Target, ...], tmp_path: Path
) -> None:
    hugging_face_model(tmp_path / "base", family)
    convert_hf_checkpoint(tmp_path / "base", tmp_path / "base")
    config = LoRAConfig(r=4, alpha=12, targets=targets)
    model = trained(load_model(tmp_path / "base"), config)
    save(tmp_path / "final", model, config, tmp_path / "base")
    merge_checkpoint(read_adapter(tmp_path / "final"), tmp_path / "base", tmp_path / "merged")
    with torch.no_grad():
        expected, before = model(TOKENS), load_model(tmp_path / "base")(TOKENS)
        actual = load_model(tmp_path / "merged").eval()(TOKENS)
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_an_adapter_on_a_tied_head_gives_the_merged_model_a_head_of_its_own(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", tiny_model(tied_head=True))
    config = LoRAConfig(targets=("head",))
    save(tmp_path / "final", trained(load_model(base), config), config, base)
    merge_checkpoint(read_adapter(tmp_path / "final"), base, tmp_path / "merged")
    assert not ModelConfig.load(tmp_path / "merged").tied_head
    merged = load_model(tmp_path / "merged")
    assert torch.equal(merged.embed.weight, load_model(base).embed.weight)
    assert not torch.equal(merged.head.weight, merged.embed.weight)


MIXED = Quantization("bnb.nf4", False, (("blocks.0.*", "bnb.int8"), ("projection", "none")))


@pytest.mark.parametrize("storage", [*map(Quantization, SCHEMES), MIXED], ids=Quantization.describe)
def test_merging_onto_the_quantised_base_is_exactly_what_was_trained(storage: Quantization, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", tiny_model())
    config = LoRAConfig(targets=("all",))
    model = load_model(base, **storage.facts())
    trained(model, config)
    save(tmp_path / "final", model, config, base, **storage.facts(), precision="32-true")
    merge_checkpoint(read_adapter(tmp_path / "final"), base, tmp_path / "merged", base="quantized")
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "merged").eval()(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)


def test_small_updates_are_added_in_float32() -> None:
    """Rounded to bf16 first, each of these updates would be another number."""
    weight = torch.full((4, 4), 1.0, dtype=torch.bfloat16)
    a, b = torch.full((1, 4), 0.0101), torch.full((4, 1), 0.5)
    merged = merge({"l.weight": weight}, {"l.lora_a": a, "l.lora_b": b}, scale=1.0)["l.weight"]
    assert torch.equal(merged, (weight.float() + b @ a).bfloat16())


def test_an_adapter_for_another_model_is_refused() -> None:
    adapter = {"blocks.9.attn.query.lora_a": torch.ones(1, 4), "blocks.9.attn.query.lora_b": torch.ones(4, 1)}
    with pytest.raises(CheckpointError, match=r"base model has no blocks.9.attn.query.weight"):
        merge({}, adapter, 1.0)
    with pytest.raises(CheckpointError, match=r"fits a weight of shape \(4, 4\), the base has \(2, 2\)"):
        merge({"blocks.9.attn.query.weight": torch.ones(2, 2)}, adapter, 1.0)


def test_a_fresh_adapter_is_refused(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", tiny_model())
    model = load_model(base)
    add_lora(model, LoRAConfig())
    save(tmp_path / "final", model, LoRAConfig(), base)
    with pytest.raises(CheckpointError, match="never trained"):
        merge_checkpoint(read_adapter(tmp_path / "final"), base, tmp_path / "merged")


def test_the_command_needs_no_bitsandbytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_checkpoint(tmp_path / "base", tiny_model())
    write_tokenizer(base)
    model = load_model(base)
    quantize_linears(model, "bnb.nf4")
    save(tmp_path / "final", trained(model, LoRAConfig()), LoRAConfig(), base, quantize="bnb.nf4")
    bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    done = run_here("scripts/merge_lora.py", "--lora_path", tmp_path / "final", "--checkpoint_dir", base)
    assert done.returncode == 0, done.stderr
    with pytest.raises(ImportError):
        bitsandbytes()
    report = json.loads((tmp_path / "merged/merge_report.json").read_text())
    assert len(report["layers"]) == 4
    assert all(0 < row["update"] < 10 for row in report["layers"].values())
    assert (tmp_path / "merged/tokenizer.model").is_file()
    load_model(tmp_path / "merged")


PEAK = """
import sys, threading
from pathlib import Path
from lit_qlora.lora.adapter import our_tensors, read_adapter
from lit_qlora.lora.merge import Merge
import torch
torch.set_num_threads(1)

def anonymous():
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows["RssAnon"].split()[0]) * 1024

final, base, out = map(Path, sys.argv[1:4])
merge = Merge([read_adapter(final)], base)
merge.read("blocks.0.norm_1.weight")  # whatever is loaded on first use
torch.ones(64, 64) @ torch.ones(64, 64)
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
merge.write(out)
done.set()
watcher.join()
print((peak - before) / max(tensor.numel() * tensor.element_size() for tensor in merge.specs.values()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads its memory from /proc")
def test_a_merge_holds_two_of_the_largest_tensors(tmp_path: Path) -> None:
    wide = tiny_model(n_layer=3, n_embd=1024, ffn_size=24576, vocab_size=320).half()
    base = write_checkpoint(tmp_path / "base", wide)  # the largest tensors have 48 MiB
    config = LoRAConfig(targets=("mlp",))
    save(tmp_path / "final", trained(wide, config), config, base)
    command = [sys.executable, "-c", PEAK, *map(str, (tmp_path / "final", base, tmp_path / "merged"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2.3


def two_adapters(tmp_path: Path) -> tuple[Path, list[Path]]:
    """A base, and two adapters of other ranks and layers on it."""
    base = write_checkpoint(tmp_path / "base", tiny_model())
    paths = []
    for name, config in {
        "a": LoRAConfig(r=4, alpha=12, targets=("query", "value")),
        "b": LoRAConfig(r=2, alpha=8, targets=("value", "mlp"), rslora=True),
    }.items():
        save(tmp_path / name, trained(load_model(base), config), config, base, quantize="none")
        paths.append(tmp_path / name)
    return base, paths


def test_several_adapters_are_added_with_their_weights(tmp_path: Path) -> None:
    base, paths = two_adapters(tmp_path)
    weights = (0.7, -0.3)
    adapters = [read_adapter(path) for path in paths]
    several = Merge(adapters, base, weights=weights)
    report = several.write(tmp_path / "merged")
    assert [part["weight"] for part in report["adapters"]] == [0.7, -0.3]
    merged, before = load_model(tmp_path / "merged"), load_model(base)
    for name, parameter in merged.named_parameters():
        layer = name.removesuffix(".weight")
        expected = before.get_parameter(name).clone()
        for adapter, weight in zip(adapters, weights, strict=True):
            state = our_tensors(adapter, merged.config)
            if f"{layer}.lora_a" in state:
                update = state[f"{layer}.lora_b"] @ state[f"{layer}.lora_a"]
                expected += weight * adapter.config.scale(layer) * update
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)
    beside = load_model(base)
    several.attach_to(beside)
    with torch.no_grad():
        torch.testing.assert_close(beside.eval()(TOKENS), merged.eval()(TOKENS), rtol=1e-4, atol=1e-4)


def test_what_was_merged_can_be_taken_out_again(tmp_path: Path) -> None:
    base, (a, b) = two_adapters(tmp_path)
    merge_checkpoint(read_adapter(a), base, tmp_path / "merged")
    Merge([read_adapter(a)], tmp_path / "merged", weights=[-1.0]).write(tmp_path / "back")
    back, before = load_model(tmp_path / "back"), load_model(base)
    for name, parameter in before.named_parameters():
        torch.testing.assert_close(back.get_parameter(name), parameter, rtol=0, atol=1e-6)
    for adapter, weight in ((b, -1.0), (a, 1.0)):  # never merged into it; merged already
        with pytest.raises(CheckpointError, match="was trained on"):
            Merge([read_adapter(adapter)], tmp_path / "merged", weights=[weight])


def test_a_model_in_memory_becomes_what_the_merge_writes(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", tiny_model(tied_head=True).bfloat16())
    config = LoRAConfig(targets=("all", "head"))
    model = load_model(base, quantize="bnb.nf4")
    save(tmp_path / "final", trained(model, config), config, base, quantize="bnb.nf4", precision="32-true")
    in_memory = load_model(base)
    for kind in ("original", "quantized"):
        merge = Merge([read_adapter(tmp_path / "final")], base, kind)
        merge.put_into(in_memory)
        merge.write(tmp_path / kind)
        written = load_model(tmp_path / kind).state_dict()
        assert all(torch.equal(tensor, written[name]) for name, tensor in in_memory.state_dict().items())


def test_nothing_but_an_earlier_merge_is_replaced(tmp_path: Path) -> None:
    base, (a, b) = two_adapters(tmp_path)
    for adapter in (a, b):
        report = merge_checkpoint(read_adapter(adapter), base, tmp_path / "merged")
    assert json.loads((tmp_path / "merged/merge_report.json").read_text()) == report
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    for other in (tmp_path / "mine", base, a):
        with pytest.raises(UsageError, match="holds something else"):
            merge_checkpoint(read_adapter(a), base, other)
    assert (tmp_path / "mine/thesis.tex").is_file()


def test_a_merge_never_replaces_the_checkpoint_that_it_is_made_from(tmp_path: Path) -> None:
    base, (a, _) = two_adapters(tmp_path)
    merged = a.parent / "merged"  # where the command writes to by itself
    merge_checkpoint(read_adapter(a), base, merged)
    before = content_hash(merged)
    script = load_script("scripts/merge_lora.py")
    with pytest.raises(UsageError, match="is the base itself"):
        script.main(script.MergeConfig(lora_path=a, checkpoint_dir=merged, weights=-1.0))
    assert content_hash(merged) == before


@pytest.mark.parametrize("point", ["weights", "report", "publish"])
def test_a_merge_that_is_killed_leaves_what_was_there(point: str, tmp_path: Path) -> None:
    base, (a, b) = two_adapters(tmp_path)
    before = merge_checkpoint(read_adapter(a), base, tmp_path / "merged")
    owner, name = {"weights": (Merge, "read"), "report": (merging, "_digest"), "publish": (atomic, "publish")}[point]
    child = os.fork()
    if child == 0:
        setattr(owner, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        merge_checkpoint(read_adapter(b), base, tmp_path / "merged")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert json.loads((tmp_path / "merged/merge_report.json").read_text()) == before
    assert content_hash(tmp_path / "merged") == before["sha256"]
    after = merge_checkpoint(read_adapter(b), base, tmp_path / "merged")
    assert content_hash(tmp_path / "merged") == after["sha256"] != before["sha256"]
    assert not list(tmp_path.glob("merged.tmp-*"))


def test_an_adapter_that_does_not_say_how_it_was_trained_is_merged_onto_the_original_alone(tmp_path: Path) -> None:
    base, (a, _) = two_adapters(tmp_path)
    (a / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="does not say how its base was quantised"):
        Merge([read_adapter(a)], base, "quantized")


def test_adapters_of_other_quantisation_are_added_onto_the_original_alone(tmp_path: Path) -> None:
    base, (a, _) = two_adapters(tmp_path)
    config = LoRAConfig()
    save(tmp_path / "c", trained(load_model(base), config), config, base, quantize="bnb.nf4")
    adapters = [read_adapter(a), read_adapter(tmp_path / "c")]
    Merge(adapters, base)
    with pytest.raises(CheckpointError, match="different quantisation"):
        Merge(adapters, base, "quantized")


def test_an_adapter_that_replaces_weights_is_neither_weighed_nor_added(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", tiny_model())
    for i, config in enumerate((LoRAConfig(dora=True), LoRAConfig(train_tokens=(3,)))):
        save(tmp_path / f"{i}", trained(load_model(base), config), config, base)
    one, other = (read_adapter(tmp_path / f"{i}") for i in range(2))
    for adapters, weights in (([one, other], [1.0, 1.0]), ([one], [-1.0]), ([other], [0.5])):
        with pytest.raises(UsageError, match="can be merged alone and with weight 1 only"):
            Merge(adapters, base, weights=weights)


@pytest.mark.parametrize("scheme", ["none", "bnb.nf4"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("settings", [{"dora": True}, {"train_tokens": (3, 5)}, {"train_embeddings": True}], ids=str)
def test_variants_merged_onto_the_quantised_base_are_exactly_what_was_trained(
    settings: dict, tied: bool, scheme: Scheme, tmp_path: Path
) -> None:
    base = write_checkpoint(tmp_path / "base", tiny_model(tied_head=tied))
    config = LoRAConfig(targets="all", **settings)
    model = trained(load_model(base, quantize=scheme, quantize_head=True), config)
    save(tmp_path / "final", model, config, base, quantize=scheme, quantize_head=True, precision="32-true")
    merge_checkpoint(read_adapter(tmp_path / "final"), base, tmp_path / "merged", base="quantized")
    with torch.no_grad():
        merged = load_model(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)
