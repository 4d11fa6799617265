"""What is wrong with data."""


class DataError(ValueError):
    """Data that is missing, empty or damaged: one line, which names it and says what to do."""
