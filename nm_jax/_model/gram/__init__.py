"""Gram matrices of the inputs of a model's layers, streamed over batches."""

from nm_jax._model.gram._capture import gram as gram
from nm_jax._model.gram._record import Gram as Gram
