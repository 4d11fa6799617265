"""One tensor of a checkpoint, whatever it is stored as."""

import dataclasses

import numpy as np

from nm_jax.checkpoint import _records as records
from nm_jax.checkpoint._packed import decode, put
from nm_jax.checkpoint._records import Record
from nm_jax.checkpoint._tensorfile import FormatError, TensorFile


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint.

    Attributes:
      name: its name.
      dtype: its dtype, as the format names it.
      shape: its shape when dense.
      file: where it is stored.
      record: what is known of it as a sparse tensor; `None` for one that is not recorded as sparse.
      reason: why it is dense, where that is recorded.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: TensorFile
    record: Record | None
    reason: str = ""

    @property
    def path(self) -> str:
        """Its name as rules see it: '/'-joined."""
        return self.name.replace(".", "/")

    @property
    def nbytes(self) -> int:
        """Bytes that are read for it."""
        parts = (self.name,) if self.record is None else self.record.parts(self.name)
        return sum(self.file.entries[part].nbytes for part in parts)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of its dense values."""
        return self.nbytes if self.record is None else self.record.size * records.PRUNABLE[self.dtype]

    @property
    def loadable(self) -> bool:
        """Whether numpy has its dtype."""
        return self.record is not None or self.file.entries[self.name].numpy_dtype is not None

    @property
    def copyable(self) -> bool:
        """Whether its stored bytes are its dense values."""
        return self.record is None or self.record.parts(self.name)[0] == self.name

    def start(self, count: int) -> bytes:
        """The first bytes of its values."""
        return self.file.start(self.name, count)

    def read(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Its dense values, and its mask where one is stored.

        Raises:
          FormatError: if values and mask do not fit each other.
        """
        if self.record is None or self.record.layout == "dense":
            return self.file.read(self.name), None
        values, code = (self.file.read(part) for part in self.record.parts(self.name))
        axes, positions = self.record.axes, self.record.layout == "values+positions"
        try:
            mask = decode(code, self.shape, axes, positions)
            return (values if self.copyable else put(values, mask, axes)), mask
        except ValueError as error:
            raise FormatError(f"{self.file.path}: {self.name!r} is damaged ({error}); prune it again") from None
