"""Which examples are in which batch."""

import numpy as np


def drawn(count: int, size: int, steps: int, seed: int) -> list[np.ndarray]:
    """Numbers of the examples of each step: `size` different ones out of `count`, drawn anew for every step."""
    if size > count:
        raise ValueError(f"a batch of {size} examples out of {count}; make the batch smaller")
    draw = np.random.default_rng(seed)
    return [draw.choice(count, size, replace=False) for _ in range(steps)]
