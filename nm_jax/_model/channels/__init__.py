"""Which dimensions of which parameters must be permuted together so that a model stays what it is."""

from nm_jax._model.channels.parts import Part as Part
from nm_jax._model.channels.parts import order as order
from nm_jax._model.channels.parts import places as places
from nm_jax._model.channels.parts import product as product
from nm_jax._model.channels.parts import wholes as wholes
from nm_jax._model.channels.walk import Wiring as Wiring
from nm_jax._model.channels.walk import wiring as wiring
