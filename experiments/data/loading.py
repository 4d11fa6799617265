"""Batches by grain: shuffled, made ahead in threads, and found again at any position."""

import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import grain
import numpy as np

from experiments.data.errors import DataError

THREADS = min(16, os.cpu_count() or 1)  # each makes a batch


class Examples(Protocol):
    """Images, or what has some, and labels, by number."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> tuple[Any, Any]: ...


class Batches:
    """Batches of images and labels without end. Every epoch has each example once, in an order of its own.

    An example's place and random numbers depend on the seed and on its number alone, so a batch is a function of its
    number: call it with one (`Task.batch`), or iterate and keep `get_state()`, which orbax saves with
    `grain.checkpoint.CheckpointSave(batches.iterator)`. Batches are made ahead while they are taken in order.

    Args:
      source: the examples.
      size: examples of a batch.
      seed: of the order and of the transform, below 2^32.
      transform: image, random generator -> image.

    Raises:
      DataError: there are fewer examples than that.
    """

    def __init__(
        self,
        source: Examples,
        size: int,
        seed: int,
        transform: Callable[[Any, np.random.Generator], Any] | None = None,
    ):
        if not 0 < size <= len(source):
            raise DataError(f"a batch of {size} examples out of {len(source)}; make the batch smaller")

        def changed(example, random):
            image, label = example
            return (image if transform is None else transform(image, random)), label

        dataset: Any = grain.MapDataset.source(source).seed(seed).shuffle().repeat().random_map(changed).batch(size)
        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=THREADS)
        self.iterator: Any = iter(dataset.to_iter_dataset(options))

    def __call__(self, number: int) -> tuple[Any, np.ndarray]:
        """The batch of a number, from 0."""
        if number != self.get_state()["next_index"]:
            self.set_state({"next_index": number})
        return next(self)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> tuple[Any, np.ndarray]:
        return next(self.iterator)

    def get_state(self) -> dict[str, int]:
        """Where it is."""
        return self.iterator.get_state()

    def set_state(self, state: dict[str, int]) -> None:
        """Goes where it was."""
        self.iterator.set_state(state)


def in_order(
    count: int,
    read: Callable[[int], tuple[Any, Any] | None],
    size: int,
    transform: Callable[[Any], Any],
) -> Iterator[tuple[Any, np.ndarray]]:
    """All examples once, in order, without those that read as `None`; the last batch may be smaller."""

    def example(number):
        found = read(int(number))
        return None if found is None else (transform(found[0]), found[1])

    dataset: Any = grain.MapDataset.range(count).map(example)
    options = grain.ReadOptions(num_threads=min(THREADS, size), prefetch_buffer_size=size)
    return iter(dataset.to_iter_dataset(options).batch(size, drop_remainder=False))
