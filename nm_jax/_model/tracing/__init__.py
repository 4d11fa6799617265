"""How a model uses each of its parameters, read off its jaxpr."""

from nm_jax._model.tracing.model import LeafTrace as LeafTrace
from nm_jax._model.tracing.model import Trace as Trace
from nm_jax._model.tracing.model import Traced as Traced
from nm_jax._model.tracing.model import trace as trace
from nm_jax._model.tracing.model import walk_model as walk_model
from nm_jax._model.tracing.walk import Site as Site
from nm_jax._model.tracing.walk import Tap as Tap
from nm_jax._model.tracing.walk import Use as Use
