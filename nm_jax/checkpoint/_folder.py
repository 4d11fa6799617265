"""Files and folders that get their names when they are complete."""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path


@contextlib.contextmanager
def written_beside(target: Path, folder: bool = False, replace: bool = False) -> Iterator[Path]:
    """A path to write to, which gets the name of the target when the block ends, and is removed if it fails.

    Args:
      target: the name.
      folder: whether it is a folder.
      replace: whether what has the name already is replaced: a file by a file, a checkpoint's folder by a folder.

    Raises:
      OSError: if the target exists and may not be replaced, or its folder does not exist.
    """
    if os.path.lexists(target) and not (replace and _replaceable(target, folder)):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "No such folder", str(target.parent))
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        if folder:
            beside.mkdir()
        yield beside
        if folder and os.path.lexists(target):
            before = beside.with_suffix(".replaced")
            os.rename(target, before)
            os.rename(beside, target)
            shutil.rmtree(before, ignore_errors=True)
        else:
            os.replace(beside, target)
        sync(target.parent)
    except OSError as error:
        if error.filename in (None, str(beside)):
            error.filename = str(target)  # the name that was asked for
        raise
    finally:
        if folder:
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.unlink(missing_ok=True)


def _replaceable(target: Path, folder: bool) -> bool:
    """Only what could have been written by the same command: a folder without a checkpoint is somebody's work."""
    if target.is_symlink():
        return False
    return any(target.glob("*.safetensors")) if folder and target.is_dir() else target.is_file() and not folder


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def copy_others(source: Path, target: Path, written: Iterable[str]) -> list[str]:
    """Copies the files of a folder and of those in it, but for those that are written anew. Hidden folders, such as
    those of version control, are left out.

    Returns:
      What was copied.
    """
    copied, known = [], set(written)
    for folder, inner, names in os.walk(source, followlinks=True):
        here = Path(folder).relative_to(source)
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(names):
            path = here / name
            if str(path) in known or not (source / path).is_file():
                continue
            (target / here).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, target / path)
            sync(target / path)
            copied.append(str(path))
    return copied


def refuse_overlap(source: Path, target: Path) -> None:
    """Raises a ValueError if the output would lie in what is read, or replace it."""
    read, wanted = source.resolve(), target.resolve()
    if wanted == read or wanted in read.parents or (read in wanted.parents and read.is_dir()):
        raise ValueError(f"{target}: it is {source}, lies in it or around it; write somewhere else")
