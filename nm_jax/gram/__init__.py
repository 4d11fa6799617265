"""Gram matrices of the inputs of a model's layers, streamed over batches."""

from nm_jax.gram.capture import gram as gram
from nm_jax.gram.record import Gram as Gram
