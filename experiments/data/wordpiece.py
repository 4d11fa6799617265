"""BERT's tokenizer: words in lower case without accents, then the longest pieces of the vocabulary."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


class Tokenizer:
    """Sentences into token numbers.

    Args:
      vocabulary: the pieces, in the order of their numbers.
      lower: lower case, without accents (`uncased` in the names of public weights).
      name: what errors call the vocabulary.

    Raises:
      ValueError: a special piece is missing, or a piece is there twice.
    """

    def __init__(self, vocabulary: Sequence[str], *, lower: bool = True, name: str = "vocabulary"):
        numbers: dict[str, int] = {}
        for number, piece in enumerate(vocabulary):
            if numbers.setdefault(piece, number) != number:
                raise ValueError(f"{name}: piece {piece!r} is there twice, in lines {numbers[piece] + 1}, {number + 1}")
        if missing := [piece for piece in _SPECIAL if piece not in numbers]:
            raise ValueError(f"{name}: no {', '.join(missing)}; it is no vocabulary of BERT")
        self.size, self._name = len(numbers), name
        self.pad, _, self._first, self._separator = (numbers[piece] for piece in _SPECIAL)
        self._pieces = tokenizers.Tokenizer(tokenizers.models.WordPiece(numbers, unk_token="[UNK]"))
        self._pieces.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lower)
        self._pieces.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()

    @classmethod
    def read(cls, path: Path, *, lower: bool = True) -> "Tokenizer":
        """From a file with one piece a line."""
        return cls(path.read_text(encoding="utf-8").splitlines(), lower=lower, name=str(path))

    def fits(self, rows: int) -> "Tokenizer":
        """This tokenizer, if the word embedding has a row for each piece.

        Raises:
          ValueError: it has more or less.
        """
        if rows != self.size:
            raise ValueError(
                f"{self._name} has {self.size} pieces and the word embedding {rows} rows; "
                "take the vocabulary that belongs to the weights"
            )
        return self

    def pieces(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """For each text the numbers of its pieces, and from where to where in it each one is."""
        found = self._pieces.encode_batch(list(texts), add_special_tokens=False)
        return [(one.ids, one.offsets) for one in found]

    def joined(self, *parts: Sequence[int]) -> tuple[list[int], list[int]]:
        """One input of one or two texts: the numbers with the special pieces, and which text each one is of."""
        tokens, segments = [self._first], [0]
        for number, part in enumerate(parts):
            tokens += [*part, self._separator]
            segments += [number] * (len(part) + 1)
        return tokens, segments

    def __call__(self, sentences: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token numbers `[sentences, length]`, and True where they are no padding. Longer sentences are cut."""
        rows = [self.joined(numbers[: length - 2])[0] for numbers, _ in self.pieces(sentences)]
        return padded(rows, length, self.pad), attended(rows, length)

    def pairs(self, first: Sequence[str], second: Sequence[str], length: int) -> tuple[np.ndarray, ...]:
        """As for sentences, and which sentence each piece is of. Of pairs that are too long the longer one is cut."""
        both = zip(self.pieces(first), self.pieces(second), strict=True)
        rows = [self.joined(*_cut(one[0], other[0], length - 3)) for one, other in both]
        tokens = [row[0] for row in rows]
        return padded(tokens, length, self.pad), attended(tokens, length), padded([row[1] for row in rows], length, 0)


def _cut(one: list[int], other: list[int], room: int) -> tuple[list[int], list[int]]:
    """Takes the last piece of the longer one until both fit; of two that are equally long, of the second one."""
    keep = min(len(one), max(room - len(other), (room + 1) // 2))
    return one[:keep], other[: room - keep]


def padded(rows: Sequence[Sequence[int]], length: int, fill: int) -> np.ndarray:
    """Rows of different lengths in one array `[rows, length]`.

    Raises:
      ValueError: a row is longer.
    """
    out = np.full((len(rows), length), fill, np.int32)
    for number, row in enumerate(rows):
        if len(row) > length:
            raise ValueError(f"row {number} has {len(row)} entries, and there is room for {length}")
        out[number, : len(row)] = row
    return out


def attended(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """True where a row has an entry, False where it is padded."""
    return np.arange(length) < np.array([len(row) for row in rows], np.int32)[:, None]
