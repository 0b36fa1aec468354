"""Generated answers against references: ROUGE, BLEU and exact match.

In come texts, out come numbers: ROUGE and BLEU from 0 to 100 as they are printed in papers, exact match as a share.
Words of scripts that are written without spaces are their characters, so that Chinese and Japanese are
measured as finely as English; letters are compared without case for ROUGE, as its first program did. The scores
themselves are those of torchmetrics (ROUGE; Lin 2004, W04-1013) and sacrebleu (BLEU; Papineni et al. 2002,
Post 2018, arXiv:1804.08771).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sftcore.errors import ConfigError

# Han with its extensions, kana, Bopomofo, Thai, Lao, Myanmar and Khmer are written without spaces
_HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA = "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"
_OTHERS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3100-\u312f\u31a0-\u31bf"
# accents and vowel signs, which are no letters to Python
_MARKS = "\u0300-\u036f\u0591-\u05bd\u064b-\u065f\u0900-\u0963\u0966-\u0dff"
_WORD = re.compile(rf"[{_HAN}{_KANA}{_OTHERS}]|(?:[^\W_{_HAN}{_KANA}{_OTHERS}]|[{_MARKS}])+")

ROUGE = {"rouge-1": "rouge1", "rouge-2": "rouge2", "rouge-l": "rougeL"}
TEXT_METRICS = (*ROUGE, "bleu-4", "exact_match")


def words(text: str) -> list[str]:
    """Returns what ROUGE counts: words in lower case without punctuation, and characters where there are no spaces."""
    return _WORD.findall(text.lower())


def bleu_tokenizer(references: Sequence[str]) -> str:
    """Returns the tokenizer of sacrebleu for texts like these.

    It is chosen once for all references, so that numbers can be compared: `13a` where words have spaces between
    them, `zh` where there is Chinese among them, `char` where there is kana or another script without spaces.
    """
    text = "".join(references)
    if re.search(f"[{_KANA}{_OTHERS}]", text):
        return "char"
    return "zh" if re.search(f"[{_HAN}]", text) else "13a"


def require_packages() -> None:
    """Loads the packages of the scores.

    Raises:
        ConfigError: One is missing.
    """
    try:
        import sacrebleu  # noqa: F401  needed for generated text alone
        import torchmetrics.functional.text.rouge  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--predict_with_generate needs the package {error.name}, which is not installed: "
            "pip install sacrebleu torchmetrics"
        ) from error


class TextScores:
    """Scores of answers to a fixed set of references."""

    def __init__(self, references: Sequence[str]) -> None:
        """Chooses how texts are cut.

        Args:
            references: All that answers will be compared with.

        Raises:
            ConfigError: A package is missing.
        """
        require_packages()
        from sacrebleu.metrics import BLEU

        self.tokenizer = bleu_tokenizer(references)
        # force: texts that look like they were cut already are no cause for a warning
        self._corpus = BLEU(tokenize=self.tokenizer, force=True)
        self._row = BLEU(tokenize=self.tokenizer, force=True, effective_order=True)

    def of_row(self, prediction: str, reference: str) -> dict[str, float]:
        """Returns all scores of one answer.

        BLEU of a single text leaves out the orders that it is too short for (sacrebleu's effective order).
        """
        return {
            **_rouge(prediction, reference),
            "bleu-4": float(self._row.sentence_score(prediction, [reference]).score),
            "exact_match": float(" ".join(prediction.split()) == " ".join(reference.split())),
        }

    def of_all(
        self,
        predictions: Sequence[str],
        references: Sequence[str],
        rows: Sequence[dict[str, float]],
    ) -> dict[str, float]:
        """Returns all scores of all answers: BLEU counts n-grams over all of them, the others are means.

        Args:
            predictions: The answers.
            references: What each is compared with.
            rows: The scores of each.
        """
        means = {name: sum(row[name] for row in rows) / len(rows) for name in TEXT_METRICS}
        corpus = self._corpus.corpus_score(list(predictions), [list(references)])
        return {**means, "bleu-4": float(corpus.score)}


def _rouge(prediction: str, reference: str) -> dict[str, float]:
    """Returns the F1 of each kind of ROUGE, 0 where one side has no words."""
    from torchmetrics.functional.text.rouge import rouge_score

    found: dict[str, Any] = rouge_score(
        [prediction],
        [reference],
        rouge_keys=tuple(ROUGE.values()),
        tokenizer=words,
        normalizer=str,
    )
    return {name: 100 * float(found[f"{key}_fmeasure"]) for name, key in ROUGE.items()}
