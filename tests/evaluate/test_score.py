"""Scores of continuations do not depend on how they are batched, nor on whether they share their context."""

import random

import pytest
import torch

from lit_qlora.errors import DataError
from lit_qlora.evaluate.score import Scorer, windows
from lit_qlora.model.gpt import GPT
from tests.conftest import tiny_model

SWITCHES: dict[str, dict] = {
    "llama": {},
    "window": {"sliding_window": 8},
    "learned positions": {"positions": "learned"},
    "tied": {"tied_head": True},
    "experts": {"n_expert": 4, "n_expert_per_token": 2, "expert_size": 32},
    "yarn": {"rope_scaling": "yarn", "rope_factor": 2.0, "rope_original_block_size": 48},
    "dynamic": {"rope_scaling": "dynamic", "rope_factor": 2.0, "rope_original_block_size": 16},
    "soft cap": {"attention_softcap": 2.0, "sliding_window": 8, "full_attention_layers": (1,)},
    "sinks": {"attention_sinks": True},
    "louder queries": {"query_scale_beta": 0.3, "rope_original_block_size": 16},
    "states": {
        "delta_layers": (0,),
        "delta_key_heads": 2,
        "delta_value_heads": 4,
        "delta_key_size": 8,
        "delta_value_size": 12,
    },
    "shared keys": {"shared_kv_layers": 1, "per_layer_size": 8, "per_layer_vocab": 320},
    "latent": {"kv_latent_size": 16, "latent_rope_size": 4, "latent_value_size": 8, "n_kv_head": 4},
}


def ids(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(300) for _ in range(count)]


def requests() -> list[tuple[list[int], list[int]]]:
    """Contexts with one to five continuations of one to nine tokens; one that is too long, some said twice."""
    draw = random.Random(0)
    asked = []
    for i in range(12):
        context = ids(draw, draw.randint(1, 40))
        asked += [(context, ids(draw, draw.randint(1, 9))) for _ in range(i % 5 + 1)]
    examples = ids(draw, 50)
    asked += [(examples + ids(draw, draw.randint(1, 9)), ids(draw, 3)) for _ in range(7)]
    last = ids(draw, 30)
    asked += [(last, [token]) for token in range(4)] + asked[:3]
    asked += [(ids(draw, 94), ids(draw, 8)), ([1], [2]), ([1], [])]
    draw.shuffle(asked)
    return asked


def one_by_one(model: GPT, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The definition: a row of its own, all logits at once."""
    whole = [*context, *continuation][-(model.config.block_size + 1) :]
    with torch.no_grad():
        scores = model(torch.tensor([whole[:-1]]))[0].double().log_softmax(-1)[len(whole) - 1 - len(continuation) :]
    wanted = torch.tensor(continuation, dtype=torch.long)
    return float(scores.gather(-1, wanted[:, None]).sum()), bool((scores.argmax(-1) == wanted).all())


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the tokens of all forward passes from now on."""
    read: list[tuple[int, ...]] = []
    hidden = GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, x, **how: read.append(tuple(x.shape)) or hidden(self, x, **how))
    return read


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize("batch_size", ["auto", 1, 3, 8])
def test_scores_are_those_of_each_request_alone(switches: dict, batch_size):
    model = tiny_model(std=0.2, **switches)
    asked = requests()
    actual = Scorer(model, batch_size).score(asked)
    expected = [one_by_one(model, *request) if request[1] else (0.0, True) for request in asked]
    assert [x for x, _ in actual] == pytest.approx([x for x, _ in expected], abs=1e-4)
    assert [x for _, x in actual] == [x for _, x in expected]


def test_a_context_is_read_once(monkeypatch):
    draw = random.Random(1)
    context = ids(draw, 50)
    read = watched(monkeypatch)
    Scorer(tiny_model()).score([(context, ids(draw, 5)) for _ in range(4)])
    assert read == [(1, 50 + 4 * 4)]


def test_whatever_is_said_twice_is_read_once(monkeypatch):
    draw = random.Random(1)
    examples, questions = ids(draw, 60), [ids(draw, 8) for _ in range(5)]
    read = watched(monkeypatch)
    # Letters are answers to one input, and "12 34" goes on where "12" ends.
    asked = [(examples + question, [letter]) for question in questions for letter in range(4)]
    Scorer(tiny_model()).score([*asked, (examples, [12]), (examples, [12, 34])])
    assert read == [(1, 60 + 5 * 8 + 1)]


def test_inputs_that_have_nothing_in_common_fill_rows(monkeypatch):
    draw = random.Random(1)
    asked = [([i, *ids(draw, draw.randint(5, 40))], ids(draw, 3)) for i in range(80)]
    read = watched(monkeypatch)
    Scorer(tiny_model()).score(asked)
    assert {length for _, length in read} < set(range(250, 300))
    tokens = sum(len(context) + 2 for context, _ in asked)
    assert tokens <= sum(rows * length for rows, length in read) <= 1.1 * tokens


def test_a_row_grows_only_while_that_costs_less_than_reading_again(monkeypatch):
    draw = random.Random(1)
    examples = ids(draw, 60)
    read = watched(monkeypatch)
    Scorer(tiny_model()).score([(examples + ids(draw, 2), [1]) for _ in range(200)])
    assert max(length for _, length in read) > 256  # sixty for two
    read.clear()
    Scorer(tiny_model()).score([(examples[:4] + ids(draw, 30), [1]) for _ in range(30)])
    assert max(length for _, length in read) < 300  # four for thirty


@pytest.mark.parametrize("scaling", [{"rope_scaling": "dynamic", "rope_factor": 2.0}, {}])
def test_positions_that_depend_on_the_length_are_those_of_each_request(scaling: dict, monkeypatch):
    draw = random.Random(1)
    model = tiny_model(rope_original_block_size=16, **scaling)
    context = ids(draw, 50)
    asked = [(context[: 5 * n], ids(draw, n)) for n in range(1, 9)]
    read = watched(monkeypatch)
    scores = Scorer(model).score(asked)
    assert read == [(1, sum(6 * n - 1 for n in range(1, 9)) if scaling else 40 + sum(range(8)))]
    monkeypatch.undo()
    assert [x for x, _ in scores] == pytest.approx([one_by_one(model, *request)[0] for request in asked], abs=1e-4)


def test_batches_shrink_when_memory_is_short(monkeypatch):
    model, asked, hidden = tiny_model(), requests(), GPT.hidden
    failed = []

    def short(self, tokens, **how):
        if tokens.numel() > 60:
            failed.append(tokens.numel())
            raise torch.OutOfMemoryError
        return hidden(self, tokens, **how)

    fitting = [request for request in asked if len(request[0]) + len(request[1]) <= 60]
    expected = Scorer(model, 1).score(fitting)
    monkeypatch.setattr(GPT, "hidden", short)
    assert [x for x, _ in Scorer(model).score(fitting)] == pytest.approx([x for x, _ in expected], abs=1e-4)
    assert failed
    with pytest.raises(torch.OutOfMemoryError):
        Scorer(model).score([([1] * 80, [1])])
    with pytest.raises(torch.OutOfMemoryError):  # somebody asked for this size
        Scorer(model, 8).score(fitting)


def test_progress_counts_every_request(monkeypatch):
    done = []
    Scorer(tiny_model(), 4).score(requests(), done.append)
    assert sum(done) == len(requests())
    assert len(done) > 1


def test_what_is_too_long_is_cut_counted_or_refused():
    scorer = Scorer(tiny_model(), max_length=20)
    (cut,) = scorer.score([([7] * 30, [1, 2, 3])])
    (same,) = scorer.score([([7] * 18, [1, 2, 3])])
    assert cut == pytest.approx(same, abs=1e-5)
    assert scorer.truncated == 1
    with pytest.raises(DataError, match=r"continuation has 21 tokens.*holds 20"):
        scorer.score([([1], [7] * 21)])
    assert Scorer(tiny_model(), max_length=1000).max_length == 96


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 30])
def test_windows_are_those_of_lm_eval(count):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    text = list(range(1, count + 1))
    theirs = [make_disjoint_window(window) for window in get_rolling_token_windows(text, 0, 8, 1)]
    assert list(windows(text, 0, 8)) == theirs
    assert [token for _, scored in windows(text, 0, 8) for token in scored] == text
    assert list(windows([], 0, 8)) == []
