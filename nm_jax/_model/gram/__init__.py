"""Gram matrices of the inputs of a model's layers, streamed over batches."""

from nm_jax._model.gram.capture import gram as gram
from nm_jax._model.gram.record import Gram as Gram
