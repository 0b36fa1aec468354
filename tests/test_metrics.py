"""Scores of generated text: equal to what one computes by hand, in Chinese as in English."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("sacrebleu")
pytest.importorskip("torchmetrics")

from sftcore.errors import ConfigError
from sftcore.train.metrics import TEXT_METRICS, TextScores, bleu_tokenizer, require_packages, words

FOX = "the quick brown fox jumps over the dog", "the quick brown fox jumped over the dog"
APPLE = "我喜欢吃青苹果", "我喜欢吃红苹果"


def test_rouge_in_english_is_as_by_hand() -> None:
    prediction, reference = "the cat sat on the mat", "The cat is on the mat."
    scores = TextScores([reference]).of_row(prediction, reference)
    # five of six words; three of five pairs; "the cat on the mat" in both
    assert scores["rouge-1"] == pytest.approx(100 * 5 / 6)
    assert scores["rouge-2"] == pytest.approx(100 * 3 / 5)
    assert scores["rouge-l"] == pytest.approx(100 * 5 / 6)


def test_rouge_in_chinese_counts_characters() -> None:
    prediction, reference = "今天天气很好，我们去公园。", "今天天气不错，我们去公园玩。"
    scores = TextScores([reference]).of_row(prediction, reference)
    # 9 of 11 and of 12 characters, 7 of 10 and of 11 pairs: 2 · common / (both lengths)
    assert scores["rouge-1"] == pytest.approx(100 * 2 * 9 / 23)
    assert scores["rouge-2"] == pytest.approx(100 * 2 * 7 / 21)
    assert scores["rouge-l"] == pytest.approx(100 * 2 * 9 / 23)


def test_bleu_in_english_is_as_by_hand() -> None:
    prediction, reference = FOX
    scores = TextScores([reference]).of_row(prediction, reference)
    precisions = 7 / 8 * 5 / 7 * 3 / 6 * 1 / 5
    assert scores["bleu-4"] == pytest.approx(100 * precisions**0.25)


def test_bleu_in_chinese_counts_characters() -> None:
    prediction, reference = APPLE
    scores = TextScores([reference]).of_row(prediction, reference)
    precisions = 6 / 7 * 4 / 6 * 2 / 5 * 1 / 4
    assert scores["bleu-4"] == pytest.approx(100 * precisions**0.25)


def test_bleu_of_all_counts_over_all_and_is_no_mean() -> None:
    predictions, references = [FOX[0], "a b c d e"], [FOX[1], "a b c d e"]
    scores = TextScores(references)
    rows = [scores.of_row(*pair) for pair in zip(predictions, references, strict=True)]
    found = scores.of_all(predictions, references, rows)
    pooled = 12 / 13 * 9 / 11 * 6 / 9 * 3 / 7
    assert found["bleu-4"] == pytest.approx(100 * pooled**0.25)
    assert found["bleu-4"] != pytest.approx((rows[0]["bleu-4"] + rows[1]["bleu-4"]) / 2, abs=1)
    assert found["rouge-1"] == pytest.approx((rows[0]["rouge-1"] + 100) / 2)
    assert found["exact_match"] == 0.5


@pytest.mark.parametrize(
    "text", ["four plain English words", "今天天气很好，谢谢！", "今日は良い天気です"]
)
def test_an_answer_equal_to_its_reference_is_perfect_and_an_empty_one_is_not(text: str) -> None:
    scores = TextScores([text])
    perfect = {name: 1.0 if name == "exact_match" else 100.0 for name in TEXT_METRICS}
    assert scores.of_row(text, text) == pytest.approx(perfect)
    assert scores.of_row("", text) == pytest.approx(dict.fromkeys(TEXT_METRICS, 0.0))


def test_an_exact_match_does_not_look_at_line_breaks() -> None:
    scores = TextScores(["a b"])
    assert scores.of_row("a\n b ", "a b")["exact_match"] == 1
    assert scores.of_row("A b", "a b")["exact_match"] == 0


def test_words_are_those_of_any_script() -> None:
    assert words("Don't, Café_2!") == ["don", "t", "café", "2"]
    assert words("GPT模型 v2") == ["gpt", "模", "型", "v2"]
    assert words("हिन्दी भाषा।") == ["हिन्दी", "भाषा"]
    assert words("한국어 문장") == ["한국어", "문장"]


def test_the_bleu_tokenizer_follows_the_references() -> None:
    assert bleu_tokenizer(["plain words", "más palabras"]) == "13a"
    assert bleu_tokenizer(["plain words", "和中文"]) == "zh"
    assert bleu_tokenizer(["中文", "ひらがな"]) == "char"


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ConfigError, match="pip install sacrebleu torchmetrics"):
        require_packages()
