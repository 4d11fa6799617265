"""Questions as inputs of a network: long contexts in windows that overlap, and answers from the network's logits.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding" (2019), Section 4.2:
a window starts every `stride` pieces, and of a piece that is in several windows the one counts where it has most
context on both sides.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from experiments.data.squad import Question
from experiments.data.wordpiece import Tokenizer

LENGTH, STRIDE = 384, 128
QUESTION = 64  # pieces of a question that are kept
LONGEST_ANSWER = 30  # pieces


@dataclasses.dataclass(frozen=True)
class Window:
    """A question and a piece of its context.

    Attributes:
      question: its number.
      tokens: first piece, question, separator, context, separator.
      segments: 0 for the question, 1 for the context.
      first: position of the first piece of the context.
      offsets: the characters of the context that each piece of it covers.
      best: whether it is here that the piece has most context.
      answer: first and last position of the first gold answer; 0, 0 where it is not in the window.
    """

    question: int
    tokens: list[int]
    segments: list[int]
    first: int
    offsets: list[tuple[int, int]]
    best: list[bool]
    answer: tuple[int, int]


def windows(
    questions: Sequence[Question], tokenizer: Tokenizer, *, length: int = LENGTH, stride: int = STRIDE
) -> list[Window]:
    """All windows of all questions, in their order.

    Args:
      questions: what to cut.
      tokenizer: gives the pieces.
      length: most tokens of a window, with the question and three special pieces.
      stride: pieces from the start of one window to that of the next one.

    Raises:
      ValueError: a question leaves no room for its context, or the windows leave gaps.
    """
    asked = tokenizer.pieces([question.question for question in questions])
    contexts = {question.context: None for question in questions}  # many questions share one
    pieces = dict(zip(contexts, tokenizer.pieces(list(contexts)), strict=True))
    found = []
    for number, (question, (words, _)) in enumerate(zip(questions, asked, strict=True)):
        words = words[:QUESTION]
        room = length - len(words) - 3
        if not 0 < stride <= room:
            raise ValueError(f"question {question.name}: windows of {length} leave {room} pieces; stride is {stride}")
        tokens, offsets = pieces[question.context]
        if not tokens:
            raise ValueError(f"question {question.name}: the context has no piece of the vocabulary")
        spans = _spans(len(tokens), room, stride)
        answer = _answer(question, offsets)
        for start, end in spans:
            joined, segments = tokenizer.joined(words, tokens[start:end])
            first = len(words) + 2
            inside = start <= answer[0] and answer[1] < end
            shift = first - start
            found.append(
                Window(
                    question=number,
                    tokens=joined,
                    segments=segments,
                    first=first,
                    offsets=offsets[start:end],
                    best=[_best(spans, piece) == (start, end) for piece in range(start, end)],
                    answer=(answer[0] + shift, answer[1] + shift) if inside else (0, 0),
                )
            )
    return found


def _spans(pieces: int, room: int, stride: int) -> list[tuple[int, int]]:
    """First piece, and the one after the last, of each window."""
    spans = [(0, min(room, pieces))]
    while spans[-1][1] < pieces:
        start = spans[-1][0] + stride
        spans.append((start, min(start + room, pieces)))
    return spans


def _best(spans: list[tuple[int, int]], piece: int) -> tuple[int, int]:
    """The window with most context on the shorter side of a piece; a longer window wins by a little."""

    def context(span: tuple[int, int]) -> float:
        start, end = span
        return min(piece - start, end - 1 - piece) + 0.01 * (end - start)

    return max((span for span in spans if span[0] <= piece < span[1]), key=context)


def _answer(question: Question, offsets: list[tuple[int, int]]) -> tuple[int, int]:
    """The pieces that the first gold answer touches."""
    text, start = question.answers[0]
    touched = [k for k, (low, high) in enumerate(offsets) if low < start + len(text) and start < high]
    if not touched:
        raise ValueError(f"question {question.name}: no piece of the vocabulary is in the answer {text!r}")
    return touched[0], touched[-1]


def answers(
    questions: Sequence[Question],
    windows: Sequence[Window],
    logits: Sequence[np.ndarray],
    longest: int = LONGEST_ANSWER,
) -> dict[str, str]:
    """The best answer to each question: of all spans of its windows that with the largest sum of two logits.

    Args:
      questions: what was cut.
      windows: all their windows.
      logits: of each window, that a position starts and that it ends the answer `[>= tokens, 2]`.
      longest: most pieces of an answer.
    """
    found: dict[int, tuple[float, str]] = {}
    for window, values in zip(windows, logits, strict=True):
        part = np.asarray(values, np.float64)[window.first : window.first + len(window.offsets)]
        starts = np.where(window.best, part[:, 0], -np.inf)
        sums = starts[:, None] + part[None, :, 1]
        ahead = np.arange(len(part))[None] - np.arange(len(part))[:, None]
        sums = np.where((ahead >= 0) & (ahead < longest), sums, -np.inf)
        start, end = np.unravel_index(np.argmax(sums), sums.shape)
        value = float(sums[start, end])
        if window.question not in found or value > found[window.question][0]:
            context = questions[window.question].context
            found[window.question] = value, context[window.offsets[start][0] : window.offsets[end][1]]
    return {questions[number].name: text for number, (_, text) in found.items()}
