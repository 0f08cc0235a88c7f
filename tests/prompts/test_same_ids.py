"""What training shows the model before an answer is what generation, chat, serving and lm-eval show it, id for id."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_qlora.checkpoint.checkpoint import content_hash, load_model
from lit_qlora.data import RunData, Sample, read_data
from lit_qlora.inference import load_roster
from lit_qlora.lora.adapter import save_adapter
from lit_qlora.lora.layer import add_lora
from lit_qlora.prompts.style import STYLES, read_style
from lit_qlora.settings import DataConfig, FinetuneConfig, LoRAConfig, PromptKnobs
from tests.conftest import load_script, tiny_model, write_checkpoint
from tests.prompts.test_style import TEMPLATES, write_chatty_tokenizer

KNOBS = PromptKnobs(text_system_start="S: ", text_prompt_start="Q: ", text_answer_separator="\nA: ")
ALONE = {"instruction": "Why?", "input": "This.", "system": "Be kind.", "output": "So."}
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi, who are you?"},
    {"role": "assistant", "content": "A fox."},
    {"role": "user", "content": "And\nthen?"},
    {"role": "assistant", "content": "I ran."},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokenizer has the control tokens of every style, and a chat template."""
    directory = write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "base", tiny_model(block_size=1024))
    write_chatty_tokenizer(directory)
    (directory / "chat_template.jinja").write_text("{{ bos_token }}" + TEMPLATES["chatml"])
    return directory


@pytest.fixture(scope="module", params=[*STYLES, "template", "knobs"])
def trained(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """What a run in each style learns from and leaves: its samples, its adapter and the merged checkpoint."""
    tmp_path = tmp_path_factory.mktemp(request.param)
    (tmp_path / "alone.jsonl").write_text(json.dumps(ALONE))
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": TALK}))
    paths = (str(tmp_path / "alone.jsonl"), str(tmp_path / "talk.jsonl"))
    knobs = asdict(KNOBS) if request.param == "knobs" else {}
    config = DataConfig(path=paths, prompt=request.param, val_fraction=0.0, cache_dir="none", **knobs)
    data: RunData = read_data(FinetuneConfig(checkpoint_dir=checkpoint, data=config))
    model = load_model(checkpoint)
    add_lora(model, LoRAConfig(r=2))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.constant_(parameter, 0.01)
    facts = {"base": {"name": "base", "sha256": content_hash(checkpoint)}}
    save_adapter(tmp_path / "run/final", model, LoRAConfig(r=2), data.style, facts)
    script = load_script("scripts/merge_lora.py")
    script.main(script.MergeConfig(lora_path=tmp_path / "run/final", checkpoint_dir=checkpoint))
    alone, talk = data.train
    return SimpleNamespace(
        tokenizer=data.tokenizer,
        style=data.style,
        before=prompts_of(alone) + prompts_of(talk),
        models=[
            {"checkpoint_dir": checkpoint, "lora_path": tmp_path / "run/final"},
            {"checkpoint_dir": tmp_path / "run/merged"},
        ],
    )


def prompts_of(sample: Sample) -> list[list[int]]:
    """The ids before each labelled answer."""
    begins = [i for i in range(1, len(sample.trained)) if sample.trained[i] and not sample.trained[i - 1]]
    return [sample.tokens[:begin].tolist() for begin in begins]


def test_generation_shows_what_training_showed(trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []

    def answer(model: Any, prompts: list[list[int]], *rest: Any, **others: Any) -> list[list[int]]:
        asked.extend(prompts)
        return [[trained.tokenizer.eos_id]] * len(prompts)

    monkeypatch.setattr("lit_qlora.generation.generate", answer)
    script = load_script("scripts/generate.py")
    for model in trained.models:
        script.main(script.Config(prompt="Why?", input="This.", system="Be kind.", **model))
    assert asked == [trained.before[0]] * 2


def test_a_chat_shows_what_training_showed(trained: SimpleNamespace) -> None:
    script = load_script("scripts/chat.py")
    for model in trained.models:
        config = script.Config(system="Be kind.", **model)
        chat = script.Conversation(load_roster(config, config.adapters, config.style), config)
        past = [script.Turn.of("Hi, who are you?", "A fox.")]
        assert chat.prompt(chat.who, script.Turn.of("Hi, who are you?"), []) == (trained.before[1], [])
        assert chat.prompt(chat.who, script.Turn.of("And\nthen?"), past) == (trained.before[2], past)


def test_the_server_shows_what_training_showed(trained: SimpleNamespace) -> None:
    pytest.importorskip("fastapi", reason="the server is an extra: pip install 'lit_qlora[serve]'")
    from lit_qlora.inference import InferenceConfig
    from lit_qlora.serve.app import _Server
    from lit_qlora.serve.limits import Limits
    from lit_qlora.serve.protocol import read_order

    for model in trained.models:
        roster = load_roster(InferenceConfig(**model), {})
        server = _Server(roster, Limits())
        for messages, expected in ((TALK[:2], trained.before[1]), (TALK[:4], trained.before[2])):
            (question,) = server._questions(read_order({"model": roster.names[-1], "messages": messages}, chat=True))
            assert question.prompt == expected


def test_lm_eval_shows_what_training_showed(trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.conftest import ROOT

    monkeypatch.syspath_prepend(ROOT / "eval")
    from lm_eval_model import GPTModel

    for model in trained.models:
        style = read_style(model.get("lora_path", model["checkpoint_dir"]))
        lm = GPTModel(tiny_model(), trained.tokenizer, style=style)
        for messages, expected in ((TALK[:2], trained.before[1]), (TALK[:4], trained.before[2])):
            text = lm.apply_chat_template(messages)
            assert lm.tok_encode(text, add_special_tokens=False) == expected
            begun = [*messages, {"role": "assistant", "content": "So"}]
            assert lm.apply_chat_template(begun, add_generation_prompt=False) == f"{text}{trained.style.gap}So"


def test_lm_eval_ends_answers_where_training_ended_them(
    trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.conftest import ROOT

    monkeypatch.syspath_prepend(ROOT / "eval")
    from lm_eval_model import GPTModel

    asked: list[Any] = []

    def answer(*given: Any, **_: Any) -> list[list[int]]:
        asked.extend(given)
        return [[]]

    monkeypatch.setattr("lm_eval_model.generate", answer)
    lm = GPTModel(tiny_model(), trained.tokenizer, style=trained.style)
    task: Any = SimpleNamespace(args=("Why?", {"until": [], "max_gen_toks": 1}))
    assert lm.generate_until([task], disable_tqdm=True) == [""]
    assert asked[3] == trained.tokenizer.stop_ids | trained.style.stop_ids(trained.tokenizer)
