"""What there is to go by: names, shapes, a config.json; and what a source of knowledge says of a tensor."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# Components of a name that wrappers add and that say nothing of the layer (torch.compile, DDP, PEFT).
_WRAPPERS = frozenset({"_orig_mod", "module", "base_layer", "default", "modules_to_save", "original_module"})


class Axes(NamedTuple):
    """The axes of a tensor.

    Attributes:
      axes: one letter per dimension (i contraction, o output, b batch).
      source: on what they rest.
      either: whether `i` and `o` may also be the other way round, which only a transposable mask does not mind.
    """

    axes: str
    source: str
    either: bool = False


class Doubt(NamedTuple):
    """Why the axes of a tensor are not known."""

    reason: str


class Contents:
    """A checkpoint as sources of knowledge see it.

    Args:
      shapes: dense shapes by name.
      config: the content of its `config.json`; `None` without one.
      metadata: the metadata of its files.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        config: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
    ):
        self.shapes = shapes
        self.config = config if isinstance(config, Mapping) else {}
        self.format = (metadata or {}).get("format", "")
        self.items = {name: Item.of(name, self) for name in shapes}

    @functools.cached_property
    def axes_by_bias(self) -> frozenset[tuple[str, str]]:
        """Role and axes of the matrices whose bias tells them."""
        matrices = (item for item in self.items.values() if item.leaf == "weight" and item.ndim == 2)
        return frozenset((item.role, item.axes_by_bias) for item in matrices if item.axes_by_bias is not None)

    @property
    def model_type(self) -> str:
        """The architecture that `config.json` names, as transformers calls it; empty if it names none."""
        found = self.config.get("model_type")
        return found if isinstance(found, str) else ""

    @property
    def transformers(self) -> bool:
        """Whether PyTorch code of transformers wrote it."""
        return bool(self.model_type) and self.format in ("pt", "")

    @property
    def models(self) -> str:
        """Whose model it is, where `config.json` says so and its layers are (out, in); empty if not known."""
        return self.model_type if self.format in ("pt", "mlx", "") else ""


@dataclasses.dataclass(frozen=True)
class Item:
    """One tensor among the others.

    Attributes:
      name: as it is stored.
      shape: its dense shape.
      parts: the components of its name, without those of wrappers.
      contents: the checkpoint it is in.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    contents: Contents

    @classmethod
    def of(cls, name: str, contents: Contents) -> "Item":
        """The tensor of this name."""
        parts = [part for part in re.split(r"[./]", name) if part not in _WRAPPERS]
        return cls(name, tuple(contents.shapes[name]), tuple(parts), contents)

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def leaf(self) -> str:
        """What its module calls it, like `weight`."""
        return self.parts[-1] if self.parts else ""

    @functools.cached_property
    def module(self) -> str:
        """The dotted path of its module, without wrappers."""
        return ".".join(self.parts[:-1])

    @functools.cached_property
    def role(self) -> str:
        """The last part of its module's path that is a name and no number, like `q_proj`, and `mlp` of `mlp.0`."""
        return next((part for part in reversed(self.parts[:-1]) if not part.isdecimal()), "")

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        """The words of its role: `rel`, `pos`, `emb` of `relPos_emb2`."""
        return words(self.role)

    @functools.cached_property
    def path_words(self) -> frozenset[str]:
        """The words of its module's whole path."""
        return frozenset(word for part in self.parts[:-1] for word in words(part))

    @functools.cached_property
    def in_stack(self) -> bool:
        """Whether it is inside one of several numbered blocks: `layers.0.mlp.weight`, but not `mlp.0.weight`."""
        return any(part.isdecimal() for part in self.parts[:-2])

    def sibling(self, leaf: str) -> tuple[int, ...] | None:
        """The shape of another tensor of the same module."""
        return self.contents.shapes.get(self.name[: len(self.name) - len(self.leaf)] + leaf)

    @functools.cached_property
    def bias(self) -> int | None:
        """The length of its module's bias; Equinox has dimensions of one behind it."""
        found = self.sibling("bias")
        return found[0] if found and math.prod(found) == found[0] else None

    @property
    def axes_by_bias(self) -> str | None:
        """The axes of a matrix that has as many outputs as its bias has entries, where only one of its sizes fits."""
        fitting = [axes for axes, size in zip(("oi", "io"), self.shape, strict=True) if size == self.bias]
        return fitting[0] if len(fitting) == 1 else None


def words(part: str) -> tuple[str, ...]:
    """The words of one component of a name, in lower case and without digits."""
    return tuple(word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", part))


def any_word(found: Iterable[str], regex: str) -> bool:
    """Whether one of the words is one that the regex describes in full."""
    return any(re.fullmatch(regex, word) for word in found)
