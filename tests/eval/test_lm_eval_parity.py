"""Our model and lm-eval's own `hf` model on the exported folder give the same answers to the same questions.

The tasks of the harness's users are read from lm-eval's own files, with data of the same columns made here.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from lit_qlora.convert.from_hugging_face import convert_hf_checkpoint
from lit_qlora.convert.to_hugging_face import export_hf
from lit_qlora.inference import InferenceConfig
from tests.conftest import load_script

tasks = load_script("eval/lm_eval_tasks.py")  # in this order: each imports those before it by name
lm_eval_model = load_script("eval/lm_eval_model.py")
harness = load_script("eval/lm_eval_harness.py")

CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' and loop.index > 1 %}"
    "{{ raise_exception('a system message comes first') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] | trim }}{% if not loop.last or add_generation_prompt or "
    "m['role'] != 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = ["mice", "grass", "fish", "12", "the owl", "a fox in the wood", "nothing at all", "345"]
SIZES = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
}
FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 24},
    "gpt_neox": {"use_parallel_residual": True},
}


def write_tokenizer(directory: Path, bos: bool) -> None:
    """A byte-level BPE tokenizer with control tokens and a chat template."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    control = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=control, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([f"Question: what does {a} eat?\nAnswer: {b}" for a in WORDS for b in WORDS], trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "chat_template": CHAT}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A checkpoint of ours as our model, and the folder that it is exported to as lm-eval's."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoConfig, AutoModelForCausalLM

    family = request.param
    root = tmp_path_factory.mktemp(family)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **FAMILIES[family]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.ndim == 1 and family != "gpt_neox"), 0.2)
    model.generation_config.bos_token_id, model.generation_config.eos_token_id = 0, 1
    model.config.bos_token_id, model.config.eos_token_id = 0, 1
    model.save_pretrained(root / "hf")
    write_tokenizer(root / "hf", bos=family != "gpt_neox")
    convert_hf_checkpoint(root / "hf", root / "ours")
    export_hf(root / "ours", root / "exported")
    loaded = InferenceConfig(checkpoint_dir=root / "ours", precision="32-true").load()
    return SimpleNamespace(
        theirs=HFLM(pretrained=str(root / "exported"), dtype="float32", device="cpu", batch_size=4),
        ours=lm_eval_model.GPTModel(loaded.model, loaded.tokenizer, style=loaded.style),
        tokenizer=loaded.tokenizer,
    )


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """lm-eval's tasks with data made here, and three of our own: long choices, answers in words, whole texts."""
    directory = tmp_path_factory.mktemp("tasks")
    known = tasks.lm_eval_task_files()

    def task(name: str, rows: dict[str, list[dict]], settings: dict) -> None:
        files = {}
        for split, content in rows.items():
            path = directory / f"{name}-{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
            files[split] = path.name
        data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        (directory / f"{name}.yaml").write_text(yaml.safe_dump({**settings, "task": f"my_{name}", **data}))

    def lm_eval(name: str, **rows: list[dict]) -> None:
        task(name, rows, {"include": str(known[name])})

    sums = [{"context": f"Question: What is {i} plus {i * 7}?\nAnswer:", "completion": f" {i * 8}"} for i in range(9)]
    lm_eval("arithmetic_2ds", validation=sums)
    lm_eval("arithmetic_4ds", validation=sums[::-1])
    pairs = [
        {"sentence_good": f"{a} eats {b}.", "sentence_bad": f"{b} is eaten {a}."}
        for a, b in zip(WORDS, WORDS[::-1], strict=True)
    ]
    lm_eval("blimp_causative", train=pairs)
    facts = [
        {"question": f"What eats {w}?", "choices": WORDS[i : i + 4], "answer": i % 4} for i, w in enumerate(WORDS[:5])
    ]
    lm_eval("mmlu_global_facts", test=facts, dev=facts)
    truths = [
        {
            "question": f"What does {w} eat?",
            "mc1_targets": {"choices": WORDS[i:] + WORDS[:i], "labels": [1, *[0] * 7]},
            "mc2_targets": {"choices": WORDS[i:] + WORDS[:i], "labels": [1, 1, 1, *[0] * 5]},
        }
        for i, w in enumerate(WORDS)
    ]
    lm_eval("truthfulqa_mc1", validation=truths)
    lm_eval("truthfulqa_mc2", validation=truths)
    own = {"test_split": "test", "fewshot_split": "test", "doc_to_text": "Question: what does {{q}} eat?\nAnswer:"}
    rows = [{"q": w * (1 + 9 * (i == 3)), "choices": WORDS[:4], "answer": i % 4} for i, w in enumerate(WORDS)]
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"}
    task("choice", {"test": rows}, own | choice | {"metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]})
    words = {"output_type": "generate_until", "doc_to_target": "{{choices[answer]}}"}
    stop = {"generation_kwargs": {"until": ["e", "\n\n"], "max_gen_toks": 24, "do_sample": False}}
    task("answer", {"test": rows}, own | words | stop | {"metric_list": [{"metric": "exact_match"}]})
    texts = [{"text": " ".join(WORDS[i:] * (i + 1))} for i in range(6)] + [{"text": "x"}]
    rolling = {
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
    }
    task("rolling", {"test": texts}, rolling | {"metric_list": [{"metric": "word_perplexity"}]})
    return directory


NAMES = ["arithmetic_2ds", "arithmetic_4ds", "blimp_causative", "mmlu_global_facts", "truthfulqa_mc1", "truthfulqa_mc2"]
OWN = ["choice", "answer", "rolling"]


def assert_equal(pair: SimpleNamespace, names: list[str], tasks_dir: Path, asking) -> None:
    """The same requests, log-likelihoods within 1e-3, the same texts, the same metrics."""
    names = [f"my_{name}" for name in names]
    theirs = harness.evaluate(pair.theirs, names, tasks_dir, asking, log_samples=True)
    ours = harness.evaluate(pair.ours, names, tasks_dir, asking, log_samples=True)
    for name in names:
        assert len(ours["samples"][name]) == len(theirs["samples"][name]) > 4
        for mine, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            assert mine["arguments"] == other["arguments"]
            for a, b in zip(flat(mine["resps"]), flat(other["resps"]), strict=True):
                assert a == (pytest.approx(b, abs=1e-3) if isinstance(b, float) else b), name
        for metric, value in theirs["results"][name].items():
            if not isinstance(value, str) and "stderr" not in metric:
                assert ours["results"][name][metric] == pytest.approx(value, rel=1e-5), (name, metric)


def flat(value) -> list:
    return [x for item in value for x in flat(item)] if isinstance(value, list) else [value]


def each_family_with(*settings):
    """Llama is tested with all of them by `make test`, each other family with one."""
    return [
        pytest.param(family, setting, marks=[] if family == "llama" or i == j % 2 else [pytest.mark.slow])
        for j, family in enumerate(FAMILIES)
        for i, setting in enumerate(settings)
    ]


@pytest.mark.parametrize(("pair", "shots"), each_family_with(0, 2), indirect=["pair"])
def test_tasks_of_lm_eval_give_what_the_hf_model_gives(pair, tasks_dir, shots):
    assert_equal(pair, NAMES, tasks_dir, harness.Asking(allow_code=True, num_fewshot=shots))


@pytest.mark.parametrize(("pair", "shots"), each_family_with(0, 3), indirect=["pair"])
def test_long_choices_answers_in_words_and_whole_texts_give_what_the_hf_model_gives(pair, tasks_dir, shots):
    assert_equal(pair, OWN, tasks_dir, harness.Asking(allow_code=True, num_fewshot=shots))


@pytest.mark.parametrize(("pair", "multiturn"), each_family_with(False, True), indirect=["pair"])
def test_questions_in_a_chat_template_give_what_the_hf_model_gives(pair, tasks_dir, multiturn):
    asking = harness.Asking(
        allow_code=True,
        num_fewshot=1,
        apply_chat_template=True,
        fewshot_as_multiturn=multiturn,
        system_instruction="Be brief.",
    )
    assert_equal(pair, ["choice", "answer", "mmlu_global_facts"], tasks_dir, asking)


def test_conversations_and_texts_with_control_tokens_become_the_same_ids(pair):
    chats = [
        [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": " a</s>b "}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b "}],
        [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, {"role": "user", "content": "c"}],
    ]
    for chat in chats:
        for begin in (True, False):
            text = pair.ours.apply_chat_template(chat, add_generation_prompt=begin)
            assert text == pair.theirs.apply_chat_template(chat, add_generation_prompt=begin)
            assert pair.ours.tok_encode(text) == pair.theirs.tok_encode(text)
    for text in ("<s>a", "a<s>", " a </s> b", "", "<|user|>x"):
        for special in (None, True, False):
            assert pair.ours.tok_encode(text, special) == pair.theirs.tok_encode(text, special), (text, special)


def test_whether_texts_begin_with_bos_can_be_said(pair, tasks_dir):
    from lm_eval.models.huggingface import HFLM

    # transformers adds no BOS to a tokenizer that has no rule for it, even if asked
    for bos in (True, False) if pair.tokenizer.use_bos else (False,):
        theirs = HFLM(pretrained=pair.theirs.model, tokenizer=pair.theirs.tokenizer, add_bos_token=bos, batch_size=4)
        ours = lm_eval_model.GPTModel(pair.ours.model, pair.tokenizer, add_bos=bos)
        both = SimpleNamespace(theirs=theirs, ours=ours)
        assert_equal(
            both,
            ["choice", "rolling", "answer"],
            tasks_dir,
            harness.Asking(
                allow_code=True,
            ),
        )
