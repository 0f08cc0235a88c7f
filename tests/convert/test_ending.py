"""What goes out ends its answers where ours do: in transformers' generate, in a GGUF file, and for Ollama."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_qlora.convert.ending import read_ending
from lit_qlora.convert.to_gguf import export_gguf
from lit_qlora.convert.to_hugging_face import export_hf
from lit_qlora.generation import generate
from lit_qlora.inference import stop_ids
from lit_qlora.model.gpt import GPT
from lit_qlora.prompts.conversation import Conversation, Message
from lit_qlora.prompts.published import go_template
from lit_qlora.prompts.style import FILE_NAME, STYLES, style_json
from lit_qlora.prompts.tokenizer import Tokenizer
from lit_qlora.settings import GenerationConfig
from tests.conftest import tiny_model, write_checkpoint
from tests.prompts.test_style import write_chatty_tokenizer

transformers = pytest.importorskip("transformers")


def model_that_says(token: int) -> GPT:
    """A model whose every answer is this token."""
    model = tiny_model()
    for name, parameter in model.named_parameters():
        if name.endswith(("projection.weight", "down.weight")) or name == "head.weight":
            parameter.data.zero_()
    model.embed.weight.data[:, 0] = 1.0
    model.norm.weight.data.fill_(1.0)
    model.head.weight.data[token, 0] = 1.0
    return model


@pytest.fixture
def chatml(tmp_path: Path) -> Path:
    """A checkpoint that was trained in ChatML on a base with another end and another template."""
    write_chatty_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "that of the base"}))
    tokenizer = Tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": tokenizer.eos_id, "temperature": 0.7, "top_k": 20, "do_sample": True})
    )
    directory = write_checkpoint(tmp_path / "base", model_that_says(tokenizer.control_tokens["<|im_end|>"]))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).rename(directory / name)
    (directory / FILE_NAME).write_text(style_json(STYLES["chatml"]))
    return directory


def test_transformers_generate_stops_where_ours_does(chatml: Path, tmp_path: Path) -> None:
    export_hf(chatml, tmp_path / "out")
    ours, style = Tokenizer(chatml), STYLES["chatml"]
    prompt = style.encode_prompt(ours, Conversation((Message("system", "Be kind."), Message("user", "Hi"))))
    end = ours.control_tokens["<|im_end|>"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == prompt
    assert model.generation_config.eos_token_id == [ours.eos_id, end]
    said = model.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False, pad_token_id=ours.eos_id)
    assert said[0, len(prompt) :].tolist() == [end]
    settings = GenerationConfig(max_new_tokens=9)
    mine = generate(model_that_says(end), [prompt], settings, stop_ids(ours, style), ours.size)
    assert mine == [[]]  # an answer is told without its end


def test_what_the_base_said_of_generation_stays(chatml: Path, tmp_path: Path) -> None:
    export_hf(chatml, tmp_path / "out")
    told = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert (told["temperature"], told["top_k"], told["do_sample"]) == (0.7, 20, True)
    assert "chat_template" not in json.loads((tmp_path / "out/tokenizer_config.json").read_text())


def test_a_checkpoint_without_a_style_of_its_own_keeps_its_template(chatml: Path, tmp_path: Path) -> None:
    (chatml / FILE_NAME).unlink()
    export_hf(chatml, tmp_path / "out")
    assert not (tmp_path / "out/chat_template.jinja").exists()
    for name in ("tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (chatml / name).read_bytes()


def test_a_gguf_file_names_both_ends_and_the_template(chatml: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    export_gguf(chatml, tmp_path / "m.gguf", "f32")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    ours = Tokenizer(chatml)
    ends = [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot")]
    assert ends == [ours.eos_id, ours.control_tokens["<|im_end|>"]]
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(chatml / "tokenizer.json"))
    theirs.chat_template = fields["tokenizer.chat_template"]
    prompt = theirs.apply_chat_template([{"role": "user", "content": "Hi"}], return_dict=False)
    assert prompt == STYLES["chatml"].encode_prompt(ours, Conversation((Message("user", "Hi"),)))


def test_the_modelfile_tells_ollama_the_rest(chatml: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    export_gguf(chatml, tmp_path / "m.gguf")
    lines = (tmp_path / "m.Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./m.gguf"
    parameters = [line.removeprefix("PARAMETER ") for line in lines if line.startswith("PARAMETER ")]
    assert parameters == ['stop "</s>"', 'stop "<|im_end|>"', "temperature 0.7", "top_k 20", "num_ctx 96"]


def test_words_that_end_an_answer_are_told_to_ollama_as_well(chatml: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (chatml / FILE_NAME).write_text(style_json(STYLES["alpaca-end"]))
    export_gguf(chatml, tmp_path / "m.gguf")
    assert 'PARAMETER stop "### End"' in (tmp_path / "m.Modelfile").read_text().splitlines()


def run_go(template: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template makes of the few statements that go_template writes."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    tokens = re.split(r"(\{\{.*?\}\})", re.sub(r"\s*\{\{-", "{{", template))
    assert not "".join(tokens[::2]).strip()
    statements = [token[2:-2].strip() for token in tokens[1::2]]
    state: dict[str, Any] = {"first": True}

    def value(word: str, message: dict[str, str]) -> str:
        return {"$.System": system, ".Content": message.get("content", "")}.get(word) or json.loads(word or '""')

    def holds(condition: str, message: dict[str, str]) -> bool:
        if condition.startswith("eq .Role "):
            return message["role"] == json.loads(condition.removeprefix("eq .Role "))
        return {"not $first": not state["first"], "$.System": bool(system)}[condition]

    def block(at: int, message: dict[str, str], live: bool) -> tuple[str, int]:
        """The text up to the end that closes this block, and where that is."""
        text, taken, here = "", False, live
        while True:
            word = statements[at]
            if word == "end":
                return text, at + 1
            if word.startswith(("else", "if ")):
                condition = word.removeprefix("else").strip().removeprefix("if ")
                if word.startswith("else"):
                    here = live and not taken and (not condition or holds(condition, message))
                    taken, at = taken or here, at + 1
                    continue
                inner, at = branch(at, message, here)
                text += inner
            elif word == "$first = false":
                state["first"], at = state["first"] and not here, at + 1
            else:
                text, at = text + (value(word, message) if here else ""), at + 1

    def branch(at: int, message: dict[str, str], live: bool) -> tuple[str, int]:
        condition = statements[at].removeprefix("if ")
        statements[at] = f"else if {condition}"  # which a block begins with
        text, end = block(at, message, live)
        statements[at] = f"if {condition}"
        return text, end

    assert statements[:2] == ["$first := true", "range .Messages"]
    return "".join(block(2, message, True)[0] for message in messages)


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("system", ["", "Be kind."])
def test_ollama_writes_what_the_style_writes(name: str, system: str, tmp_path: Path) -> None:
    write_chatty_tokenizer(tmp_path)
    tokenizer, style = Tokenizer(tmp_path), STYLES[name]
    template = go_template(style, tokenizer)
    assert template
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    messages += [{"role": "user", "content": "And\nthen?"}]
    said = tuple(Message(message["role"], message["content"]) for message in messages)  # type: ignore[arg-type]
    prompt = style.encode_prompt(tokenizer, Conversation(said))
    assert [tokenizer.bos_id] * tokenizer.use_bos + tokenizer.encode_marked(run_go(template, messages), False) == prompt


def test_a_checkpoint_without_a_tokenizer_has_no_ending(tmp_path: Path) -> None:
    assert read_ending(tmp_path) is None
