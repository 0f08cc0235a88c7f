"""The words of the prompt styles. A style is a function that writes a prompt, and a row in WORDINGS.

Where a model's maker publishes a template, the style writes what it writes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lit_qlora.prompts.pieces import BOS, EOS, Control, Piece

Prompt = Callable[[str, str, str | None, bool], Sequence[Piece]]
"""(instruction, input, system or None, whether it is the first turn) -> the prompt, up to where the answer begins."""


@dataclass(frozen=True)
class Wording:
    """A row of WORDINGS."""

    prompt: Prompt
    gap: str = ""
    """Text that an answer begins with, such as a space."""
    tail: str = ""
    """Text that an answer ends with, before its control token."""
    end: Control | None = EOS


def with_input(instruction: str, input: str) -> str:
    """Both as one message, for styles that do not keep them apart."""
    return f"{instruction}\n{input}" if input else instruction


def after_system(system: str | None, text: str) -> str:
    """`text` behind a system message, for styles that have no words for one."""
    return f"{system}\n\n{text}" if system else text


def alpaca(instruction: str, input: str = "", system: str | None = None, first: bool = True) -> Sequence[Piece]:
    """The prompt of Stanford Alpaca. Taori et al. 2023."""
    if input:
        text = (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        )
    else:
        text = (
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Response:\n"
        )
    return [BOS, after_system(system, text)]


def alpaca_end(instruction: str, input: str = "", system: str | None = None, first: bool = True) -> Sequence[Piece]:
    """Alpaca's prompt with an empty line after each heading; its answers end with "### End"."""
    middle = f"\n\n### Input:\n\n{input}" if input else ""
    text = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n\n{instruction}{middle}\n\n### Response:\n"
    )
    return [BOS, after_system(system, text)]


def plain(instruction: str, input: str = "", system: str | None = None, first: bool = True) -> Sequence[Piece]:
    """The instruction and the input as they are, a line each."""
    return [BOS, after_system(system, f"{with_input(instruction, input)}\n")]


def qa(instruction: str, input: str = "", system: str | None = None, first: bool = True) -> Sequence[Piece]:
    """Question and answer, as in most few-shot evaluations."""
    return [BOS, after_system(system, f"Q: {with_input(instruction, input)}\nA:")]


def text(instruction: str, input: str = "", system: str | None = None, first: bool = True) -> Sequence[Piece]:
    """Nothing around the text; with raw text, which has no prompt, every token is labelled."""
    return [BOS, after_system(system, with_input(instruction, input))]


def guanaco(instruction: str, input: str = "", system: str | None = None, first: bool = True) -> Sequence[Piece]:
    """QLoRA's Guanaco. Dettmers et al. 2023."""
    asked = f"### Human: {with_input(instruction, input)}\n### Assistant:"
    return [BOS, after_system(system, asked)] if first else [f"\n{asked}"]


def vicuna(instruction: str, input: str = "", system: str | None = None, first: bool = True) -> Sequence[Piece]:
    """Vicuna 1.1 and later."""
    asked = f"USER: {with_input(instruction, input)} ASSISTANT:"
    introduction = (
        system
        if system is not None
        else (
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        )
    )
    return [BOS, f"{introduction} {asked}" if introduction else asked] if first else [asked]


def llama2(instruction: str, input: str = "", system: str | None = None, first: bool = True) -> Sequence[Piece]:
    """Llama 2 Chat."""
    head = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    return [BOS, f"[INST] {head}{with_input(instruction, input)} [/INST]"]


def mistral(instruction: str, input: str = "", system: str | None = None, first: bool = True) -> Sequence[Piece]:
    """Mistral Instruct; where the tokenizer has [INST] as a control token, it is one."""
    asked = after_system(system, with_input(instruction, input))
    inst, end = Control("[INST]", required=False), Control("[/INST]", required=False)
    return [*([BOS] if first else []), inst, f" {asked} ", end]


def llama3(instruction: str, input: str = "", system: str | None = None, first: bool = True) -> Sequence[Piece]:
    """Llama 3 Instruct."""
    start, close, end = Control("<|start_header_id|>"), Control("<|end_header_id|>"), Control("<|eot_id|>")
    head: list[Piece] = [start, "system", close, f"\n\n{system}", end] if system is not None else []
    asked: list[Piece] = [start, "user", close, f"\n\n{with_input(instruction, input)}", end]
    return [*([BOS] if first else []), *head, *asked, start, "assistant", close, "\n\n"]


def chatml(instruction: str, input: str = "", system: str | None = None, first: bool = True) -> Sequence[Piece]:
    """ChatML, as in Qwen and many others."""
    start, end = Control("<|im_start|>"), Control("<|im_end|>")
    head: list[Piece] = [start, f"system\n{system}", end, "\n"] if system is not None else []
    lead: list[Piece] = [BOS] if first else ["\n"]
    return [*lead, *head, start, f"user\n{with_input(instruction, input)}", end, "\n", start, "assistant\n"]


def zephyr(instruction: str, input: str = "", system: str | None = None, first: bool = True) -> Sequence[Piece]:
    """Zephyr and TinyLlama; EOS ends every message."""
    user, assistant = Control("<|user|>", required=False), Control("<|assistant|>", required=False)
    head: list[Piece] = [Control("<|system|>", required=False), f"\n{system}", EOS, "\n"] if system is not None else []
    lead: list[Piece] = [BOS] if first else ["\n"]
    return [*lead, *head, user, f"\n{with_input(instruction, input)}", EOS, "\n", assistant, "\n"]


def phi(instruction: str, input: str = "", system: str | None = None, first: bool = True) -> Sequence[Piece]:
    """Phi 1.5 and 2."""
    asked = f"Instruct: {with_input(instruction, input)}\nOutput:"
    return [BOS, after_system(system, asked)] if first else [f"\n{asked}"]


def phi3(instruction: str, input: str = "", system: str | None = None, first: bool = True) -> Sequence[Piece]:
    """Phi 3 and 3.5."""
    end = Control("<|end|>")
    head: list[Piece] = [Control("<|system|>"), f"\n{system}", end, "\n"] if system is not None else []
    lead: list[Piece] = [BOS] if first else ["\n"]
    asked = f"\n{with_input(instruction, input)}"
    return [*lead, *head, Control("<|user|>"), asked, end, "\n", Control("<|assistant|>"), "\n"]


def gemma(instruction: str, input: str = "", system: str | None = None, first: bool = True) -> Sequence[Piece]:
    """Gemma, which has no words for a system message; it goes before the first prompt."""
    start, end = Control("<start_of_turn>"), Control("<end_of_turn>")
    asked = after_system(system, with_input(instruction, input))
    lead: list[Piece] = [BOS] if first else ["\n"]
    return [*lead, start, f"user\n{asked}", end, "\n", start, "model\n"]


def knobs(
    text_system_start: str,
    text_prompt_start: str,
    text_answer_separator: str,
    add_eos_token_to_system: bool,
    add_eos_token_to_prompt: bool,
    add_eos_token_to_answer: bool,
) -> Wording:
    """The wording that H2O LLM Studio's settings of these names describe."""

    def prompt(instruction: str, input: str = "", system: str | None = None, first: bool = True) -> Sequence[Piece]:
        head: list[Piece] = [text_system_start + system] if system else []
        head += [EOS] if system and add_eos_token_to_system else []
        eos: list[Piece] = [EOS] if add_eos_token_to_prompt else []
        asked = text_prompt_start + with_input(instruction, input)
        return [*([BOS] if first else []), *head, asked, *eos, text_answer_separator]

    return Wording(prompt, end=EOS if add_eos_token_to_answer else None)


WORDINGS: dict[str, Wording] = {
    "alpaca": Wording(alpaca),
    "alpaca-end": Wording(alpaca_end, tail="\n### End"),
    "plain": Wording(plain),
    "qa": Wording(qa, gap=" "),
    "text": Wording(text),
    "guanaco": Wording(guanaco, gap=" "),
    "vicuna": Wording(vicuna, gap=" "),
    "llama2": Wording(llama2, gap=" ", tail=" "),
    "mistral": Wording(mistral, gap=" "),
    "llama3": Wording(llama3, end=Control("<|eot_id|>")),
    "chatml": Wording(chatml, end=Control("<|im_end|>")),
    "zephyr": Wording(zephyr),
    "phi": Wording(phi, gap=" "),
    "phi3": Wording(phi3, end=Control("<|end|>")),
    "gemma": Wording(gemma, end=Control("<end_of_turn>")),
}
