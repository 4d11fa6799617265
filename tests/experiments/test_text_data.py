"""Sentences, plain text and batches of about the same length; one clear line for each thing that is wrong."""

import numpy as np
import pytest

from experiments.data import glue, lengths, text
from experiments.data.wordpiece import Tokenizer, padded

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "play", "##ing", "##in", "a", ".", "cafe"]


# ------------------------------------------------------------------------------------------------------------ tokenizer


def test_words_become_their_longest_pieces():
    tokens, attended = Tokenizer(PIECES)(["A  Playing.", "café qqq", "a a a a a a a a"], 6)
    np.testing.assert_array_equal(tokens, [[2, 7, 4, 5, 8, 3], [2, 9, 1, 3, 0, 0], [2, 7, 7, 7, 7, 3]])
    np.testing.assert_array_equal(attended, tokens > 0)
    assert tokens.dtype == np.int32


def test_pieces_know_their_characters():
    sentence = "A  Playing café."
    numbers, offsets = Tokenizer(PIECES).pieces([sentence])[0]
    assert numbers == [7, 4, 5, 9, 8]
    assert [sentence[low:high] for low, high in offsets] == ["A", "Play", "ing", "café", "."]


def test_cased_vocabularies_keep_their_case():
    assert Tokenizer([*PIECES, "A"], lower=False)(["A a"], 4)[0].tolist() == [[2, 10, 7, 3]]


def test_of_pairs_the_longer_one_is_cut():
    tokens, attended, segments = Tokenizer(PIECES).pairs(
        ["a a a a a", ". .", "a a a a", "a"], [".", "a a a a", ". . . .", "."], 7
    )
    np.testing.assert_array_equal(
        tokens, [[2, 7, 7, 7, 3, 8, 3], [2, 8, 8, 3, 7, 7, 3], [2, 7, 7, 3, 8, 8, 3], [2, 7, 3, 8, 3, 0, 0]]
    )
    np.testing.assert_array_equal(
        segments, [[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0]]
    )
    np.testing.assert_array_equal(attended, tokens > 0)


def test_vocabularies_that_do_not_fit(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(PIECES) + "\n")
    assert Tokenizer.read(path).fits(10).size == 10
    with pytest.raises(
        ValueError, match=r"vocab\.txt has 10 pieces and the word embedding 12 rows; take the vocabulary"
    ):
        Tokenizer.read(path).fits(12)
    with pytest.raises(ValueError, match=r"no \[CLS\], \[SEP\]; it is no vocabulary of BERT"):
        Tokenizer(["[PAD]", "[UNK]", "a"])
    with pytest.raises(ValueError, match=r"piece 'a' is there twice, in lines 8, 11"):
        Tokenizer([*PIECES, "a"])


# ------------------------------------------------------------------------------------------------------------- lengths


def test_every_row_is_once_in_the_batches_for_evaluation():
    many = np.random.default_rng(0).integers(1, 60, 37)
    batches = lengths.in_order(many, 8)
    given = lengths.mapped(lambda rows, length: np.stack([rows, np.full(len(rows), length)], axis=1), many, 8)
    assert [row for row, _ in given] == list(range(len(many)))
    assert all(length - 16 < many[row] <= length or length > many[row] for row, length in given)
    assert sorted(np.concatenate([rows for rows, _ in batches])) == list(range(37))
    assert all(length % 16 == 0 and many[rows].max() <= length < many[rows].max() + 16 for rows, length in batches)
    assert sum(length * len(rows) for rows, length in batches) < 37 * 64 * 0.75


def test_batches_for_training_are_a_function_of_the_step():
    many = np.random.default_rng(0).integers(1, 200, 41)
    epoch = [lengths.drawn(many, 4, step, seed=3, pool=5) for step in range(10)]
    rows = np.concatenate([rows for rows, _ in epoch])
    assert len(set(rows)) == 40  # each at most once, and one is left out
    again, length = lengths.drawn(many, 4, 7, seed=3, pool=5)
    np.testing.assert_array_equal(again, epoch[7][0])
    assert length == epoch[7][1] == -(-many[again].max() // 16) * 16
    assert not np.array_equal(lengths.drawn(many, 4, 17, seed=3, pool=5)[0], again)  # another epoch
    assert not np.array_equal(lengths.drawn(many, 4, 7, seed=4, pool=5)[0], again)
    spread = np.mean([np.ptp(many[rows]) for rows, _ in epoch])
    assert spread < np.ptp(many) / 2
    with pytest.raises(ValueError, match="a batch of 42 examples out of 41"):
        lengths.drawn(many, 42, 0, seed=0)


def test_rows_that_do_not_fit_are_not_cut_silently():
    with pytest.raises(ValueError, match="row 1 has 3 entries, and there is room for 2"):
        padded([[1], [1, 2, 3]], 2, 0)


# ---------------------------------------------------------------------------------------------------------- sentences


def test_tables_of_glue(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text("sentence\tlabel\nit 's \"good \t1\nbad\t0\n")
    found = glue.read(path, "SST-2")
    assert found.first == ["it 's \"good ", "bad"] and found.second is None
    assert found.labels.tolist() == [1, 0] and found.labels.dtype == np.int32
    path.write_text('\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t2\t3\t" a\tb\n', encoding="utf-8")
    found = glue.read(path, "MRPC")
    assert (found.first, found.second, found.labels.tolist()) == (['" a'], ["b"], [1])


def test_scores_of_similarity(tmp_path):
    path = tmp_path / "s.csv"
    path.write_text('"One, two.",Three.,2.5\na,b,0\n')
    found = glue.similarity(path)
    assert (found.first, found.second, found.labels.tolist()) == (["One, two.", "a"], ["Three.", "b"], [2.5, 0.0])


TABLES = {
    "no column": ("a\tlabel\nb\t1\n", r"line 1 does not name the columns sentence, label of SST-2"),
    "empty file": ("", r"line 1 does not name the columns"),
    "columns": ("sentence\tlabel\na\t1\nb\t0\t1\n", r"line 3 has 3 columns, not 2"),
    "label": ("sentence\tlabel\na\t1\nb\t2\n", r"line 3: label is '2', not 0 or 1"),
    "sentence": ("sentence\tlabel\n \t1\n", r"line 2: an empty sentence"),
}


@pytest.mark.parametrize("name", TABLES)
def test_bad_tables_name_the_line(name, tmp_path):
    content, message = TABLES[name]
    path = tmp_path / "t.tsv"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"t\.tsv: {message}"):
        glue.read(path, "SST-2")


@pytest.mark.parametrize("score", ["5.1", "-1", "nan", "good", ""])
def test_bad_scores_name_the_line(score, tmp_path):
    path = tmp_path / "s.csv"
    path.write_text(f"a,b,1\nc,d,{score}\n")
    with pytest.raises(ValueError, match=rf"s\.csv: line 2: the score is '{score}', not a number from 0 to 5"):
        glue.similarity(path)


# ---------------------------------------------------------------------------------------------------------- plain text


def test_characters_and_their_numbers(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("banana, é𝄞\n" * 10, encoding="utf-8")
    found = text.Characters.read(path)
    assert found.alphabet == "".join(sorted(set("banana, é𝄞\n")))
    tokens = np.concatenate([found.train, found.valid])
    assert "".join(found.alphabet[k] for k in tokens) == "banana, é𝄞\n" * 10
    assert len(found.valid) == 11 and tokens.dtype == np.int32


def test_pieces_of_a_text():
    tokens = np.arange(23)
    pieces = text.in_order(tokens, 5)
    assert pieces.shape == (4, 6)
    np.testing.assert_array_equal(pieces[:, 1:].ravel(), np.arange(1, 21))
    np.testing.assert_array_equal(pieces[:, :-1].ravel(), np.arange(20))
    drawn = text.drawn(tokens, 200, 5, step=2, seed=1)
    assert drawn.shape == (200, 6) and np.all(np.diff(drawn) == 1) and drawn.min() == 0 and drawn.max() == 22
    np.testing.assert_array_equal(drawn, text.drawn(tokens, 200, 5, step=2, seed=1))
    assert not np.array_equal(drawn, text.drawn(tokens, 200, 5, step=3, seed=1))
    assert text.in_order(tokens[:6], 5).shape == text.drawn(tokens[:6], 1, 5, 0, 0).shape == (1, 6)
    for short in (lambda: text.in_order(tokens[:5], 5), lambda: text.drawn(tokens[:5], 1, 5, 0, 0)):
        with pytest.raises(ValueError, match="a text of 5 tokens has no piece of 6"):
            short()


def test_bad_texts(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"t\.txt: byte 2 is no UTF-8"):
        text.Characters.read(path)
    path.write_text("")
    with pytest.raises(ValueError, match=r"t\.txt: empty"):
        text.Characters.read(path)
