"""Where features are kept while they are made: in memory, or in files that are mapped into it.

A folder holds ``features.npy``, ``logits.npy``, ``labels.npy`` (numpy's own format, ``np.load``
reads them) and ``features.json``. It is written beside its place and renamed, so that it is whole
or not there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldam_plugins._validation import invalid
from ldam_plugins.training.files import flush_folder, flush_names, write_atomic

TENSORS = ("features", "logits", "labels")
INFO_FILE = "features.json"
Columns = tuple[Tensor, Tensor, Tensor]
"""Features (N, D), logits (N, C) and labels (N,)."""


class RowsInMemory:
    """Rows that are kept in memory, batch by batch."""

    def __init__(self) -> None:
        self._batches: list[Columns] = []

    def append(self, rows: Columns) -> None:
        """Add those of a batch."""
        self._batches.append(rows)

    def close(self, check: Callable[[Path], Any]) -> Columns | None:
        """All rows; None if there are none."""
        if not self._batches:
            return None
        features, logits, labels = (torch.cat(each) for each in zip(*self._batches, strict=True))
        return features, logits, labels

    def abandon(self) -> None:
        """Forget them."""
        self._batches = []


class RowsInFiles:
    """Rows that go into the files of a folder, batch by batch, so that memory holds one batch.

    Args:
        folder: Where the folder will be, once :meth:`close` is called.
        info: What is written to ``features.json``.

    Raises:
        ValueError: it is there already.
        OSError: it cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], info: Mapping[str, Any]) -> None:
        self.folder, self.info = Path(folder), info
        if self.folder.exists():
            expected = "a folder that is not there yet"
            hint = "Features.load(folder) opens features that were written there."
            raise invalid("memmap_dir", expected, str(folder), hint=hint)
        self._beside = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.partial")
        shutil.rmtree(self._beside, ignore_errors=True)
        self._beside.mkdir(parents=True)
        self._files = {name: (self._beside / f"{name}.npy").open("w+b") for name in TENSORS}
        self._layout: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        self._rows = 0

    def append(self, rows: Columns) -> None:
        """Add those of a batch."""
        for name, part in zip(TENSORS, rows, strict=True):
            array = np.ascontiguousarray(part.numpy())
            if name not in self._layout:
                self._layout[name] = (array.shape[1:], array.dtype)
                self._write_header(name)
            self._files[name].write(array.data)
        self._rows += len(rows[-1])

    def _write_header(self, name: str) -> None:
        # numpy leaves room in the header for a first axis that grows.
        shape, dtype = self._layout[name]
        file = self._files[name]
        file.seek(0)
        header = {"shape": (self._rows, *shape), "fortran_order": False}
        header["descr"] = np.lib.format.dtype_to_descr(dtype)
        np.lib.format.write_array_header_1_0(file, header)
        file.seek(0, os.SEEK_END)

    def close(self, check: Callable[[Path], Any]) -> Columns | None:
        """All rows, mapped from the files; None, and no folder, if there are none.

        Args:
            check: Is given the folder before it gets its name, and raises what is wrong with it.
        """
        if not self._rows:
            self.abandon()
            return None
        for name, file in self._files.items():
            self._write_header(name)
            file.close()
        write_atomic(self._beside / INFO_FILE, json.dumps(dict(self.info)).encode())
        check(self._beside)
        flush_folder(self._beside)
        try:
            self._beside.rename(self.folder)
        except OSError:
            shutil.rmtree(self._beside)
            if not (self.folder / INFO_FILE).is_file():  # another process was first: the same rows
                raise
        flush_names(self.folder.parent)
        return open_columns(self.folder)

    def abandon(self) -> None:
        """Remove what was written."""
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._beside, ignore_errors=True)


def open_columns(folder: str | os.PathLike[str]) -> Columns:
    """The rows that lie in a folder, mapped into memory: read when they are used.

    What is written to them stays in memory.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is no array of numpy's.
    """
    paths = (Path(folder, f"{name}.npy") for name in TENSORS)
    features, logits, labels = (torch.from_numpy(np.load(path, mmap_mode="c")) for path in paths)
    return features, logits, labels


def read_info(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``features.json`` says.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: it is not JSON.
    """
    found: dict[str, Any] = json.loads(Path(folder, INFO_FILE).read_text(encoding="utf-8"))
    return found


@torch.no_grad()
def digest_of_model(model: nn.Module) -> str:
    """A digest of a model: its weights and buffers, by name, and its modules as they print."""
    hasher = blake2b(digest_size=16)
    hasher.update(f"{type(model).__module__}.{type(model).__qualname__}\n{model}".encode())
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            _add_bytes(hasher, tensor)
    return hasher.hexdigest()


def digest_of_batches(batches: Iterable[Any]) -> str:
    """A digest of all that a loader gives, in order."""
    hasher = blake2b(digest_size=16)
    for batch in batches:
        _add(hasher, batch)
    return hasher.hexdigest()


def digest(*parts: Any) -> str:
    """A digest of some values as they print, each of which prints all that it is."""
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _add(hasher: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for key in sorted(value):
            hasher.update(f"{key}:".encode())
            _add(hasher, value[key])
    elif isinstance(value, tuple | list):
        hasher.update(f"{len(value)}:".encode())
        for each in value:
            _add(hasher, each)
    elif isinstance(value, Tensor | np.ndarray):
        tensor = torch.as_tensor(value)
        hasher.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        _add_bytes(hasher, tensor)
    else:
        hasher.update(repr(value).encode())


def _add_bytes(hasher: Any, tensor: Tensor) -> None:
    plain = tensor.detach().cpu().contiguous().flatten()
    hasher.update(plain.view(torch.uint8).numpy().data if plain.numel() else b"")
