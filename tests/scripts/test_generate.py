"""scripts/generate.py: one prompt or a file of them in, answers out."""

import datetime
import json
import os
import subprocess
import sys

import pytest

from lit_qlora.data.prompt_files import read_prompts
from lit_qlora.errors import CheckpointError, DataError, ResourceError, UsageError
from lit_qlora.generation import generate
from lit_qlora.inference import check_style, choose_style, encode_prompt
from lit_qlora.prompts.answer_parts import Answer
from lit_qlora.prompts.conversation import prompt_of
from lit_qlora.prompts.style import STYLES
from lit_qlora.prompts.tokenizer import Tokenizer
from lit_qlora.settings import DEMO_CHECKPOINT, GenerationConfig
from tests.conftest import ROOT, load_script, tiny_model, write_checkpoint


def test_auto_is_the_recorded_style_and_none_is_the_bare_text(tiny_checkpoint):
    tokenizer = Tokenizer(tiny_checkpoint)
    recorded = choose_style("qa", None)
    assert recorded is not None
    assert choose_style("auto", recorded) is recorded
    assert choose_style("none", recorded) is choose_style("auto", None) is None
    assert encode_prompt(tokenizer, None, prompt_of("a", "b")) == tokenizer.encode("a\nb")
    assert encode_prompt(tokenizer, recorded, prompt_of("a", "b")) == tokenizer.encode("Q: a\nb\nA:")
    with pytest.raises(UsageError, match="Did you mean alpaca"):
        check_style("alpca")


TOOLED = """{% for tool in tools or [] %}{{ tool.function.name }}, {% endfor %}
{%- for m in messages %}{{ (m.content or '').split('</think>')[-1] }}
{%- for call in m.tool_calls or [] %}{{ call.function.name }} {{ call.function.arguments.city }}{% endfor %}|
{%- endfor %}{% if add_generation_prompt %}A:<think>{% endif %}"""
"""With few words, for the model has little room."""


def with_template(checkpoint, folder, template):
    """The checkpoint with a chat template."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def run_script(name: str, *flags: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"scripts/{name}.py", *map(str, flags)],
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_help_needs_neither_torch_nor_a_model(name):
    script = f"scripts/{name}.py"
    code = f"import sys, runpy; sys.argv = [{script!r}, '--help']\ntry: runpy.run_path({script!r}, run_name='__main__')"
    code += "\nexcept SystemExit: sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0
    assert "--max_new_tokens" in done.stdout
    assert "--top_p" in done.stdout


def test_generate_prints_the_answer_alone_on_stdout(tiny_checkpoint):
    flags = ("--checkpoint_dir", tiny_checkpoint, "--prompt", "What is 3 plus 4?", "--max_new_tokens", 12)
    done = run_script("generate", *flags)
    assert done.returncode == 0, done.stderr
    tokenizer = Tokenizer(tiny_checkpoint)
    (ids,) = generate(
        tiny_model(),
        [tokenizer.encode("What is 3 plus 4?")],
        GenerationConfig(max_new_tokens=12),
        tokenizer.stop_ids,
        300,
    )
    assert done.stdout == tokenizer.decode(ids).replace("\r", "\n") + "\n"  # a text pipe knows one kind of newline
    assert "tokens/s" in done.stderr
    assert "GiB" in done.stderr


def test_generate_explains_an_answer_that_the_context_cuts_off(tiny_checkpoint, capsys):
    script = load_script("scripts/generate.py")
    script.main(script.Config(checkpoint_dir=tiny_checkpoint, prompt="What is 3 plus 4?" * 5, max_new_tokens=500))
    assert "context of 96 tokens is full" in capsys.readouterr().err
    with pytest.raises(UsageError, match="context holds 96"):
        script.main(script.Config(checkpoint_dir=tiny_checkpoint, prompt="What is 3 plus 4?" * 30))


def test_a_recorded_style_is_used_without_being_asked_for(tiny_checkpoint, tmp_path, capsys):
    styled = tmp_path / "styled"
    styled.mkdir()
    for file in tiny_checkpoint.iterdir():
        (styled / file.name).symlink_to(file)
    (styled / "prompt_style.json").write_text(json.dumps({"style": "qa"}))
    script = load_script("scripts/generate.py")
    outputs = []
    for flags in ({"checkpoint_dir": styled}, {"checkpoint_dir": tiny_checkpoint, "style": "qa"}):
        script.main(script.Config(prompt="What is 3 plus 4?", max_new_tokens=10, **flags))
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_a_file_of_prompts_is_answered_in_its_order(tiny_checkpoint, tmp_path):
    script = load_script("scripts/generate.py")
    rows = [
        {"instruction": "What is 3 plus 4?", "id": 7},
        {"prompt": "A much longer question: what is 1 plus 2?", "input": "Numbers."},
        {"instruction": "Hi"},
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"checkpoint_dir": tiny_checkpoint, "max_new_tokens": 7, "style": "qa", "stop": ("Q",)}
    script.main(script.Config(prompts=path, out=tmp_path / "out.jsonl", batch_size=2, **common))
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{key: row[key] for key in row if key in given} for row, given in zip(written, rows, strict=True)] == rows
    for row in written:
        config = script.Config(prompt=row.get("instruction") or row["prompt"], input=row.get("input", ""), **common)
        tokenizer = Tokenizer(tiny_checkpoint)
        prompt = STYLES["qa"].encode_prompt(tokenizer, prompt_of(config.prompt, config.input))
        (ids,) = generate(tiny_model(), [prompt], config, tokenizer.stop_ids, tokenizer.size)
        text = tokenizer.decode(ids).removeprefix(" ")
        assert row["answer"] == text.partition("Q")[0]
        assert row["finish_reason"] == ("stop" if "Q" in text or len(ids) < 7 else "length")
    with pytest.raises(UsageError, match="exists already"):
        script.Config(prompts=path, out=tmp_path / "out.jsonl")


def test_a_file_of_prompts_may_hold_messages_and_tools(tmp_path):
    tool = {"type": "function", "function": {"name": "f"}}
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    spoken = [{"role": "user", "content": "Hi"}, called, {"role": "tool", "content": "1"}]
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"messages": spoken, "tools": [tool]}))
    ((place, asked, _),) = read_prompts(path, "Be brief.")
    assert place == f"{path}:1"
    assert [message.role for message in asked.messages] == ["system", "user", "assistant", "tool"]
    assert (asked.system, asked.variables) == ("Be brief.", {"tools": [tool]})
    path.write_text(json.dumps({"messages": [*spoken, {"role": "assistant", "content": "One."}]}))
    with pytest.raises(DataError, match=r"in\.jsonl:1: turn 4: the last prompt is answered already"):
        list(read_prompts(path))


def test_thoughts_and_calls_of_tools_are_shown_apart_from_the_answer(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    script = load_script("scripts/generate.py")
    own, tools = with_template(tiny_checkpoint, tmp_path / "own", TOOLED), tmp_path / "tools.json"
    tools.write_text(json.dumps([{"name": "get_weather"}]))
    called = {"name": "get_weather", "arguments": {"city": "Oslo"}}
    text = f"Hm.</think>Let me look.\n<tool_call>{json.dumps(called)}</tool_call>"
    asked = []

    def answer(model, prompts, *rest, **others):
        asked.extend(prompts)
        return [Tokenizer(own).encode(text, bos=False)] * len(prompts)

    monkeypatch.setattr("lit_qlora.generation.generate", answer)
    common = {"checkpoint_dir": own, "tools": tools, "max_new_tokens": 4}
    script.main(script.Config(prompt="Weather?", **common))
    shown = capsys.readouterr()
    assert shown.out == f"Let me look.\n{json.dumps(called)}\n"
    assert shown.err.startswith("Hm.\n\n")
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "Weather?"}))
    script.main(script.Config(prompts=tmp_path / "in.jsonl", **common))
    found = json.loads(capsys.readouterr().out)
    assert (found["answer"], found["reasoning"]) == ("Let me look.", "Hm.")
    assert json.loads(found["tool_calls"][0]["function"]["arguments"]) == called["arguments"]
    assert Tokenizer(own).decode(asked[0]) == "get_weather, Weather?|A:<think>"
    assert asked[0] == asked[1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "not valid JSON"), ("[5]", "a tool has the form"), ("5", "expected a list")],
)
def test_a_file_that_holds_no_tools_is_refused_before_anything_is_loaded(content, reason, tmp_path):
    script = load_script("scripts/generate.py")
    (tmp_path / "tools.json").write_text(content)
    with pytest.raises(DataError, match=rf"tools\.json: .*{reason}"):
        script.main(script.Config(checkpoint_dir=tmp_path, tools=tmp_path / "tools.json"))


def test_answers_of_a_command_that_was_stopped_are_not_made_again(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    script = load_script("scripts/generate.py")
    (tmp_path / "in.txt").write_text("".join(f"What is {i} plus 4?\n" for i in range(6)))
    made: list[int] = []

    def stopped_at(batch: int) -> None:
        made.clear()

        def counted(model, prompts, *arguments, **settings):
            if len(made) == batch:
                raise KeyboardInterrupt
            made.append(len(prompts))
            return generate(model, prompts, *arguments, **settings)

        monkeypatch.setattr("lit_qlora.generation.generate", counted)

    def config(out, **more):
        settings = {"max_new_tokens": 5, "do_sample": True, "num_return_sequences": 2, "batch_size": 2} | more
        return script.Config(
            checkpoint_dir=tiny_checkpoint, prompts=tmp_path / "in.txt", out=tmp_path / out, **settings
        )

    stopped_at(9)
    script.main(config("whole"))
    assert made == [2, 2, 2]
    stopped_at(0)
    with pytest.raises(KeyboardInterrupt):
        script.main(config("out", max_new_tokens=6))  # which leaves no answer for another command to mistake
    part = tmp_path / "out.part"
    assert not part.exists()
    for foreign in (b"caf\xe9 of somebody", b"caf\xe9\nof somebody\n{"):
        part.write_bytes(foreign)
        with pytest.raises(UsageError, match="Remove it, or give another --out"):
            script.main(config("out"))
        assert part.read_bytes() == foreign
    part.unlink()
    stopped_at(1)
    with pytest.raises(KeyboardInterrupt):
        script.main(config("out"))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(script.Config, "load", lambda self: pytest.fail("loaded before it was refused"))
    with pytest.raises(UsageError, match="holds the answers of another command"):
        script.main(config("out", max_new_tokens=6))
    monkeypatch.undo()
    with part.open("a") as file:
        file.write('{"2": [["torn')  # what a kill leaves
    stopped_at(9)
    script.main(config("out"))
    assert made == [2, 2]
    assert "2 prompts are answered in" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == (tmp_path / "whole").read_text()
    assert not part.exists()


def test_a_text_file_holds_a_prompt_a_line_and_each_gets_as_many_answers_as_asked_for(
    tiny_checkpoint, tmp_path, capsys
):
    script = load_script("scripts/generate.py")
    path = tmp_path / "in.txt"
    path.write_text("What is 3 plus 4?\n\n  And 5?\n")
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    script.main(script.Config(checkpoint_dir=tiny_checkpoint, prompts=path, **settings))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["What is 3 plus 4?"] * 2 + ["And 5?"] * 2
    assert rows[0]["answer"] != rows[1]["answer"]
    script.main(script.Config(checkpoint_dir=tiny_checkpoint, **settings))
    assert capsys.readouterr().out.count(script.BETWEEN) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompt"),
        ('{"instruction": "x"}\n{"output": "y"}\n', r"in.jsonl:2: no instruction and no prompt \(has: output\)"),
        ('{"instruction": "x"}\n{"inst\n', "in.jsonl:2: not valid JSON"),
        ('{"instruction": 5}\n', "in.jsonl:1: no instruction"),
        ("5\n", "in.jsonl:1: expected an object with instruction or prompt, found int"),
        ('{"instruction": "x", "input": NaN}\n', "in.jsonl:1: NaN is not JSON"),
    ],
)
def test_a_file_without_prompts_is_refused_with_the_line_before_anything_is_loaded(content, message, tmp_path):
    script = load_script("scripts/generate.py")
    path = tmp_path / "in.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        script.main(script.Config(checkpoint_dir=tmp_path / "absent", prompts=path))
    with pytest.raises(UsageError, match="not a file"):
        script.Config(prompts=tmp_path / "absent.jsonl")


def test_a_prompt_that_holds_no_character_is_refused_with_its_place(tiny_checkpoint, tmp_path):
    script = load_script("scripts/generate.py")
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "x"}\n{"prompt": "a \\ud800 b"}\n')
    with pytest.raises(UsageError, match=r"in\.jsonl:2: The prompt holds '\\ud800', which is no character"):
        script.main(script.Config(checkpoint_dir=tiny_checkpoint, prompts=path))
    with pytest.raises(UsageError, match=r"^The prompt holds '\\udcff', which is no character"):
        script.main(script.Config(checkpoint_dir=tiny_checkpoint, prompt="a \udcff b"))


def test_where_the_answers_cannot_go_is_known_before_anything_is_loaded(tmp_path):
    script = load_script("scripts/generate.py")
    path = tmp_path / "in.txt"
    path.write_text("Hi\n")
    with pytest.raises(ResourceError, match="cannot be made a folder"):
        script.main(script.Config(checkpoint_dir=tmp_path / "absent", prompts=path, out=path / "out.jsonl"))


@pytest.mark.parametrize("setting", [{"input": "x"}, {"prompt": "x"}])
def test_a_prompt_beside_a_file_of_prompts_is_refused(setting, tmp_path):
    path = tmp_path / "in.txt"
    path.write_text("Hi\n")
    with pytest.raises(UsageError, match="has no effect"):
        load_script("scripts/generate.py").Config(prompts=path, **setting)


def test_draft_tokens_without_a_draft_model_are_refused():
    with pytest.raises(UsageError, match="draft_checkpoint_dir"):
        load_script("scripts/generate.py").Config(draft_tokens=7)


def test_columns_that_json_does_not_know_are_written_as_text():
    script = load_script("scripts/generate.py")
    row = {"prompt": "x", "when": datetime.date(2024, 2, 29), "raw": b"ab"}
    (line,) = script.as_lines([(row, [(Answer("y"), 1, "stop")])])
    assert json.loads(line)["when"] == "2024-02-29"


def test_a_prompt_of_a_file_that_does_not_fit_is_named(tiny_checkpoint, tmp_path):
    script = load_script("scripts/generate.py")
    path = tmp_path / "in.txt"
    path.write_text("short\n" + "What is 3 plus 4?" * 30)
    with pytest.raises(UsageError, match=r"in.txt:2: The prompt has \d+ tokens"):
        script.main(script.Config(checkpoint_dir=tiny_checkpoint, prompts=path))


def test_a_draft_model_gives_the_same_answer(tiny_checkpoint, tmp_path, capsys):
    script = load_script("scripts/generate.py")
    draft = write_checkpoint(tmp_path / "draft", tiny_model(seed=5, n_layer=1))
    outputs = []
    for flags in ({}, {"draft_checkpoint_dir": draft}):
        if flags:
            with pytest.raises(CheckpointError, match="tokenizer"):
                script.main(script.Config(checkpoint_dir=tiny_checkpoint, **flags))
            (draft / "tokenizer.model").write_bytes((tiny_checkpoint / "tokenizer.model").read_bytes())
        script.main(
            script.Config(checkpoint_dir=tiny_checkpoint, prompt="What is 3 plus 4?", max_new_tokens=20, **flags)
        )
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    with pytest.raises(UsageError, match="cannot be assisted"):
        script.Config(draft_checkpoint_dir=draft, num_beams=2)


def test_a_draft_model_with_another_tokenizer_is_refused(tiny_checkpoint):
    script = load_script("scripts/generate.py")
    with pytest.raises(CheckpointError, match="has another tokenizer"):
        script.main(script.Config(checkpoint_dir=tiny_checkpoint, draft_checkpoint_dir=DEMO_CHECKPOINT))
