"""Exact match and F1 of answers, by the rules of the official script of SQuAD 1.1."""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

from experiments.data.squad import Question

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(answer: str) -> str:
    """Lower case, without punctuation and articles, single spaces between words."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, gold: str) -> float:
    """1 where both are the same, normalised."""
    return float(normalised(answer) == normalised(gold))


def f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the words, normalised; 0 where none is common."""
    words, wanted = normalised(answer).split(), normalised(gold).split()
    common = (Counter(words) & Counter(wanted)).total()
    return 2 * common / (len(words) + len(wanted)) if common else 0.0


def score(questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, float]:
    """Means over the questions in percent, each against the best of its gold answers; no answer scores 0."""
    best = {"exact_match": 0.0, "f1": 0.0}
    for question in questions:
        if (answer := answers.get(question.name)) is not None:
            gold = [text for text, _ in question.answers]
            best["exact_match"] += max(exact_match(answer, text) for text in gold)
            best["f1"] += max(f1(answer, text) for text in gold)
    return {name: 100 * total / len(questions) for name, total in best.items()}
