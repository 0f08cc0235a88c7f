"""model.py means what transformers means, whole and token by token."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.convert.from_hugging_face import convert_hf_checkpoint
from lit_qlora.model.gpt import GPT, IGNORE, KVCache, linear_cross_entropy
from tests.conftest import tiny_config, tiny_model
from tests.reference import CASES, GROWING, hugging_face_model

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("case", CASES)
def test_same_logits_as_hugging_face(case: str, tmp_path: Path) -> None:
    theirs = hugging_face_model(tmp_path, case)
    convert_hf_checkpoint(tmp_path, tmp_path / "ours")
    ours = load_model(tmp_path / "ours").eval()
    tokens = torch.randint(0, 96, (2, 23))
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens), expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
        if ours.config.rope_scaling in GROWING:
            expected = theirs_token_by_token(theirs, tokens)
        torch.testing.assert_close(token_by_token(ours, tokens), expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


FULL = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("cohere2", FULL),
        ("cohere2_moe", FULL),
        ("exaone4", FULL),
    ],
)
def test_blocks_rotate_as_in_hugging_face_if_none_has_a_window(
    case: str, change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, settings = CASES[case]
    monkeypatch.setitem(CASES, case, (family, {**settings, **change}))
    theirs = hugging_face_model(tmp_path, case)
    convert_hf_checkpoint(tmp_path, tmp_path / "ours")
    tokens = torch.randint(0, 96, (1, 9))
    with torch.no_grad():
        expected = theirs(tokens).logits
        actual = load_model(tmp_path / "ours")(tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


def theirs_token_by_token(model: Any, tokens: Tensor, first: int = 5) -> Tensor:
    """token_by_token in transformers, where the rotations of a longer text must be those of a longer text."""
    # The argument's name before 5.24 and since.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache, parts = {name: transformers.DynamicCache()}, []
    for start, end in [(0, first), *((i, i + 1) for i in range(first, tokens.size(1)))]:
        parts.append(model(tokens[:, start:end], **cache, use_cache=True).logits)
    return torch.cat(parts, dim=1)


def token_by_token(model: GPT, tokens: Tensor, first: int = 5) -> Tensor:
    """Logits of `tokens`, the first few at once and the rest one by one through a KV cache."""
    cache = KVCache(model.config, tokens.size(0), tokens.size(1), torch.float32)
    parts = [model(tokens[:, :first], cache)]
    parts += [model(tokens[:, i : i + 1], cache) for i in range(first, tokens.size(1))]
    return torch.cat(parts, dim=1)


def test_the_settings_of_old_config_files_are_read_too(tmp_path: Path) -> None:
    theirs = hugging_face_model(tmp_path, "gpt_neox")
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rotary_pct": rope["partial_rotary_factor"], "rotary_emb_base": rope["rope_theta"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    convert_hf_checkpoint(tmp_path, tmp_path / "ours")
    tokens = torch.randint(0, 96, (1, 9))
    with torch.no_grad():
        expected = theirs(tokens).logits
        actual = load_model(tmp_path / "ours")(tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


def test_left_padding_changes_nothing() -> None:
    model = tiny_model()
    long, short = torch.randint(0, 320, (1, 9)), torch.randint(0, 320, (1, 4))
    batch = torch.cat([long, torch.cat([torch.zeros(1, 5, dtype=torch.long), short], dim=1)])
    cache = KVCache(model.config, 2, 12, torch.float32, left_pad=torch.tensor([0, 5]))
    following = torch.randint(0, 320, (2, 3))
    with torch.no_grad():
        together = torch.cat([model(batch, cache), model(following, cache)], dim=1)
        alone = model(torch.cat([short, following[1:]], dim=1))
    torch.testing.assert_close(together[1:, 5:], alone)


def test_a_full_cache_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="holds 4 tokens; 0 \\+ 5 do not fit"):
        model(torch.zeros(1, 5, dtype=torch.long), KVCache(model.config, 1, 4, torch.float32))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("at_once", [1, 320 * 3, 320 * 7, 2**26])
def test_loss_is_the_cross_entropy_however_it_is_sliced(at_once: int, weighted: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 7, 16, requires_grad=True)
    head = torch.nn.Linear(16, 320)
    labels = head(hidden).argmax(dim=-1)
    labels[1] = torch.randint(0, 320, (7,))
    labels[0, :3] = IGNORE
    weights = torch.rand(2, 7) if weighted else None
    each = torch.nn.functional.cross_entropy(
        head(hidden).flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
    )
    expected = (each if weights is None else each * weights.flatten()).sum()
    hits = torch.zeros((), dtype=torch.int64)
    actual = linear_cross_entropy(hidden, head, labels, weights, at_once=at_once, hits=hits)
    torch.testing.assert_close(actual, expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, [hidden, head.weight]),
        torch.autograd.grad(expected, [hidden, head.weight]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    assert hits == (head(hidden).argmax(dim=-1) == labels).sum()


def test_loss_without_labels_is_zero() -> None:
    tokens = torch.zeros(1, 4, dtype=torch.long)
    assert tiny_model().loss(tokens, torch.full_like(tokens, IGNORE)) == 0


def test_recomputing_activations_leaves_the_gradients_bit_equal() -> None:
    model, tokens = tiny_model().train(), torch.randint(0, 320, (2, 9))

    def gradients(recompute: bool) -> list[Tensor]:
        model.zero_grad()
        model.recompute = recompute
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, recomputed)


def test_a_tied_head_is_one_tensor() -> None:
    untied, tied = GPT(tiny_config()), GPT(tiny_config(tied_head=True))
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 320 * 64
