"""Plain text for a language model, one number a character."""

import dataclasses
from pathlib import Path

import numpy as np

HELD_OUT = 0.1


@dataclasses.dataclass(frozen=True)
class Characters:
    """A text, cut into what a model learns and what it is judged on.

    Attributes:
      alphabet: the characters of the text; a token is the number of one.
      train: tokens of the first part.
      valid: tokens of the last part.
    """

    alphabet: str
    train: np.ndarray
    valid: np.ndarray

    @classmethod
    def read(cls, path: Path, held_out: float = HELD_OUT) -> "Characters":
        """From a file; its last part is for validation.

        Raises:
          ValueError: it is empty, or no UTF-8.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: byte {error.start} is no UTF-8") from None
        if not text:
            raise ValueError(f"{path}: empty")
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        alphabet, tokens = np.unique(codes, return_inverse=True)
        cut = len(tokens) - round(held_out * len(tokens))
        tokens = tokens.astype(np.int32)
        return cls("".join(map(chr, alphabet)), tokens[:cut], tokens[cut:])


def drawn(tokens: np.ndarray, size: int, length: int, step: int, seed: int) -> np.ndarray:
    """Random pieces `[size, length + 1]` of a text, a function of the number of the step: inputs and what follows.

    Raises:
      ValueError: the text is shorter than a piece.
    """
    starts = len(tokens) - length
    if starts < 1:
        raise ValueError(f"a text of {len(tokens)} tokens has no piece of {length + 1}; make pieces shorter")
    first = np.random.default_rng((seed, step)).integers(starts, size=size)
    return tokens[first[:, None] + np.arange(length + 1)]


def in_order(tokens: np.ndarray, length: int) -> np.ndarray:
    """Pieces `[pieces, length + 1]` one after the other, so that each token is predicted once; a rest is left out.

    Raises:
      ValueError: the text is shorter than a piece.
    """
    pieces = (len(tokens) - 1) // length
    if pieces < 1:
        raise ValueError(f"a text of {len(tokens)} tokens has no piece of {length + 1}; make pieces shorter")
    return tokens[np.arange(pieces)[:, None] * length + np.arange(length + 1)]
