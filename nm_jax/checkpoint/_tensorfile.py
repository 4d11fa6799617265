"""The safetensors format, read and written one tensor at a time.

A file is the length of its header (8 bytes, little endian), the header (JSON: name -> dtype, shape, offsets, and
`__metadata__`, a map of strings), and the tensors' bytes one after another. Readers that map the whole file count
every page that they touch as memory, and die when the file is cut short under them; here a tensor is read when it is
asked for, and every claim of a header is checked before anything believes it.
"""

import dataclasses
import io
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np

# Bits of an entry, for every dtype of the format.
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
}
# Those that numpy can hold.
_NUMPY: dict[str, Any] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "F8_E5M2": jnp.float8_e5m2,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E8M0": jnp.float8_e8m0fnu,
    "F8_E4M3FNUZ": jnp.float8_e4m3fnuz,
    "F8_E5M2FNUZ": jnp.float8_e5m2fnuz,
    "U16": np.uint16,
    "I16": np.int16,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
    "C64": np.complex64,
}
_DTYPES = {name: np.dtype(kind) for name, kind in _NUMPY.items()}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_DTYPES["F4"] = np.dtype(jnp.float4_e2m1fn)  # two to a byte in a file: read, and not written
_MAX_HEADER = 100_000_000  # what the format allows
_MAX_DIMENSIONS = 64  # what numpy allows
_AT_ONCE = 1 << 24
# What people mistake for a safetensors file, by its first bytes.
_OTHER_FORMATS = {
    b"PK\x03\x04": "it is a zip archive, as torch.save writes: load it with torch and save it with safetensors.torch",
    **dict.fromkeys(
        (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
        "it is a pickle, as torch.save or pickle.dump writes: load it with what wrote it and save it as safetensors "
        "(safetensors.torch, safetensors.numpy)",
    ),
    b"\x89HDF": "it is an HDF5 file: load it with its framework and save it as safetensors",
    b"GGUF": "it is a GGUF file: prune the safetensors checkpoint that it was made from",
    b"version ": "it is a Git LFS pointer: fetch the file itself with `git lfs pull`",
}
_Value = TypeVar("_Value")


class FormatError(ValueError):
    """A file is not what it should be. The message names the file, and says what to do.

    Examples:
      >>> import pathlib, tempfile
      >>> import nm_jax as nm
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.bin"
      >>> _ = path.write_bytes(b"PK\\x03\\x04" + bytes(100))
      >>> try:
      ...     nm.Checkpoint(path)
      ... except nm.FormatError as error:
      ...     print(str(error).removeprefix(f"{path}: ")[:44])
      not a safetensors file; it is a zip archive,
    """


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a header says of one tensor.

    Attributes:
      dtype: name of the dtype in the format, such as `"BF16"`.
      shape: its shape.
      start: where its bytes begin in the file.
      nbytes: how many they are.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def numpy_dtype(self) -> np.dtype | None:
        """The dtype; `None` where numpy has none for it."""
        return _DTYPES.get(self.dtype)


def dtype_name(dtype: Any) -> str:
    """The format's name of a numpy dtype."""
    name = _NAMES.get(np.dtype(dtype))
    if name is None:
        raise ValueError(f"safetensors has no dtype {np.dtype(dtype)}; convert it to one of {', '.join(_NUMPY)}")
    return name


def parse_json(text: bytes, what: str) -> Any:
    """JSON without repeated names and without NaN, or a FormatError that begins with `what`."""
    try:
        return json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise FormatError(f"{what} is not valid JSON ({reason}); write the file again") from None


def _unique(pairs: list[tuple[str, _Value]]) -> dict[str, _Value]:
    found: dict[str, _Value] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name!r} is there twice")
        found[name] = value
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


# ------------------------------------------------------------------------------------------------------------ reading


class TensorFile:
    """A safetensors file. It is opened when something is read, and closed again: a checkpoint may have more shards than
    a process may have open files.

    Attributes:
      path: the file.
      entries: what is in it, by name, in the order of the bytes.
      metadata: the strings of its `__metadata__`.

    Raises:
      FormatError: if the file is not a valid safetensors file.
      OSError: if it cannot be read.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise FormatError(f"{path}: not a regular file; give the path of a safetensors file")
        self._size = os.stat(path).st_size
        with self._open() as file:
            self.entries, self.metadata = self._read_header(file)

    def _open(self) -> io.FileIO:
        return open(self.path, "rb", buffering=0)

    def _read_header(self, file: io.FileIO) -> tuple[dict[str, Entry], dict[str, str]]:
        start = bytearray(min(8, self._size))
        self._fill(file, 0, start)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(_MAX_HEADER, self._size - 8):
            hint = next((hint for magic, hint in _OTHER_FORMATS.items() if start.startswith(magic)), None)
            hint = hint or "it is cut short, or in another format: copy or download it again"
            raise FormatError(f"{self.path}: not a safetensors file; {hint}")
        text = bytearray(length)
        self._fill(file, 8, text)
        header = parse_json(bytes(text), f"{self.path}: the header")
        if not isinstance(header, dict):
            raise self._corrupt("its header is not a table of tensors")
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        if not isinstance(metadata, dict) or not all(_is_text(text) for item in metadata.items() for text in item):
            raise self._corrupt("its metadata is not a table of strings")
        entries = [(name, self._entry(name, entry, 8 + length)) for name, entry in header.items()]
        entries.sort(key=lambda item: (item[1].start, item[1].nbytes))
        position = 8 + length
        for name, entry in entries:
            if entry.start != position:
                raise self._corrupt(f"the tensor {name!r} does not begin where the one before it ends")
            position += entry.nbytes
        if position != self._size:
            raise self._corrupt(f"it has {self._size} bytes, and its header says {position}")
        return dict(entries), metadata

    def _entry(self, name: str, entry: Any, data: int) -> Entry:
        """A checked entry; `data` is where the tensors' bytes begin."""
        if not _is_text(name):
            raise self._corrupt(f"the name {name!r} is not valid text")
        if not isinstance(entry, dict) or not set(entry) >= {"dtype", "shape", "data_offsets"}:
            raise self._corrupt(f"the tensor {name!r} is not described by dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise self._corrupt(f"the tensor {name!r} has the unknown dtype {dtype!r}")
        if not _is_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
            raise self._corrupt(f"the tensor {name!r} has no valid shape")
        if not _is_sizes(offsets) or len(offsets) != 2:
            raise self._corrupt(f"the tensor {name!r} has no valid data_offsets")
        begin, end = offsets
        if (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
            raise self._corrupt(f"the tensor {name!r} has {end - begin} bytes, which do not fit its shape and dtype")
        return Entry(dtype, tuple(shape), data + begin, end - begin)

    def _corrupt(self, reason: str) -> FormatError:
        return FormatError(f"{self.path}: {reason}; the file is corrupt or cut short, copy or download it again")

    def _fill(self, file: io.FileIO, position: int, buffer: bytearray | memoryview) -> None:
        view = memoryview(buffer)
        file.seek(position)
        while view:
            count = file.readinto(view[:_AT_ONCE])  # a long read would not be interrupted
            if not count:
                raise self._corrupt("it ended while it was read")
            view = view[count:]

    def read(self, name: str) -> np.ndarray:
        """One tensor, as a new array.

        Raises:
          FormatError: if numpy has no such dtype, or the file has become shorter.
        """
        entry = self.entries[name]
        if entry.numpy_dtype is None:
            raise FormatError(f"{self.path}: numpy has no dtype for {name!r} ({entry.dtype}); it can only be copied")
        flat = np.empty(entry.nbytes, np.uint8)
        with self._open() as file:
            self._fill(file, entry.start, flat.data)
        if _BITS[entry.dtype] == 4:  # the first of two is in the lower half
            flat = np.stack([flat & 15, flat >> 4], axis=-1).reshape(-1)
        return flat.view(entry.numpy_dtype).reshape(entry.shape)

    def start(self, name: str, count: int) -> bytes:
        """The first bytes of one tensor, as many as there are."""
        entry = self.entries[name]
        found = bytearray(min(count, entry.nbytes))
        with self._open() as file:
            self._fill(file, entry.start, found)
        return bytes(found)

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The bytes of one tensor, piece by piece, to copy them. A piece is valid until the next one is taken."""
        entry = self.entries[name]
        buffer = memoryview(bytearray(min(_AT_ONCE, entry.nbytes)))
        with self._open() as file:
            for done in range(0, entry.nbytes, _AT_ONCE):
                piece = buffer[: entry.nbytes - done]
                self._fill(file, entry.start + done, piece)
                yield piece


def _is_sizes(values: Any) -> bool:
    # Booleans are integers to Python, and sizes beyond 63 bits are not to anything else.
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in values)


def _is_text(value: Any) -> bool:
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


# ------------------------------------------------------------------------------------------------------------ writing


class TensorWriter:
    """A new safetensors file, written one tensor at a time. Use it in a `with` statement, and end with `finish`.

    The header stands before the tensors and is known after them: room is reserved for it, and filled up with blanks.

    Args:
      path: the file; it must not exist.
      reserve: bytes reserved for the header (see `header_size`).

    Raises:
      FormatError: if the format allows no header of this size.
      OSError: if the file exists, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike, reserve: int):
        self.entries: dict[str, Entry] = {}
        self._reserve = reserve
        if reserve > _MAX_HEADER:
            raise FormatError(
                f"the header would have {reserve} bytes, and the format allows {_MAX_HEADER}: nobody could read the "
                "file; shorten its metadata, or write it in more shards"
            )
        self._position = 8 + reserve
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 (closed by `__exit__`)
        self._file.seek(self._position)

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    def write(self, name: str, dtype: str, shape: tuple[int, ...], pieces: Iterable[memoryview]) -> None:
        """Adds a tensor, whose bytes come in pieces.

        Raises:
          FormatError: if the name is taken.
        """
        if name in self.entries:
            raise FormatError(f"two tensors would be stored as {name!r}; rename one of them")
        start = self._position
        for piece in pieces:
            view = piece.cast("B")
            while view:
                count = self._file.write(view)
                view = view[count:]
                self._position += count
        self.entries[name] = Entry(dtype, shape, start, self._position - start)

    def write_array(self, name: str, array: np.ndarray) -> None:
        """Adds an array."""
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.write(name, dtype_name(array.dtype), array.shape, [flat.data] if flat.size else [])

    def finish(self, metadata: dict[str, str]) -> None:
        """Writes the header, and waits until everything is on the disk."""
        data = 8 + self._reserve
        header = _header(
            metadata, ((name, e.dtype, e.shape, e.start - data, e.nbytes) for name, e in self.entries.items())
        )
        if len(header) > self._reserve:
            raise RuntimeError(f"{self._reserve} bytes were reserved for a header of {len(header)}")
        self._file.seek(0)
        self._file.write(self._reserve.to_bytes(8, "little") + header.ljust(self._reserve))
        os.fsync(self._file.fileno())


def header_size(tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: dict[str, str]) -> int:
    """Bytes to reserve for a header.

    Args:
      tensors: name, dtype, shape and bytes of each; sizes may be larger than what will be written.
      metadata: as long as it will get.
    """
    position, entries = 0, []
    for name, dtype, shape, nbytes in tensors:
        entries.append((name, dtype, shape, position, nbytes))
        position += nbytes
    size = len(_header(metadata, entries))
    return size + -size % 8  # tensors stay aligned


def _header(metadata: dict[str, str], entries: Iterable[tuple[str, str, tuple[int, ...], int, int]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for name, dtype, shape, start, nbytes in entries:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + nbytes]}
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
