"""Generation: the cache, batches, sampling, limits; and the two scripts that use it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_qlora.errors import NumericalError, UsageError
from lit_qlora.generate import generate, room_for_answer, sample, stream, stream_text
from lit_qlora.model import GPT
from lit_qlora.settings import SamplingConfig
from lit_qlora.tokenizer import Tokenizer
from lit_qlora.use import check_style, choose_style, encode_prompt
from tests.conftest import ROOT, load_script, tiny_model

PROMPTS = [[5, 9, 200], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8, 8]]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Models this small only lose time to threads that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def greedy(count: int) -> SamplingConfig:
    return SamplingConfig(max_new_tokens=count)


def answer_without_cache(model: GPT, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window": 6},
        {"norm": "layer", "ffn": "gelu", "parallel_residual": True, "rope_fraction": 0.25, "n_kv_head": 4},
        {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_block_size": 32, "tied_head": True},
    ],
    ids=["llama", "sliding_window", "neox", "llama3_tied"],
)
def test_greedy_answers_with_a_cache_are_those_of_full_forward_passes(changes):
    model = tiny_model(**changes)
    answers = generate(model, PROMPTS, greedy(20), stop_ids=())
    assert answers == [answer_without_cache(model, prompt, 20) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in answers}) == len(PROMPTS)


def test_a_batch_of_unequal_prompts_is_answered_like_each_of_them_alone():
    model = tiny_model()
    together = generate(model, PROMPTS, greedy(30), stop_ids=(17, 40))
    assert together == [generate(model, [prompt], greedy(30), stop_ids=(17, 40))[0] for prompt in PROMPTS]


def test_a_stream_gives_what_generate_gives():
    model = tiny_model()
    sampling = SamplingConfig(max_new_tokens=25, temperature=1.0, top_k=20, seed=3)
    assert list(stream(model, PROMPTS[0], sampling, ())) == generate(model, PROMPTS[:1], sampling, ())[0]


def test_each_answer_ends_at_its_own_stop_id_without_it():
    model = tiny_model()
    full = generate(model, PROMPTS, greedy(12), stop_ids=())
    stops = {full[0][4], full[2][7]}
    for answer, whole in zip(generate(model, PROMPTS, greedy(12), stops), full, strict=True):
        end = next((i for i, token in enumerate(whole) if token in stops), len(whole))
        assert answer == whole[:end]
    assert list(stream(model, PROMPTS[0], greedy(12), {full[0][4]})) == full[0][: full[0].index(full[0][4])]


def test_an_answer_ends_where_the_caller_says_so():
    model = tiny_model()
    full = generate(model, PROMPTS, greedy(12), stop_ids=())
    answers = generate(model, PROMPTS, greedy(12), (), stop=lambda ids: len(ids) == 3)
    assert answers == [answer[:3] for answer in full]


def test_prompt_and_answer_never_exceed_the_context():
    model = tiny_model(block_size=16)
    answers = generate(model, PROMPTS, greedy(100), stop_ids=())
    assert [len(p) + len(a) for p, a in zip(PROMPTS, answers, strict=True)] == [16] * 4
    assert answers == [answer_without_cache(model, p, 16 - len(p)) for p in PROMPTS]
    assert room_for_answer(model, 15, 100) == 1


def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers():
    with pytest.raises(UsageError, match="16 tokens, and the model's context holds 16"):
        generate(tiny_model(block_size=16), [[1], [2] * 16], greedy(5), stop_ids=())


def test_an_empty_prompt_is_refused_and_no_prompts_have_no_answers():
    with pytest.raises(UsageError, match="empty"):
        list(stream(tiny_model(), [], greedy(5), ()))
    assert generate(tiny_model(), [], greedy(5), ()) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_beyond_the_tokenizer_are_never_chosen(temperature):
    model = tiny_model()
    with torch.no_grad():
        model.head.weight[250:] *= 10  # makes some of them likelier than all others
    sampling = SamplingConfig(max_new_tokens=20, temperature=temperature, seed=1)
    assert any(token >= 250 for answer in generate(model, PROMPTS, sampling, ()) for token in answer)
    answers = generate(model, PROMPTS, sampling, (), vocab_size=250)
    assert all(token < 250 for answer in answers for token in answer)


def test_training_goes_on_as_it_was_even_if_generation_fails():
    model = tiny_model().train()
    generate(model, PROMPTS, greedy(3), ())
    assert model.training
    assert model.blocks[0].training
    with torch.no_grad():
        model.head.weight[3] = torch.nan
    with pytest.raises(NumericalError):
        generate(model, PROMPTS, greedy(3), ())
    assert model.training
    answer = stream(tiny_model(), [1], greedy(3), ())
    next(answer)
    assert torch.is_grad_enabled()


def test_a_seed_fixes_the_answer():
    model = tiny_model()

    def answer(seed):
        return generate(model, PROMPTS, SamplingConfig(max_new_tokens=20, temperature=1.0, seed=seed), ())

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, PROBABILITIES),
        ({"temperature": 0.5}, PROBABILITIES**2),
        ({"top_k": 2}, torch.tensor([0, 0.4, 0, 0.3, 0])),
        ({"top_k": 100}, PROBABILITIES),
        ({"top_p": 0.6}, torch.tensor([0, 0.4, 0, 0.3, 0])),
        ({"top_p": 0.71}, torch.tensor([0, 0.4, 0, 0.3, 0.15])),
        ({"top_p": 1e-9}, torch.tensor([0, 1.0, 0, 0, 0])),
        ({"top_k": 3, "top_p": 0.8}, torch.tensor([0, 0.4, 0, 0.3, 0])),  # 0.4 / 0.85 and 0.3 / 0.85 reach 0.8
        ({"temperature": 1e-30}, torch.tensor([0, 1.0, 0, 0, 0])),
        ({"temperature": 0.0, "top_p": 0.5}, torch.tensor([0, 1.0, 0, 0, 0])),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_the_probabilities_that_are_left(settings, expected):
    draws = 20_000
    generator = torch.Generator().manual_seed(0)
    logits = (PROBABILITIES.log() + 7).expand(draws, -1)
    counts = sample(logits, SamplingConfig(**{"temperature": 1.0} | settings), generator).bincount(minlength=5)
    assert not counts[expected == 0].any()
    # Four standard deviations of a share of 20,000 draws are at most 0.0142.
    torch.testing.assert_close(counts / draws, expected / expected.sum(), rtol=0, atol=0.0142)


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: list[int]) -> str:
        """UTF-8."""
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("text", ["plain", "a 🦊 and é", "", " spaced", "\ufffd", "end\ufffd"])
def test_streamed_pieces_are_whole_characters_and_add_up_to_the_text(text):
    pieces = list(stream_text(Bytes(), text.encode()))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece or "\ufffd" in text for piece in pieces)


def test_a_character_that_was_never_finished_still_shows():
    assert "".join(stream_text(Bytes(), "ab🦊".encode()[:-1])) == "ab\ufffd"


def test_the_gap_before_an_answer_is_left_out_once():
    assert list(stream_text(Bytes(), b"  hi", gap=" ")) == [" ", "h", "i"]
    assert list(stream_text(Bytes(), b" ", gap=" ")) == []
    assert "".join(stream_text(Bytes(), b"hi", gap=" ")) == "hi"


def test_sentencepiece_streams_what_it_decodes(tiny_checkpoint):
    tokenizer = Tokenizer(tiny_checkpoint)
    ids = tokenizer.encode("What is 3 plus 4?\nA: 7 é🦊", bos=False)
    assert "".join(stream_text(tokenizer, iter(ids))) == tokenizer.decode(ids)


def test_auto_is_the_recorded_style_and_none_is_the_bare_text(tiny_checkpoint):
    tokenizer = Tokenizer(tiny_checkpoint)
    recorded = choose_style("qa", None)
    assert recorded is not None
    assert choose_style("auto", recorded) is recorded
    assert choose_style("none", recorded) is choose_style("auto", None) is None
    assert encode_prompt(tokenizer, None, "a", "b") == tokenizer.encode("a\nb")
    assert encode_prompt(tokenizer, recorded, "a", "b") == tokenizer.encode("Q: a\nb\nA:")
    with pytest.raises(UsageError, match="Did you mean alpaca"):
        check_style("alpca")


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
    (ids,) = generate(tiny_model(), [tokenizer.encode("What is 3 plus 4?")], greedy(12), tokenizer.stop_ids, 300)
    assert done.stdout == tokenizer.decode(ids).replace("\r", "\n") + "\n"  # a text pipe knows one kind of newline
    assert "tokens/s" in done.stderr
    assert "GiB" in done.stderr


def test_generate_explains_an_answer_that_the_context_cuts_off(tiny_checkpoint, capsys):
    script = load_script("scripts/generate.py")
    script.main(script.Config(checkpoint_dir=tiny_checkpoint, prompt="What is 3 plus 4?" * 5, max_new_tokens=500))
    assert "context of 96 tokens is full" in capsys.readouterr().err
    with pytest.raises(UsageError, match="context holds 96"):
        script.main(script.Config(checkpoint_dir=tiny_checkpoint, prompt="What is 3 plus 4?" * 30))


def chat(tiny_checkpoint: Path, *lines: str, **changes: object) -> object:
    script = load_script("scripts/chat.py")
    config = script.Config(checkpoint_dir=tiny_checkpoint, **{"max_new_tokens": 6} | changes)
    conversation = script.Conversation(config.load(), choose_style(config.style, None), config)
    for line in lines:
        conversation.answer(line)
    return conversation


def test_chat_answers_a_pipe_line_by_line(tiny_checkpoint):
    talk = "What is 1 plus 1?\n\n/help\n/reset\nWhat is 1 plus 1?\n/quit\nnever asked\n"
    done = run_script("chat", "--checkpoint_dir", tiny_checkpoint, "--max_new_tokens", 8, stdin=talk)
    assert done.returncode == 0, done.stderr
    assert ">" not in done.stdout.splitlines()[0][:1]
    half = len(done.stdout) // 2
    assert done.stdout[:half] == done.stdout[half:] != ""  # after /reset the same question has the same answer
    assert "/help is not a command" in done.stderr
    assert "forgotten" in done.stderr


def test_chat_remembers_turns_as_training_samples_one_behind_the_other(tiny_checkpoint, capsys):
    conversation = chat(tiny_checkpoint, "What is 1 plus 2?", "And 4?")
    first, second = conversation.turns
    tokenizer, model = conversation.tokenizer, conversation.model
    prompt = tokenizer.encode("What is 1 plus 2?")
    (answer,) = generate(model, [prompt], greedy(6), tokenizer.stop_ids, tokenizer.size)
    assert first == [*prompt, *answer, tokenizer.eos_id]
    following = tokenizer.encode("And 4?")
    (answer,) = generate(model, [first + following], greedy(6), tokenizer.stop_ids, tokenizer.size)
    assert second == [*following, *answer, tokenizer.eos_id]
    assert capsys.readouterr().out.count("\n") >= 2


def test_chat_forgets_the_oldest_turns_when_the_context_is_full_and_says_so(tiny_checkpoint, capsys):
    lines = [f"What is {a} plus {a}?" for a in range(12)]
    conversation = chat(tiny_checkpoint, *lines)
    assert "forgotten: the model's context holds 96 tokens" in capsys.readouterr().err
    remembered = [conversation.tokenizer.decode(turn) for turn in conversation.turns]
    assert 0 < len(remembered) < len(lines)
    assert all(text.startswith(line) for text, line in zip(remembered[::-1], lines[::-1], strict=False))
    before = list(conversation.turns)
    with pytest.raises(UsageError, match="context holds 96"):
        conversation.answer("What is 1 plus 1?" * 30)
    assert conversation.turns == before  # a line that cannot be answered costs no memory


def test_ctrl_c_ends_the_answer_and_not_the_chat(tiny_checkpoint, capsys, monkeypatch):
    conversation = chat(tiny_checkpoint, max_new_tokens=50)
    real, calls = conversation.tokenizer.decode, []

    def impatient(ids):
        calls.append(len(ids))
        if len(ids) == 4:
            raise KeyboardInterrupt
        return real(ids)

    monkeypatch.setattr(conversation.tokenizer, "decode", impatient)
    conversation.answer("What is 1 plus 2?")
    assert calls == [1, 2, 3, 4]
    (turn,) = conversation.turns
    assert len(turn) == len(conversation.tokenizer.encode("What is 1 plus 2?")) + 4 + 1
    assert not conversation.model.training


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
