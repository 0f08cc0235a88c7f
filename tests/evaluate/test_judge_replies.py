"""The score in a reply is the one that its writer meant, and a reply without one has none."""

import pytest

from lit_qlora.evaluate.judge_replies import read_score

REPLIES = {
    "It is right.\nScore: 8": 8.0,
    "score = 7.5/10": 7.5,
    "**Score (0-10):** 9": 9.0,
    "Score: 3. On reflection, the score is 4.": 4.0,
    " 10\n": 10.0,
    # objects, in fences and between words, whatever their other fields say
    '{"score": 6}': 6.0,
    '```json\n{"score": 7, "reason": "A score of 10 would need a source."}\n```': 7.0,
    'Here it is: {"reason": "good", "Rating": "8/10"} That is all.': 8.0,
    '{"evaluation": {"facts": 3, "score": 5.5}}': 5.5,
    '{"score": "n/a"}\nScore: 2': 2.0,
    '{"score": 4': 4.0,
    # lines and mentions
    "Score: 7/10": 7.0,
    "### Score\n8": 8.0,
    "Score: **8** / 10": 8.0,
    "Score: **8/10**\nA score of 10 would need a source.": 8.0,
    "The final score is 9 out of 10.": 9.0,
    "Score out of 10: 6": 6.0,
    "Score - 6 points": 6.0,
    "Score: 7,5": 7.5,
    "Rating: [[5]]": 5.0,
    "I would say [[3]] here.": 3.0,
    "It deserves 8 out of 10, I think.": 8.0,
    "**7/10**\nMost of it is right.": 7.0,
    "**9**": 9.0,
    # thoughts, which may try other scores
    "<think>Score: 3? No, a score of 10.</think>\nScore: 6": 6.0,
    "Perhaps score: 3.\n</think>\n\nScore: 7": 7.0,
    "<|channel>thought\nScore: 3<channel|>Score: 2": 2.0,
    "<think>It is right. Score: 3, or": None,
    # no score
    "I cannot say. The reference has 3 words.": None,
    "I'm sorry, but I can't rate this on a scale from 0 to 10.": None,
    "Score: none": None,
    "Score: NUMBER": None,
    "Score (0-10): I will not say": None,
    "Score: 0-10": None,
    "Score: -1": None,
    "Score: 80%": None,
    "2 out of 3 facts are right, on 1/10/2024.": None,
    "A score of 10 would need a source.": None,
    '{"score": null}': None,
    "": None,
}


@pytest.mark.parametrize("reply", REPLIES)
def test_a_reply_has_the_score_that_it_means(reply: str) -> None:
    assert read_score(reply) == REPLIES[reply]


@pytest.mark.parametrize("part", ["score(", "score ", "{", '{"a":', "the score is ", "8/", "[[", "9 ", "\n", " "])
def test_a_long_reply_is_read_in_no_time(part: str) -> None:
    assert read_score(part * 2**17 + "\nscore 4") == 4.0
