"""SQuAD: reading, windows, answers, and the rules of the official score; one clear line for all that is wrong."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from experiments.data import squad, squad_score, squad_windows
from experiments.data.squad import Question
from experiments.data.wordpiece import Tokenizer

CONTEXT = "In 1850, the Great Wall was 12 km long."
ANSWERS = [{"text": "the Great Wall", "answer_start": 9}, {"text": "Great Wall", "answer_start": 13}]


def official(path, *, context=CONTEXT, answers=ANSWERS, asked="What was long?", names=("q1",)):
    qas = [{"id": name, "question": asked, "answers": answers} for name in names]
    path.write_text(json.dumps({"version": "1.1", "data": [{"paragraphs": [{"context": context, "qas": qas}]}]}))
    return path


def lines(folder, **changed):
    files = {"context": "a b-c d .", "question": "what ?", "answer": "b", "span": "1 1"} | changed
    for kind, content in files.items():
        (folder / f"val.{kind}").write_text(f"{content}\n")
    return folder / "val"


# -------------------------------------------------------------------------------------------------------------- reading


def test_official_files(tmp_path):
    found = squad.read(official(tmp_path / "d.json", names=("q1", "q2")))
    assert [question.name for question in found] == ["q1", "q2"]
    assert found[0] == Question("q1", "What was long?", CONTEXT, (("the Great Wall", 9), ("Great Wall", 13)))


def test_lines_of_tokens(tmp_path):
    prefix = lines(tmp_path, context="a b c d .\na b-c d .", question="x ?\ny ?", answer="c d\nc", span="2 3\n1 1")
    one, other = squad.read_lines(prefix)
    assert one == Question("line 1", "x ?", "a b c d .", (("c d", 4),))
    assert other == Question("line 2", "y ?", "a b-c d .", (("c", 4),))
    (prefix.parent / "val.span").write_text("3 2\n1 1\n")
    with pytest.raises(ValueError, match=r"line 1: the span '3 2' .*; without=\{1\} leaves it out"):
        squad.read_lines(prefix)
    assert squad.read_lines(prefix, without={1}) == [other]


def answer(text="Great Wall", start=13):
    return [{"text": text, "answer_start": start}]


BAD = {
    "offset": ({"answers": answer(start=12)}, r"question q1: the answer 'Great Wall' is not at character 12 of its"),
    "past the end": ({"answers": answer(start=100)}, r"question q1: the answer 'Great Wall' is not at character 100"),
    "negative": ({"answers": answer("long.", -5)}, r"question q1: the answer 'long\.' is not at character -5"),
    "empty answer": ({"answers": answer("", 0)}, r"question q1: the answer '' is not at"),
    "no answer": ({"answers": []}, r"question q1: no answer"),
    "no offset": ({"answers": [{"text": "long"}]}, r"question q1: answers\[0\]: no answer_start, or it is no int"),
    "context": ({"context": " "}, r"question q1: the context is empty"),
    "no context": ({"context": None}, r"data\[0\]: paragraphs\[0\]: no context, or it is no str"),
    "question": ({"asked": ""}, r"question q1: the question is empty"),
    "twice": ({"names": ("q1", "q1")}, r"question q1 is there twice"),
    "no name": ({"names": (3,)}, r"qas\[0\]: no id, or it is no str"),
    "none": ({"names": ()}, r"no questions"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records_are_named(name, tmp_path):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=rf"d\.json: .*{message}|d\.json: {message}") as error:
        squad.read(official(tmp_path / "d.json", **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"data": [', r"d\.json: no JSON: .* line 1 column 11"),
        (b"\xff", r"d\.json: no JSON: .*invalid start byte"),
        (b"[]", r"d\.json: no data, or it is no list"),
        (b'{"data": [{"paragraphs": 3}]}', r"d\.json: data\[0\]: no paragraphs, or it is no list"),
    ],
)
def test_malformed_files(content, message, tmp_path):
    path = tmp_path / "d.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        squad.read(path)


BAD_LINES = {
    "lengths": ({"span": "1 1\n2 2"}, r"val: 2 lines are not in every file: 1 of \.context, .* 2 of \.span"),
    "span": ({"span": "1 4"}, r"line 1: the span '1 4' is not that of two of the 4 words"),
    "backwards": ({"span": "2 1"}, r"line 1: the span '2 1'"),
    "no span": ({"span": "x"}, r"line 1: the span 'x'"),
    "answer": ({"answer": "d"}, r"line 1: the answer 'd' is not in words 1 to 1"),
    "empty": ({"context": "", "span": "0 0", "answer": ""}, r"line 1: the context is empty"),
    "question": ({"question": " "}, r"line 1: the question is empty"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines_are_named(name, tmp_path):
    changes, message = BAD_LINES[name]
    with pytest.raises(ValueError, match=message):
        squad.read_lines(lines(tmp_path, **changes))


# -------------------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize(
    "answer, plain",
    [
        ("The  Great Wall.", "great wall"),
        ("a cat, an apple", "cat apple"),
        ("theatre", "theatre"),  # articles are whole words
        ("U.S.A.", "usa"),
        ("half-time", "halftime"),  # punctuation goes before words are told apart
        ("the.", ""),
        ("“the end”", "“ end”"),  # only ASCII punctuation is; the article between others is a word
        ("Ça\tva\n", "ça va"),
    ],
)
def test_normalised_answers(answer, plain):
    assert squad_score.normalised(answer) == plain


@pytest.mark.parametrize(
    "answer, gold, exact, f1",
    [
        ("the Great Wall", "great wall!", 1, 1),
        ("Great Wall of China", "the Great Wall", 0, 2 * (1 / 2) * 1 / (1 / 2 + 1)),
        ("wall", "great wall", 0, 2 * 1 * (1 / 2) / (1 + 1 / 2)),
        ("b b c", "b c c", 0, 2 / 3),  # words count as often as they are in both
        ("china", "great wall", 0, 0),
        ("the", "a", 1, 0),  # nothing is left: the same, and no word in common
        ("", "wall", 0, 0),
    ],
)
def test_exact_match_and_f1(answer, gold, exact, f1):
    assert squad_score.exact_match(answer, gold) == exact
    assert squad_score.f1(answer, gold) == pytest.approx(f1)


def test_the_best_gold_answer_counts_for_each_score():
    gold = (("b c d", 0), ("x y", 0))
    questions = [Question(name, "?", "b c d x y", gold) for name in ("one", "two", "three", "four")]
    found = squad_score.score(questions, {"one": "X Y", "two": "c d", "four": "z"})  # three has no answer
    assert found == pytest.approx({"exact_match": 25.0, "f1": 100 * (1 + 0.8) / 4})


# -------------------------------------------------------------------------------------------------------------- windows

WORDS = ["w" + chr(97 + k) for k in range(20)]
TOKENIZER = Tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "what", "?", *WORDS])


def long_question(first=12, last=13):
    context = " ".join(WORDS)
    text = " ".join(WORDS[first : last + 1])
    return Question("q", "what ?", context, ((text, context.index(text)),))


def test_windows_overlap_and_each_piece_is_once_at_its_best():
    question = long_question()
    found = squad_windows.windows([question], TOKENIZER, length=13, stride=3)  # room for 8 pieces
    starts = [window.tokens[window.first] - 6 for window in found]
    assert starts == [0, 3, 6, 9, 12]
    assert all(len(window.tokens) == len(window.segments) <= 13 for window in found)
    assert found[0].tokens == [2, 4, 5, 3, *range(6, 14), 3]
    assert found[0].segments == [0] * 4 + [1] * 9
    # By hand: in which window a piece has most neighbours on its shorter side.
    best = [
        (window_start + k)
        for window, window_start in zip(found, starts, strict=True)
        for k, b in enumerate(window.best)
        if b
    ]
    assert sorted(best) == list(range(20))
    assert [sum(window.best) for window in found] == [6, 3, 3, 3, 5]
    for window, start in zip(found, starts, strict=True):
        inside = start <= 12 and start + 8 > 13
        assert window.answer == ((12 - start + 4, 13 - start + 4) if inside else (0, 0))
        for k, (low, high) in enumerate(window.offsets):
            assert question.context[low:high] == WORDS[start + k]


def test_short_contexts_have_one_window():
    (window,) = squad_windows.windows([long_question()], TOKENIZER)
    assert len(window.tokens) == 25 and all(window.best) and window.answer == (16, 17)


def test_answers_come_back_from_the_logits_of_any_window():
    question = long_question()
    found = squad_windows.windows([question], TOKENIZER, length=13, stride=3)
    logits = [np.zeros((16, 2)) for _ in found]
    for window, values in zip(found, logits, strict=True):
        if window.answer != (0, 0):
            values[window.answer[0], 0] = values[window.answer[1], 1] = 5
        values[0] = values[1] = values[len(window.tokens) :] = 9  # no part of the context
    assert squad_windows.answers([question], found, logits) == {"q": question.answers[0][0]}
    # An end before its start, or too far behind it, is none.
    window = found[0]
    values = np.zeros((16, 2))
    values[window.first + 4, 0], values[window.first + 2, 1], values[window.first + 6, 1] = 9, 8, 7
    assert squad_windows.answers([question], [window], [values]) == {"q": "we wf wg"}
    assert squad_windows.answers([question], [window], [values], longest=2) == {"q": "we"}


def test_the_answer_of_a_part_of_a_word_has_the_pieces_that_it_touches():
    question = Question("q", "what ?", "wa wb-wc wd", (("b-w", 4),))
    (window,) = squad_windows.windows([question], Tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "-", *WORDS]))
    assert window.answer[1] - window.answer[0] == 2


@pytest.mark.parametrize(
    "question, options, message",
    [
        (long_question(), {"length": 13, "stride": 9}, "question q: windows of 13 leave 8 pieces; stride is 9"),
        (long_question(), {"length": 5, "stride": 1}, "question q: windows of 5 leave 0 pieces"),
        (Question("q", "?", "\u200b", (("\u200b", 0),)), {}, "question q: the context has no piece"),
        (Question("q", "?", "wa  wb", (("  ", 2),)), {}, "question q: no piece of the vocabulary is in the answer"),
    ],
)
def test_questions_that_cannot_be_cut(question, options, message):
    with pytest.raises(ValueError, match=message):
        squad_windows.windows([question], TOKENIZER, **options)


@pytest.mark.slow
@pytest.mark.skipif("NM_JAX_DATA" not in os.environ, reason="the data: set NM_JAX_DATA to its folder")
def test_gold_windows_give_gold_answers_on_real_questions():
    """Logits that point at the gold pieces give the gold answers, up to words that are cut in the middle."""
    data = Path(os.environ["NM_JAX_DATA"])
    tokenizer = Tokenizer.read(data / "weights" / "minilm_vocab.txt")
    for questions, count in (
        (squad.read(data / "text/xquad.en.json"), 1190),
        (squad.read_lines(data / "text/squad_val/val", without={3623}), 4284),
    ):
        assert len(questions) == count
        found = squad_windows.windows(questions, tokenizer)
        logits = []
        for window in found:
            values = np.zeros((384, 2))
            values[window.answer[0], 0] = values[window.answer[1], 1] = 1
            logits.append(values)
        assert {window.question for window in found if window.answer != (0, 0)} == set(range(count))
        scores = squad_score.score(questions, squad_windows.answers(questions, found, logits))
        assert scores["exact_match"] > 98 and scores["f1"] > 99
