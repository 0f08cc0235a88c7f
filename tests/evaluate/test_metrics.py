"""Scores of answers are those of sacreBLEU and of Google's ROUGE."""

import random

import pytest

from lit_qlora.evaluate.metrics import chrf, text_metrics

WORDS = [
    "the",
    "a",
    "cat",
    "Dog",
    "runs,",
    "fast!",
    "over",
    "(12.5)",
    "hills",
    "é",
    "naïve",
    "don't",
    "U.S.",
    "end.",
    "東京",
]


@pytest.fixture(scope="module")
def corpus() -> tuple[list[str], list[str]]:
    """Answers that are right, half right, wrong, empty and of other lengths."""
    draw = random.Random(0)

    def sentence(n: int) -> str:
        return " ".join(draw.choices(WORDS, k=n))

    references = [sentence(draw.randint(1, 15)) for _ in range(40)]
    answers = [" ".join(w if draw.random() < 0.8 else draw.choice(WORDS) for w in r.split()) for r in references]
    answers[:5] = ["", "zzz", references[2], sentence(30), f" {references[4]}\n"]
    return answers, references


def test_scores_are_those_of_the_reference_programs(corpus):
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    answers, references = corpus
    scores = text_metrics(answers, references)
    pairs = list(zip(answers, references, strict=True))
    bleu = sacrebleu.corpus_bleu(answers, [references], smooth_method="none")
    assert scores["bleu"] == pytest.approx(bleu.score / 100, abs=1e-6)
    assert scores["chrf"] == pytest.approx(sacrebleu.corpus_chrf(answers, [references]).score / 100, abs=1e-6)
    rouge = [RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure for answer, reference in pairs]
    assert scores["rouge_l"] == pytest.approx(sum(rouge) / 40, abs=1e-6)


def test_an_exact_match_does_not_see_white_space_around_it(corpus):
    assert text_metrics(["a b ", "a  b", "a"], ["a b", "a b", "A"])["exact_match"] == pytest.approx(1 / 3)


def test_right_answers_score_one_and_answers_that_share_nothing_score_zero():
    text = ["The owl eats mice in the forest."]
    assert set(text_metrics(text, text).values()) == {1.0}
    assert set(text_metrics(["xyz 9 9 9"], text).values()) == {0.0}


def test_a_short_answer_that_is_right_scores_one():
    assert chrf("mice", "mice") == text_metrics(["mice"], ["mice"])["chrf"] == 1.0
    assert 0 < chrf("mouse", "mice") < chrf("mic", "mice") < 1


def test_no_answers_have_no_score():
    with pytest.raises(ValueError, match="0 predictions and 0 references"):
        text_metrics([], [])
    with pytest.raises(ValueError, match="1 predictions and 2 references"):
        text_metrics(["a"], ["a", "b"])
