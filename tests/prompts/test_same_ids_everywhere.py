"""Training, generate, chat, serve and lm-eval show a model the same ids: kinds of tokenizers x styles x conversations.

Each goes through its own command up to the model, which is none here; tests/prompts/test_same_ids.py does it with one.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lit_qlora.data import Encoder, Encoding, Example
from lit_qlora.data.messages import conversation_of
from lit_qlora.errors import UsageError
from lit_qlora.inference import LoadedModel
from lit_qlora.prompts.style import STYLES, Style, TemplateStyle
from lit_qlora.prompts.tokenizer import Tokenizer
from tests.conftest import ROOT, load_script, tiny_model
from tests.prompts.test_style import TEMPLATES as WORDED_TEMPLATES
from tests.prompts.test_style import write_chatty_tokenizer
from tests.prompts.test_tokenizer_parity import KINDS, fast
from tests.prompts.test_tools import KIND, TEMPLATES, WITHOUT_TOOLS

pytest.importorskip("fastapi", reason="the server is an extra: pip install 'lit_qlora[serve]'")

ROOM = 100_000
TEXTS = ["Hi, who are you?", "  two spaces  ", "1234567890\n\n\tx = {y}", "\u00e9\u4f60\u597d \U0001f98a e\u0301", "a"]
BARE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}\n{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)
MODEL = SimpleNamespace(config=SimpleNamespace(block_size=ROOM))


def chatty(directory: Path) -> None:
    """A byte-level tokenizer with the control tokens of every style."""
    write_chatty_tokenizer(directory)


def styles_of(kind: str) -> dict[str, Style]:
    """Styles for a kind of tokenizer."""
    templates = {"bare": BARE} | (WORDED_TEMPLATES | {k: v for k, v in TEMPLATES.items() if k in WITHOUT_TOOLS}
                                  if kind == "chatty" else {})  # fmt: skip
    return dict(STYLES) | {f"template {name}": TemplateStyle(source) for name, source in templates.items()}


def talks() -> list[list[dict[str, Any]]]:
    """Conversations of one turn and of two, told something or not."""
    found = []
    for i, text in enumerate(TEXTS):
        other = TEXTS[i - 1]
        one = [{"role": "user", "content": text}, {"role": "assistant", "content": other}]
        two = [*one, {"role": "user", "content": other}, {"role": "assistant", "content": text}]
        found += [one, KIND + two]
    return found


class Asked:
    """What each of the commands asks a model in a style."""

    def __init__(self, tokenizer: Tokenizer, style: Style, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokenizer, self.style, self.monkeypatch = tokenizer, style, monkeypatch
        self.chat_script = load_script("scripts/chat.py")
        self.roster = SimpleNamespace(
            model=MODEL, tokenizer=tokenizer, names=["m"], styles={"m": style}, adapter=lambda name: None
        )

    def in_training(self, messages: list[Any]) -> list[int]:
        """The ids before the last answer."""
        said = conversation_of(messages, {})
        encoder = Encoder(self.tokenizer, self.style, Encoding(max_length=ROOM))
        *_, last = encoder.encode([Example(said.messages, location="a:1")])
        trained = last.sample.trained.tolist()
        end = max(i for i in range(1, len(trained)) if trained[i] and not trained[i - 1])
        return last.sample.tokens[:end].tolist()

    def by_generate(self, rows: list[list[Any]], path: Path) -> list[list[int]]:
        """The ids of prompts in a file."""
        import json

        path.write_text("".join(json.dumps({"messages": messages[:-1]}) + "\n" for messages in rows))
        script, asked = load_script("scripts/generate.py"), {}
        encode = script.encode_prompt

        def kept(*given: Any) -> list[int]:
            asked[len(asked)] = encode(*given)
            return asked[len(asked) - 1]

        script.encode_prompt = kept
        script.Config.load = lambda self, *_: LoadedModel(model=MODEL, tokenizer=self_tokenizer, style=self_style)
        self_tokenizer, self_style = self.tokenizer, self.style
        self.monkeypatch.setattr("lit_qlora.generation.generate", lambda model, prompts, *_, **__: [[]] * len(prompts))
        script.main(script.Config(prompts=path, style="auto"))
        return list(asked.values())

    def by_chat(self, messages: list[Any]) -> list[int]:
        """The ids of a chat."""
        script = self.chat_script
        said = conversation_of(messages, {})
        turns = [m for m in said.messages if m.role in ("user", "assistant")]
        chat = script.Conversation(self.roster, script.Config(system=said.system or ""))
        past = [script.Turn(tuple(turns[i : i + 2])) for i in range(0, len(turns) - 2, 2)]
        ids, kept = chat.prompt("m", script.Turn.of(turns[-2].text), past)
        assert kept == past
        return ids

    def by_serve(self, messages: list[Any]) -> list[int]:
        """The ids of a request."""
        from lit_qlora.serve.app import _Server
        from lit_qlora.serve.protocol import read_order

        server: Any = object.__new__(_Server)
        server.roster, server.context = self.roster, ROOM
        (question,) = server._questions(read_order({"model": "m", "messages": messages[:-1]}, chat=True))
        return list(question.prompt)

    def by_lm_eval(self, lm: Any, messages: list[Any]) -> list[int]:
        """The ids of a task that is asked as a chat."""
        ids: list[int] = lm.tok_encode(lm.apply_chat_template(messages[:-1]), add_special_tokens=False)
        return ids


def joins(kind: str, name: str, messages: list[Any]) -> bool:
    """Tell if one text, which is all that lm-eval knows, would join an earlier answer with what is around it."""
    past = [message["content"] for message in messages[:-2] if message["role"] == "assistant"]
    bare = name == "text" or kind == "SentencePiece unigram"  # which takes a new line for a space
    return any(bare or text != text.strip() for text in past)


QUICK = ("BPE, bytes",)


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in (*KINDS, "chatty")]
)
def test_all_commands_show_the_same_ids(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "eval")
    from lm_eval_model import GPTModel

    theirs = (KINDS | {"chatty": fast(chatty)})[kind](tmp_path)
    tokenizer, model = Tokenizer(tmp_path), tiny_model()
    compared = 0
    for name, style in styles_of(kind).items():
        asked, lm = Asked(tokenizer, style, monkeypatch), GPTModel(model, tokenizer, style=style)
        try:
            rows = [(messages, asked.in_training(messages)) for messages in talks()]
        except UsageError:
            assert kind != "chatty"  # its control tokens are those of every style
            continue
        assert asked.by_generate([messages for messages, _ in rows], tmp_path / "in.jsonl") == [ids for _, ids in rows]
        for messages, ids in rows:
            assert asked.by_chat(messages) == ids, name
            assert asked.by_serve(messages) == ids, name
            assert joins(kind, name, messages) or asked.by_lm_eval(lm, messages) == ids, name
            if isinstance(style, TemplateStyle) and (tmp_path / "tokenizer.json").exists():  # else theirs is a stand-in
                theirs.chat_template = style.source
                given = {
                    "bos_token": tokenizer.content(tokenizer.bos_id),
                    "eos_token": tokenizer.content(tokenizer.eos_id),
                }
                found = theirs.apply_chat_template(
                    messages[:-1], add_generation_prompt=True, return_dict=False, **given
                )
                assert list(found) == ids, name
        compared += len(rows)
    assert compared >= (200 if kind == "chatty" else 100)
