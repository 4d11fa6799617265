"""Questions on a context whose answer is a span of it: the official JSON of SQuAD 1.1, and tokenised lines.

Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text" (2016).
"""

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, its context, and all gold answers.

    Attributes:
      name: its id, unique in a file.
      question: what is asked.
      context: where the answer is.
      answers: the text of each gold answer, and the character of the context that it starts at.
    """

    name: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]


def read(path: Path) -> list[Question]:
    """All questions of a file in the official form.

    Raises:
      ValueError: no JSON, something missing, or an answer that is not where it says; with the record.
    """
    try:
        root = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no JSON: {error}") from None
    questions: list[Question] = []
    for place, article in _items(root, "data", str(path)):
        for inner, paragraph in _items(article, "paragraphs", place):
            context = _get(paragraph, "context", str, inner)
            for here, found in _items(paragraph, "qas", inner):
                name = _get(found, "id", str, here)
                here = f"{here}, question {name}"
                answers = tuple(
                    (_get(answer, "text", str, each), _get(answer, "answer_start", int, each))
                    for each, answer in _items(found, "answers", here)
                )
                questions.append(_checked(Question(name, _get(found, "question", str, here), context, answers), here))
    return _named_once(questions, path)


def read_lines(prefix: Path, without: Collection[int] = ()) -> list[Question]:
    """All questions of four files of lines, `.context`, `.question`, `.answer` and `.span`: words with spaces between.

    A span is the first and the last word of the answer in the context. An answer may be a part of these words.

    Args:
      prefix: path of the files, without what tells them apart.
      without: lines that are left out, by number from 1.

    Raises:
      ValueError: files of different lengths, or an answer that is not where it says; with the line.
    """
    files = {kind: prefix.with_name(f"{prefix.name}.{kind}") for kind in ("context", "question", "answer", "span")}
    lines = {kind: path.read_text(encoding="utf-8").removesuffix("\n").split("\n") for kind, path in files.items()}
    if len(lengths := {len(each) for each in lines.values()}) > 1:
        counts = ", ".join(f"{len(each)} of .{kind}" for kind, each in lines.items())
        raise ValueError(f"{prefix}: {max(lengths)} lines are not in every file: {counts}")
    questions = []
    for number, (context, question, answer, span) in enumerate(zip(*lines.values(), strict=True), 1):
        if number in without:
            continue
        here = f"{prefix}: line {number}"
        words = context.split(" ")
        ends = span.split()
        if len(ends) != 2 or not all(end.isdecimal() for end in ends) or not int(ends[0]) <= int(ends[1]) < len(words):
            raise ValueError(
                f"{here}: the span {span!r} is not that of two of the {len(words)} words of the context; "
                f"without={{{number}}} leaves it out"
            )
        first, last = map(int, ends)
        within = " ".join(words[first : last + 1]).find(answer)
        if within < 0:
            raise ValueError(f"{here}: the answer {answer!r} is not in words {first} to {last} of its context")
        start = sum(len(word) + 1 for word in words[:first]) + within
        questions.append(_checked(Question(f"line {number}", question, context, ((answer, start),)), here))
    return questions


def _checked(question: Question, here: str) -> Question:
    if not question.context.strip():
        raise ValueError(f"{here}: the context is empty")
    if not question.question.strip():
        raise ValueError(f"{here}: the question is empty")
    if not question.answers:
        raise ValueError(f"{here}: no answer")
    for text, start in question.answers:
        there = question.context[start : start + len(text)] if start >= 0 else ""
        if not text.strip() or there != text:
            raise ValueError(f"{here}: the answer {text!r} is not at character {start} of its context: {there!r} is")
    return question


def _named_once(questions: list[Question], path: Path) -> list[Question]:
    if not questions:
        raise ValueError(f"{path}: no questions")
    names: set[str] = set()
    for question in questions:
        if question.name in names:
            raise ValueError(f"{path}: question {question.name} is there twice")
        names.add(question.name)
    return questions


def _items(parent: Any, field: str, place: str) -> list[tuple[str, Any]]:
    """The entries of a list, and what to call each."""
    return [(f"{place}: {field}[{k}]", item) for k, item in enumerate(_get(parent, field, list, place))]


def _get(parent: Any, field: str, kind: type, place: str) -> Any:
    value = parent.get(field) if isinstance(parent, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{place}: no {field}, or it is no {kind.__name__}")
    return value
