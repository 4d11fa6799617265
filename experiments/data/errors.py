"""What is wrong with data."""

import contextlib
from collections.abc import Iterator


class DataError(ValueError):
    """Data that is missing, empty or damaged: one line, which names it and says what to do."""


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """What readers refuse inside is wrong with the data."""
    try:
        yield
    except DataError:
        raise
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from error
