"""Modules that are loaded when something of them is used."""

import importlib
from typing import Any

from nm_jax.cli._signals import leaving


class Late:
    """A module that takes long to load, such as everything that needs JAX."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        with leaving():
            return getattr(importlib.import_module(self._name), attribute)


checkpoint = Late("nm_jax.checkpoint")
nm = Late("nm_jax")
