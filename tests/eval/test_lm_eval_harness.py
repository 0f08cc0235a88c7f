"""Evaluation: our model against lm-eval's own on the same weights, and how tasks are found."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lit_qlora.errors import DataError, UsageError
from lit_qlora.evaluate import score
from lit_qlora.prompts.tokenizer import Tokenizer
from tests.conftest import ROOT, load_script, tiny_config, tiny_model

tasks = load_script("eval/lm_eval_tasks.py")  # in this order: each imports those before it by name
lm_eval_model = load_script("eval/lm_eval_model.py")
load_script("eval/lm_eval_sandbox.py")
harness = load_script("eval/lm_eval_harness.py")
ALLOWED = harness.Asking(allow_code=True)  # QUIZ calls a function

TEXT = "The fox eats mice in the forest. Was it 12 or 345 of them? Nobody knows, said the owl: é, 🦊, \n\n and so on."
HF_NAMES = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
    "attn.query": "self_attn.q_proj",
    "attn.key": "self_attn.k_proj",
    "attn.value": "self_attn.v_proj",
    "attn.projection": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


def hf_name(name: str) -> str:
    path = name.removesuffix(".weight")
    if path.startswith("blocks."):
        _, i, layer = path.split(".", 2)
        return f"model.layers.{i}.{HF_NAMES[layer]}.weight"
    return f"{HF_NAMES[path]}.weight"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Models this small only lose time to threads that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer that begins texts with <s>."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    directory = tmp_path_factory.mktemp("tokenizer")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return directory


@pytest.fixture(scope="module")
def pair(tokenizer_dir: Path) -> SimpleNamespace:
    """The same random Llama as lm-eval's HFLM and as ours."""
    from lm_eval.models.huggingface import HFLM
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(tokenizer_dir)
    model = tiny_model(std=0.2, vocab_size=tokenizer.size)
    c = model.config
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.n_embd,
        intermediate_size=c.ffn_size,
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head,
        head_dim=c.head_size,
        max_position_embeddings=c.block_size,
        rms_norm_eps=c.norm_eps,
        bos_token_id=0,
        eos_token_id=1,
    )
    theirs = LlamaForCausalLM(config)
    theirs.load_state_dict({hf_name(name): weight for name, weight in model.state_dict().items()})
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_dir / "tokenizer.json"), **names)
    settings = {"pretrained": theirs.eval(), "tokenizer": fast, "batch_size": 3, "device": "cpu"}
    return SimpleNamespace(
        theirs=HFLM(**settings),
        ours=lm_eval_model.GPTModel(model, tokenizer, batch_size=3),
    )


def requests(*arguments: tuple) -> list:
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, args, i, ("task", i, 1)) for i, args in enumerate(arguments)]


PAIRS = [
    ("The fox eats", " mice"),
    ("The fox eats", " frogs in the garden"),
    ("The fox eats ", "mice"),  # the space belongs to the continuation
    ("", "The owl"),
    ("Was it 12 or", " 345"),
    ("Was it 12 or", " 346"),
    ("x", "é🦊"),
    (TEXT * 3, " the end"),  # longer than the context
    ("Nobody knows\n\n", "said"),
]


def test_log_likelihoods_are_those_of_lm_evals_own_model(pair):
    expected = pair.theirs.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    actual = pair.ours.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    assert [x[0] for x in actual] == pytest.approx([x[0] for x in expected], abs=1e-3)
    assert [x[1] for x in actual] == [x[1] for x in expected]


def test_the_likeliest_continuation_is_marked_as_greedy(pair):
    (answer,) = pair.ours.generate_until(requests(("The fox eats", {"max_gen_toks": 1})), disable_tqdm=True)
    (score,) = pair.ours.loglikelihood(requests(("The fox eats", answer)), disable_tqdm=True)
    assert score[1]
    (expected,) = pair.theirs.loglikelihood(requests(("The fox eats", answer)), disable_tqdm=True)
    assert score == pytest.approx(expected, abs=1e-3)


def test_a_text_begins_with_one_bos_and_never_with_two(pair):
    assert pair.ours.tok_encode("The owl") == pair.theirs.tok_encode("The owl")
    assert pair.ours.tok_encode("The owl").count(0) == 1
    context, continuation = pair.ours._encode_pair("The", " owl")
    assert context.count(0) == 1
    assert continuation.count(0) == 0
    assert pair.ours.prefix_token_id == pair.theirs.prefix_token_id == 0


def test_rolling_log_likelihoods_are_those_of_lm_evals_own_model(pair):
    texts = [(TEXT,), (TEXT * 4,), ("a",), ("",)]
    expected = pair.theirs.loglikelihood_rolling(requests(*texts), disable_tqdm=True)
    actual = pair.ours.loglikelihood_rolling(requests(*texts), disable_tqdm=True)
    assert actual == pytest.approx(expected, abs=1e-3)
    assert len(pair.ours.tok_encode(TEXT * 4)) > 2 * pair.ours.max_length


def test_greedy_answers_are_those_of_lm_evals_own_model(pair):
    prompts = ["The fox eats", "x", "Was it 12 or 345 of them?", TEXT * 3, "Nobody"]
    (first,) = pair.ours.generate_until(requests(("The fox eats", {"max_gen_toks": 24})), disable_tqdm=True)
    stop = first[5:7]
    for settings in ({"until": []}, {"until": [stop]}, {"until": [stop, "e"], "do_sample": False}):
        asked = requests(*((prompt, settings | {"max_gen_toks": 24}) for prompt in prompts))
        expected = pair.theirs.generate_until(asked, disable_tqdm=True)
        actual = pair.ours.generate_until(asked, disable_tqdm=True)
        assert actual == expected
    assert all("e" not in answer for answer in actual)


def test_batches_do_not_change_scores(pair):
    alone = lm_eval_model.GPTModel(pair.ours.model, pair.ours.tokenizer, batch_size=1)
    together = lm_eval_model.GPTModel(pair.ours.model, pair.ours.tokenizer, batch_size=100)
    one, many = (lm.loglikelihood(requests(*PAIRS), disable_tqdm=True) for lm in (alone, together))
    assert [x[0] for x in one] == pytest.approx([x[0] for x in many], abs=1e-4)


def test_scores_do_not_depend_on_how_many_logits_exist_at_a_time(pair, monkeypatch):
    whole = pair.ours.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    monkeypatch.setattr(score, "LOGITS_AT_ONCE", 3 * pair.ours.model.config.vocab_size)
    parts = pair.ours.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    assert [x[0] for x in parts] == pytest.approx([x[0] for x in whole], abs=1e-5)


def test_choices_that_differ_in_their_last_token_cost_one_input(pair, monkeypatch):
    rows, scorer = [], pair.ours.scorer
    hidden = scorer.hidden
    monkeypatch.setattr(scorer, "hidden", lambda x, **how: rows.append(x.shape) or hidden(x, **how))
    pair.ours.loglikelihood(requests(*(("The fox", letter) for letter in "ABCD")), disable_tqdm=True)
    assert rows == [(1, len(pair.ours.tok_encode("The fox")))]


def test_what_does_not_fit_is_cut_from_the_left_and_counted(pair):
    lm = lm_eval_model.GPTModel(pair.ours.model, pair.ours.tokenizer)
    lm.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    assert lm.truncated == 1
    lm.generate_until(requests((TEXT * 3, {"max_gen_toks": 4}), ("x", {"max_gen_toks": 4})), disable_tqdm=True)
    assert lm.truncated == 2
    assert lm.shortened == 0
    (answer,) = lm.generate_until(requests(("x", {"max_gen_toks": 1000, "until": "\n"})), disable_tqdm=True)
    assert lm.shortened == 1
    assert "\n" not in answer
    with pytest.raises(DataError, match="holds 96"):
        lm.loglikelihood(requests(("x", TEXT * 3)), disable_tqdm=True)


def test_a_context_of_spaces_and_an_empty_continuation_are_scored(pair):
    scores = pair.ours.loglikelihood(requests((" ", "mice"), ("The fox", "")), disable_tqdm=True)
    (expected,) = pair.ours.loglikelihood(requests(("", " mice")), disable_tqdm=True)
    assert scores[0] == pytest.approx(expected, abs=1e-5)
    assert scores[1] == (0.0, True)


def test_an_unknown_generation_setting_is_named(pair, capsys):
    pair.ours.generate_until(requests(("x", {"max_gen_toks": 2, "num_beams": 2, "watermark": 4})), disable_tqdm=True)
    assert capsys.readouterr().err == "Not understood, so left out of the generation: watermark.\n"


def test_fewer_answers_are_made_at_once_where_memory_is_short(pair, monkeypatch):
    asked = requests(*((f"The fox {i}", {"max_gen_toks": 4}) for i in range(7)))
    expected = pair.ours.generate_until(asked, disable_tqdm=True)
    generate, sizes = lm_eval_model.generate, []

    def short(model, prompts, *args, **settings):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError
        return generate(model, prompts, *args, **settings)

    monkeypatch.setattr(lm_eval_model, "generate", short)
    lm = lm_eval_model.GPTModel(pair.ours.model, pair.ours.tokenizer)
    assert lm.generate_until(asked, disable_tqdm=True) == expected
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    with pytest.raises(torch.OutOfMemoryError):
        lm_eval_model.GPTModel(pair.ours.model, pair.ours.tokenizer, 7).generate_until(asked, disable_tqdm=True)


def test_sampled_answers_follow_the_seed(pair):
    asked = requests(("The fox", {"max_gen_toks": 20, "do_sample": True, "temperature": 1.0}))

    def answer(seed):
        lm = lm_eval_model.GPTModel(pair.ours.model, pair.ours.tokenizer, seed=seed)
        return lm.generate_until(asked, disable_tqdm=True)

    assert answer(1) == answer(1) != answer(2)


QUIZ = """\
task: quiz
dataset_path: json
dataset_kwargs:
  data_files:
    test: data/quiz.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
process_docs: !function quiz_utils.keep
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 2.0
"""
OPEN_QUIZ = """\
include: quiz.yaml
task: open_quiz
tag: [quizzes]
output_type: generate_until
doc_to_choice: null
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {max_gen_toks: 5, until: ["\\n"]}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def quiz_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tasks with their data and code beside them, and a working directory elsewhere."""
    directory = tmp_path / "mine"
    (directory / "data").mkdir(parents=True)
    (directory / "quiz.yaml").write_text(QUIZ)
    (directory / "open_quiz.yaml").write_text(OPEN_QUIZ)
    (directory / "quiz_utils.py").write_text("def keep(docs):\n    return docs\n")
    write_quiz(directory, [i % 4 for i in range(20)])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return directory


def write_quiz(directory: Path, answers: list[int]) -> None:
    rows = [
        {"question": f"What is {i}?", "choices": ["mice", "grass", "fish", "12"], "answer": answer}
        for i, answer in enumerate(answers)
    ]
    (directory / "data" / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_results_have_lm_evals_schema_and_nothing_of_the_machine(pair, quiz_dir):
    results = harness.evaluate(pair.ours, ["quiz", "open_quiz"], quiz_dir, harness.Asking(limit=12, allow_code=True))
    assert {"results", "configs", "versions", "n-shot", "n-samples", "higher_is_better", "config"} <= set(results)
    assert results["versions"]["quiz"] == 2.0
    assert results["n-samples"]["quiz"] == {"original": 20, "effective": 12}
    assert 0 <= results["results"]["quiz"]["acc,none"] <= 1
    assert results["results"]["quiz"]["acc_stderr,none"] > 0
    assert 0 <= results["results"]["open_quiz"]["exact_match,none"] <= 1
    written = json.dumps(results, allow_nan=False)
    assert "/" not in json.dumps(results["configs"]["quiz"]["dataset_kwargs"]).replace("data/quiz.jsonl", "")
    assert str(quiz_dir) not in written
    assert "env_info" not in written
    assert "|quiz" in harness.table(results)


def test_a_changed_data_file_gives_changed_results(pair, quiz_dir):
    path = quiz_dir / "data" / "quiz.jsonl"
    before, accuracies = path.stat(), []
    for answer in range(4):
        write_quiz(quiz_dir, [answer] * 20)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # the same size and time as all the others
        accuracies.append(harness.evaluate(pair.ours, ["quiz"], quiz_dir, ALLOWED)["results"]["quiz"]["acc,none"])
    assert sum(accuracies) == pytest.approx(1)  # each question's answer was right once


def test_few_shot_examples_are_given_unless_the_task_fixes_none(pair, quiz_dir, capsys):
    text = QUIZ.replace("test_split: test", "test_split: test\nfewshot_split: test\nnum_fewshot: 0")
    (quiz_dir / "fixed.yaml").write_text(text.replace("task: quiz", "task: fixed"))
    results = harness.evaluate(
        pair.ours, ["quiz", "fixed"], quiz_dir, harness.Asking(num_fewshot=2, limit=4, allow_code=True)
    )
    assert results["n-shot"] == {"quiz": 2, "fixed": 0}
    assert "fixed is made for no examples" in capsys.readouterr().err


def test_missing_data_is_named_with_its_path(pair, quiz_dir):
    (quiz_dir / "data" / "quiz.jsonl").unlink()
    with pytest.raises(DataError, match=f"{quiz_dir}/data/quiz.jsonl"):
        harness.evaluate(pair.ours, ["quiz"], quiz_dir, ALLOWED)


def test_damaged_data_is_an_error_of_the_data(pair, quiz_dir):
    (quiz_dir / "data" / "quiz.jsonl").write_text('{"question": "a"\n')
    with pytest.raises(DataError, match="quiz"):
        harness.evaluate(pair.ours, ["quiz"], quiz_dir, ALLOWED)


def test_data_of_lm_evals_tasks_that_cannot_be_reached_is_an_error_of_the_data(pair, monkeypatch):
    import datasets

    def unreachable(**_):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match="arithmetic_2ds cannot be loaded: ConnectionError: no route"):
        harness.evaluate(pair.ours, ["arithmetic_2ds"])


def test_a_file_that_is_not_yaml_is_named(quiz_dir):
    (quiz_dir / "bad.yaml").write_text("task: [unclosed\n")
    with pytest.raises(UsageError, match=r"bad\.yaml"), tasks.overlay(quiz_dir):
        pass


def test_data_files_are_absolute_in_the_overlay_and_urls_stay(tmp_path):
    import yaml

    text = (
        "task: x\ndataset_kwargs:\n  data_files: {test: [a.jsonl, /b.jsonl], train: 'https://c/d'}\nf: !function u.g\n"
    )
    (tmp_path / "x.yaml").write_text(text)
    rewritten = tasks.with_absolute_paths(tmp_path / "x.yaml", tmp_path / "cache")
    assert "!function 'u.g'" in rewritten or "!function u.g" in rewritten
    kwargs = yaml.safe_load(rewritten.replace("!function", ""))["dataset_kwargs"]
    assert kwargs["data_files"] == {"test": [f"{tmp_path}/a.jsonl", "/b.jsonl"], "train": "https://c/d"}
    assert kwargs["cache_dir"] == str(tmp_path / "cache")


def test_names_of_lm_eval_03_still_work(capsys):
    assert tasks.resolve(["truthfulqa_mc", "hendrycksTest-global_facts", "truthfulqa_mc1"], None) == [
        "truthfulqa_mc1",
        "truthfulqa_mc2",
        "mmlu_global_facts",
    ]
    assert "truthfulqa_mc is called truthfulqa_mc1 and truthfulqa_mc2 today" in capsys.readouterr().err


FORMS = {
    "flow": "{task: quiz, tag: [quizzes, 'short ones'], dataset_path: json}",
    "json": '{"task": "quiz",\n "tag": ["quizzes", "short ones"]}',
    "anchors": "task: &name quiz\ntag:\n- quizzes\n- short ones\ndescription: |\n  task: other\n",
    "next line": '? task\n: quiz\n"tag" :\n  [quizzes,\n   short ones]\n',
    "included": "include: base\ndataset_path: json\n",
    "merged": "<<: {task: quiz, tag: [quizzes, short ones]}\n",
    "beginning": "%YAML 1.1\n---\ntask: !!str quiz\ntag: [quizzes, short ones]  # both\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_task_file_in_any_form_of_yaml_is_found_as_lm_eval_finds_it(form, tmp_path):
    from lm_eval.tasks._index import Kind, TaskIndex

    (tmp_path / "a.yaml").write_text(FORMS[form])
    (tmp_path / "base").write_text("task: quiz\ntag: [quizzes, short ones]\ninclude: base\n")
    found = tasks.task_files(tmp_path)
    assert found == {"quiz": tmp_path / "a.yaml", "quizzes": None, "short ones": None}
    if form != "included":  # lm-eval goes round and round where a file includes itself
        index = TaskIndex.build([tmp_path])
        assert {name: entry.kind for name, entry in index.items()} == {
            name: Kind.TASK if path else Kind.TAG for name, path in found.items()
        }


def test_groups_and_broken_files_are_found_by_their_names(tmp_path):
    (tmp_path / "a.yaml").write_text('{"group": "all", "task": ["quiz"]}')
    (tmp_path / "b.yaml").write_text("task: quiz\nx: [\n")
    (tmp_path / "c.yaml").write_text("- task: no\n")
    assert tasks.task_files(tmp_path) == {"all": None, "quiz": tmp_path / "b.yaml"}


def test_an_unknown_task_is_refused_with_the_nearest_names(quiz_dir):
    with pytest.raises(UsageError, match=r"'quizz' is neither .* Did you mean quiz\? Your own: open_quiz, quiz"):
        tasks.resolve(["quizz"], quiz_dir)
    with pytest.raises(UsageError, match="Did you mean arithmetic_2ds"):
        tasks.resolve(["arithmetic_2dss"], quiz_dir)
    with pytest.raises(UsageError, match="nowhere is not a directory"):
        tasks.resolve(["quiz"], quiz_dir / "nowhere")


def test_the_quick_search_knows_tasks_groups_and_tags():
    known = tasks.lm_eval_task_files()
    assert known["arithmetic_2ds"].name == "arithmetic_2ds.yaml"
    assert "mmlu" in known
    assert known["mmlu"] is None  # a group
    assert known["ai2_arc"] is None  # a tag


def test_a_score_within_noise_of_chance_is_marked():
    def results(accuracy, truncated=0):
        figures = {"accuracy": accuracy, "chance": 0.25, "noise": 0.05, "questions": 300}
        return {"chance": {"quiz": figures}, "config": {"truncated_requests": truncated, "shortened_answers": 0}}

    assert "quiz: an accuracy of 0.290 is within noise of chance, 0.250" in harness.remarks(results(0.29))[0]
    assert "within noise" in harness.remarks(results(0.21))[0]
    assert harness.remarks(results(0.31)) == []
    assert "3 requests" in harness.remarks(results(0.31, truncated=3))[0]


def test_chance_is_the_mean_over_questions_of_one_in_so_many_choices():
    docs = [["a", "b"]] * 50 + [["a", "b", "c", "d"]] * 50
    task = SimpleNamespace(
        OUTPUT_TYPE="multiple_choice",
        config=SimpleNamespace(process_results=None),
        multiple_target=0,
        instances=[SimpleNamespace(doc_id=i, doc=doc) for i, doc in enumerate(docs) for _ in doc],
        doc_to_choice=lambda doc: doc,
    )
    figures = harness.against_chance(task, {"acc,none": 0.5})
    assert figures == {
        "accuracy": 0.5,
        "chance": 0.375,
        "noise": pytest.approx(2 * (50 * 0.25 + 50 * 0.1875) ** 0.5 / 100),
        "questions": 100,
    }
    task.OUTPUT_TYPE = "generate_until"
    assert harness.against_chance(task, {"acc,none": 0.5}) is None


def test_results_replace_results_only_and_never_leave_half_a_file(tmp_path):
    path = tmp_path / "a" / "results.json"
    harness.check_replaceable(path)
    harness.save({"results": {}}, path)
    harness.check_replaceable(path)
    with pytest.raises(TypeError):
        harness.save({"results": object()}, path)
    assert json.loads(path.read_text()) == {"results": {}}
    assert list(path.parent.iterdir()) == [path]
    for other in (tmp_path, tmp_path / "model_config.json"):
        if not other.exists():
            tiny_config().save(tmp_path)
        with pytest.raises(UsageError, match="Name another"):
            harness.check_replaceable(other)


def test_the_newest_merged_model_is_evaluated_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert harness.newest_merged() == harness.DEMO_CHECKPOINT
    for age, name in ((10, "newer"), (20, "older")):
        merged = Path("out/lora") / name / "merged"
        merged.mkdir(parents=True)
        tiny_config().save(merged)
        os.utime(merged, (1e9 - age, 1e9 - age))
    assert harness.newest_merged() == Path("out/lora/newer/merged")
    assert harness.default_save_filepath(harness.newest_merged(), None) == Path("out/lora/newer/results.json")
    assert harness.default_save_filepath(Path("a/b"), Path("out/x/final")) == Path("out/x/results.json")
    assert harness.default_save_filepath(Path("checkpoints/a/b"), None) == Path("out/eval/b/results.json")


def run_harness(*flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "eval/lm_eval_harness.py", *map(str, flags)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, env=env, timeout=120, check=False)


def test_the_command_writes_results_and_prints_a_table(tiny_checkpoint, quiz_dir, tmp_path):
    out = tmp_path / "results.json"
    flags = (
        "--eval_tasks",
        "[quiz]",
        "--include_path",
        quiz_dir,
        "--save_filepath",
        out,
        "--limit",
        8,
        "--allow_code",
        "true",
    )
    done = run_harness("--checkpoint_dir", tiny_checkpoint, *flags, "--quantize", "bnb.nf4")
    assert done.returncode == 0, done.stderr
    assert "|quiz" in done.stdout
    assert "within noise of chance" in done.stdout
    assert str(out) in done.stderr
    results = json.loads(out.read_text())
    assert results["config"]["model_args"]["quantize"] == "bnb.nf4"
    assert results["config"]["model"] == "test/tiny"


def test_an_unknown_task_ends_the_command_before_anything_is_loaded(tiny_checkpoint, quiz_dir):
    done = run_harness("--checkpoint_dir", tiny_checkpoint, "--eval_tasks", "quizz", "--include_path", quiz_dir)
    assert done.returncode == UsageError.status
    assert done.stderr.startswith("error: 'quizz' is neither")
    assert done.stderr.count("\n") <= 3
