"""scripts/chat.py, as a person and as a pipe use it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_qlora.checkpoint.checkpoint import content_hash, load_model
from lit_qlora.errors import CheckpointError, DataError, UsageError
from lit_qlora.generation import generate
from lit_qlora.inference import load_roster
from lit_qlora.lora.adapter import save_adapter
from lit_qlora.lora.layer import add_lora, lora_state
from lit_qlora.prompts.conversation import Conversation, Message, prompt_of
from lit_qlora.settings import GenerationConfig, LoRAConfig
from tests.conftest import load_script
from tests.scripts.test_generate import TOOLED, run_script, with_template


def write_adapter(
    folder: Path, checkpoint: Path, seed: int = 0, targets: Any = ("query", "value", "mlp"), **settings: Any
) -> Path:
    """A random adapter of the checkpoint that changes its answers."""
    model = load_model(checkpoint)
    config = LoRAConfig(r=4, targets=targets, **settings)
    add_lora(model, config)
    generator = torch.Generator().manual_seed(seed)
    for tensor in lora_state(model).values():
        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    save_adapter(folder, model, config, None, {"base": {"name": "tiny", "sha256": content_hash(checkpoint)}})
    (folder / "prompt_style.json").write_text('{"style": "qa"}')
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "sums" / "final", tiny_checkpoint)


def chat(checkpoint: Path, *lines: str, **changes: Any) -> Any:
    script = load_script("scripts/chat.py")
    config = script.Config(checkpoint_dir=checkpoint, **{"max_new_tokens": 6} | changes)
    conversation = script.Conversation(load_roster(config, config.adapters, config.style), config)
    conversation.resume(script.read_history(config.history))
    for line in lines:
        conversation.hear(line)
    return conversation


def test_chat_by_its_second_door_answers_a_pipe_line_by_line(tiny_checkpoint: Path) -> None:
    talk = "What is 1 plus 1?\n\n/rset\n/reset\nWhat is 1 plus 1?\n/quit now\nnever asked\n"
    # chat/base.py runs scripts/chat.py
    done = run_script("../chat/base", "--checkpoint_dir", tiny_checkpoint, "--max_new_tokens", 8, stdin=talk)
    assert done.returncode == 0, done.stderr
    half = len(done.stdout) // 2
    assert done.stdout[:half] == done.stdout[half:] != ""  # after /reset the same question has the same answer
    assert "/rset is not a command. Did you mean /reset?" in done.stderr
    assert "The conversation is forgotten." in done.stderr


def test_each_answer_goes_on_from_all_that_was_said(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = chat(tiny_checkpoint, "/system Be brief.", "What is 1 plus 2?", "And 4?", style="qa")
    style, tokenizer = conversation.roster.styles[conversation.who], conversation.tokenizer
    history: list[Message] = []
    for question in ("What is 1 plus 2?", "And 4?"):
        prompt = style.encode_prompt(tokenizer, prompt_of(question, system="Be brief.", history=history))
        config = GenerationConfig(max_new_tokens=6)
        (answer,) = generate(conversation.model, [prompt], config, tokenizer.stop_ids, tokenizer.size)
        history += [Message("user", question), Message("assistant", style.said(tokenizer.decode(answer)))]
    assert [message for turn in conversation.turns for message in turn.messages] == history
    assert capsys.readouterr().out == "".join(f"{message.content}\n" for message in history[1::2])
    conversation.hear("/reset")
    assert conversation.turns == []


TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] }}:{{ message.content }}"
    "{{ eos_token if message.role == 'assistant' else '\n' }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def test_a_model_with_a_chat_template_of_its_own_is_talked_to_in_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    own = with_template(tiny_checkpoint, tmp_path / "own", TEMPLATE)
    conversation = chat(own, "/system Hm.", "1 + 2", "And 4?", max_new_tokens=4)
    tokenizer, (first, second) = conversation.tokenizer, conversation.turns
    # This template writes no BOS, so there is none.
    prompt = tokenizer.encode("s:Hm.\nu:1 + 2\na:", bos=False)
    prompt += [*tokenizer.encode(first.answer, continuation=True), tokenizer.eos_id]
    prompt += tokenizer.encode("u:And 4?\na:", continuation=True)
    (answer,) = generate(
        conversation.model, [prompt], GenerationConfig(max_new_tokens=4), tokenizer.stop_ids, tokenizer.size
    )
    assert second.answer == tokenizer.decode(answer)


def test_a_model_calls_a_tool_and_goes_on_with_its_result(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, history = with_template(tiny_checkpoint, tmp_path / "own", TOOLED), tmp_path / "chat.jsonl"
    (tmp_path / "tools.json").write_text(json.dumps([{"type": "function", "function": {"name": "get_weather"}}]))
    settings = {"tools": tmp_path / "tools.json", "history": history, "max_new_tokens": 4}
    conversation = chat(own, **settings)
    call = json.dumps({"name": "get_weather", "arguments": {"city": "Oslo"}})
    answers = iter([f"Hm.</think>\n<tool_call>{call}</tool_call><tool_call>{call}</tool_call>", "</think>It rains."])
    asked: list[list[int]] = []

    def say(name: str, prompt: list[int]) -> Any:
        asked.append(prompt)
        return iter(next(answers))

    conversation.pieces = say
    conversation.hear("Weather?")
    shown = capsys.readouterr()
    assert (shown.out, shown.err.splitlines()) == (
        f"{call}\n{call}\n",
        ["Hm.", "get_weather waits for its result: /tool TEXT gives it."],
    )
    conversation.hear("/tool wet")
    assert "get_weather waits for its result" in capsys.readouterr().err
    resumed = chat(own, **settings)
    resumed.pieces = say
    resumed.hear("/tool cold")
    assert capsys.readouterr().out == "It rains.\n"
    (turn,) = resumed.turns
    assert [message.role for message in turn.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    said = Conversation(turn.messages[:-1], variables=resumed.variables)
    assert asked[1] == resumed.roster.styles[resumed.who].encode_prompt(resumed.tokenizer, said)
    assert conversation.tokenizer.decode(asked[1]).endswith("get_weather Osloget_weather Oslo|wet|cold|A:<think>")
    with pytest.raises(UsageError, match="No call of a tool waits for a result"):
        resumed.hear("/tool wet")


def test_chat_forgets_the_oldest_turns_when_the_context_is_full_and_says_so(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"What is {a} plus {a}?" for a in range(12)]
    conversation = chat(tiny_checkpoint, *lines)
    assert "forgotten: the model's context holds 96 tokens" in capsys.readouterr().err
    remembered = [turn.prompt for turn in conversation.turns]
    assert 0 < len(remembered) < len(lines)
    assert remembered == lines[-len(remembered) :]
    with pytest.raises(UsageError, match="context holds 96"):
        conversation.answer("What is 1 plus 1?" * 30)
    assert [turn.prompt for turn in conversation.turns] == remembered  # what cannot be answered costs no memory


def test_ctrl_c_ends_the_answer_and_not_the_chat(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = chat(tiny_checkpoint, max_new_tokens=50)
    real, calls = conversation.tokenizer.decode, []

    def impatient(ids: list[int]) -> str:
        calls.append(len(ids))
        if len(ids) == 4:
            raise KeyboardInterrupt
        text: str = real(ids)
        return text

    monkeypatch.setattr(conversation.tokenizer, "decode", impatient)
    conversation.answer("What is 1 plus 2?")
    assert calls == [1, 2, 3, 4]
    (turn,) = conversation.turns
    assert turn.prompt == "What is 1 plus 2?"
    assert not conversation.model.training


def test_the_adapter_answers_and_can_be_switched_off_and_on(
    tiny_checkpoint: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_adapter(adapter.parents[1] / "other", tiny_checkpoint, seed=7, targets="all")
    question = "What is 3 plus 4?"
    said = {}
    conversation = chat(tiny_checkpoint, lora_path=adapter, adapters={"other": other}, max_new_tokens=10)
    assert conversation.roster.names == [tiny_checkpoint.name, "sums", "other"]
    for command in ("on", "off", "sums", "other", "off"):
        conversation.hear(f"/adapter {command}")
        conversation.hear(question)
        said.setdefault(command, conversation.turns[-1].answer)
        assert conversation.turns[-1].answer == said[command]
        conversation.hear("/reset")
    assert said["on"] == said["other"]
    assert len(set(said.values())) == 3
    # Alone in the model, each says the same.
    assert said["sums"] == chat(tiny_checkpoint, question, lora_path=adapter, max_new_tokens=10).turns[0].answer
    with pytest.raises(UsageError, match=r"nobody names nobody. There are: off \(tiny\), sums, other"):
        conversation.hear("/adapter nobody")
    capsys.readouterr()
    conversation.hear(f"/compare {question}")
    out = capsys.readouterr().out
    assert [name.strip() for name in out.splitlines()[0].split("|")] == conversation.roster.names
    assert conversation.turns == []  # a comparison is not remembered


def test_columns_stand_side_by_side_or_below_each_other_where_there_is_no_room() -> None:
    script = load_script("scripts/chat.py")
    texts = {"base": "one two three four five six\n\nseven", "adapter": "1"}
    wide = script.side_by_side(texts, 51).splitlines()
    assert wide[0].split() == ["base", "|", "adapter"]
    assert wide[2].split("|") == ["one two three four five  ", " 1"]
    assert [line.split("|")[0].strip() for line in wide[3:]] == ["six", "", "seven"]
    assert script.side_by_side(texts, 40) == "base:\none two three four five six\n\nseven\n\nadapter:\n1"


def test_a_conversation_goes_on_where_its_history_ends(tiny_checkpoint: Path, tmp_path: Path) -> None:
    history = tmp_path / "past" / "chat.jsonl"
    first = chat(tiny_checkpoint, "/system Be brief.", "Hello", "/reset", "What is 1 plus 2?", history=history)
    messages = [json.loads(line) for line in history.read_text().splitlines()]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "reset", "user", "assistant"]
    assert messages[-1] == {"role": "assistant", "content": first.turns[0].answer, "model": tiny_checkpoint.name}
    second = chat(tiny_checkpoint, history=history)
    assert (second.system, second.turns) == (first.system, first.turns)
    first.hear("And 4?")
    second.hear("And 4?")
    assert second.turns == first.turns


def test_a_history_holds_whatever_ends_a_line_elsewhere(tiny_checkpoint: Path, tmp_path: Path) -> None:
    history = tmp_path / "chat.jsonl"
    first = chat(tiny_checkpoint, "one\u2028two\u0085three\u2029four", history=history)
    assert chat(tiny_checkpoint, history=history).turns == first.turns


def test_half_a_message_at_the_end_of_a_history_is_left_out(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history = tmp_path / "chat.jsonl"
    first = chat(tiny_checkpoint, "one", history=history)
    with history.open("a") as file:
        file.write('{"role": "user", "content": "half')
    second = chat(tiny_checkpoint, "two", history=history)
    assert "chat.jsonl:3: half a message" in capsys.readouterr().err
    assert second.turns[:1] == first.turns
    assert chat(tiny_checkpoint, history=history).turns == second.turns


def test_a_system_text_that_is_given_wins_over_the_one_of_the_history(tiny_checkpoint: Path, tmp_path: Path) -> None:
    history = tmp_path / "chat.jsonl"
    chat(tiny_checkpoint, "/system Be brief.", history=history)
    assert chat(tiny_checkpoint, history=history, system="Be kind.").system == "Be kind."
    assert chat(tiny_checkpoint, history=history).system == "Be brief."


@pytest.mark.parametrize(
    "line",
    [
        *(
            "",
            "{",
            "\udcff",
            "5",
            '{"role": "user", "content": "\\udcff"}',
            '{"role": "user"}',
            '{"role": "nobody", "content": "x"}',
        ),
        *(f'{{"role": "assistant", "content": "", "tool_calls": {calls}}}' for calls in ("5", "[5]", '[{"id": "a"}]')),
    ],
)
def test_a_file_that_is_no_history_is_refused_with_its_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(f'{{"role": "user", "content": "x"}}\n{line}\n', errors="surrogateescape")
    with pytest.raises(DataError, match=r"chat\.jsonl:2: not a message"):
        load_script("scripts/chat.py").read_history(path)


def test_adapters_of_one_name_and_of_another_base_are_refused(tiny_checkpoint: Path, adapter: Path) -> None:
    with pytest.raises(UsageError, match="as one of the adapters is"):
        chat(tiny_checkpoint, lora_path=adapter, adapters={"sums": adapter})
    with pytest.raises(UsageError, match="has the name of the base"):
        chat(tiny_checkpoint, adapters={tiny_checkpoint.name: adapter})
    with pytest.raises(CheckpointError, match="is no adapter"):
        chat(tiny_checkpoint, adapters={"x": tiny_checkpoint})
