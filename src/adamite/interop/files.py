"""Safetensors files: looked at before they are read, and replaced in one piece.

Such a file is a header, of names, dtypes and shapes, and the bytes; nothing in it is ever executed. The package
safetensors reads and writes it, and is imported here only.
"""

import contextlib
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from adamite import checks
from adamite.checks import RefusedError

DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}
"""What a header calls the dtypes of NumPy."""

PICKLES = {b"\x80" + bytes([protocol]) for protocol in range(2, 6)}
"""How pickles begin. A file of ``torch.save`` is one or, since torch 1.6, a zip archive with one in it."""

LARGEST = 2**60
"""An array without elements may claim any shape; no axis is as long as this."""


class Header(NamedTuple):
    """What a tensor is, by the file's header."""

    shape: tuple[int, ...]
    dtype: str


class File:
    """An open safetensors file.

    Args:
        path: what it is called in errors.
        file: what `safetensors.safe_open` gives.
    """

    def __init__(self, path: str, file: Any) -> None:
        self.path, self._file = path, file
        self.metadata: dict[str, str] = file.metadata() or {}
        self.headers = {name: self._header(name) for name in file.keys()}  # noqa: SIM118 (safetensors' file is no dict)

    def read(self, name: str) -> np.ndarray:
        """The tensor: a copy in memory."""
        return self._file.get_tensor(name)

    def _header(self, name: str) -> Header:
        entry = self._file.get_slice(name)
        shape, dtype = tuple(entry.get_shape()), entry.get_dtype()
        if dtype not in DTYPES:
            raise RefusedError(f"{self.path}: {name!r:.80} must be of one of {', '.join(DTYPES)}, got {dtype}")
        if math.prod(max(n, 1) for n in shape) >= LARGEST or len(shape) > 32:
            raise RefusedError(f"{self.path}: {name!r:.80} must have a shape that memory can hold, got {shape!s:.80}")
        return Header(shape, DTYPES[dtype])


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], recipe: str) -> Iterator[File]:
    """The file, open.

    Args:
        path: of the file.
        recipe: lines that write such a file in torch, for the error about one of ``torch.save``.

    Raises:
        RefusedError: it is no safetensors file, or is cut off.
        OSError: there is none, or it cannot be opened.
    """
    with checks.needed("adamite.interop", "safetensors"):
        from safetensors import SafetensorError, safe_open

    name = checks.path("path", path)
    with open(name, "rb") as file:  # what cannot be opened is told by Python
        begin = file.read(1024)
    try:
        with safe_open(name, framework="np") as file:
            yield File(name, file)
    except SafetensorError as error:
        if _is_pickle(begin):
            raise RefusedError(
                f"{name} must be a safetensors file, got one of torch.save: that is a pickle, a program, and is not "
                f"read. Write it anew, in torch:\n{recipe}"
            ) from None
        raise RefusedError(f"{name} must be a whole safetensors file: {error}") from None


def _is_pickle(begin: bytes) -> bool:
    """Whether a file that is no safetensors file is one of ``torch.save``, by its first bytes."""
    if begin[:4] == b"PK\x03\x04":
        return b"data.pkl" in begin  # the name of the archive's first file
    return begin[:2] in PICKLES and begin[2:8] != bytes(6)  # a header's length, of a safetensors file that is cut off


def replace(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a file beside and rename it: whatever happens, there is the old file or the new one, whole.

    Args:
        path: of the file.
        arrays: in C order, by name.
        metadata: goes into the header.
    """
    with checks.needed("adamite.interop", "safetensors"):
        from safetensors.numpy import save_file

    target = pathlib.Path(checks.path("path", path))
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        beside.touch()
        mode = beside.stat().st_mode  # safetensors makes files that no one else may read
        save_file(dict(arrays), beside, dict(metadata))
        beside.chmod(mode)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
