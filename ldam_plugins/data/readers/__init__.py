"""The layouts that data sets come in: one file each, and the order in which they are tried.

To add a layout write a file with a :class:`~ldam_plugins.data.readers.base.Reader` and name it in
:data:`IMAGE_READERS` or :data:`TEXT_READERS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ldam_plugins._validation import invalid
from ldam_plugins.data.readers.base import (
    ImageRequest,
    ImageRows,
    NoSuchDataset,
    Reader,
    Request,
    TextRequest,
)
from ldam_plugins.data.readers.class_folders import CLASS_FOLDERS, TEXT_FOLDERS
from ldam_plugins.data.readers.coco_json import COCO_JSON
from ldam_plugins.data.readers.digits import DIGITS
from ldam_plugins.data.readers.hub import HUB_IMAGES, HUB_TEXTS
from ldam_plugins.data.readers.list_files import LIST_FILES
from ldam_plugins.data.readers.paths import listing
from ldam_plugins.data.readers.stdlib_docstrings import STDLIB_DOCSTRINGS
from ldam_plugins.data.readers.table_files import IMAGE_TABLES, TEXT_TABLES
from ldam_plugins.data.readers.tiny_imagenet import TINY_IMAGENET

if TYPE_CHECKING:
    from datasets import Dataset

# The first reader that accepts a request reads it: special layouts come before general ones.
IMAGE_READERS: tuple[Reader[ImageRequest, ImageRows], ...] = (
    DIGITS,
    COCO_JSON,
    LIST_FILES,
    TINY_IMAGENET,
    IMAGE_TABLES,
    HUB_IMAGES,
    CLASS_FOLDERS,
)
TEXT_READERS: tuple[Reader[TextRequest, Dataset], ...] = (
    STDLIB_DOCSTRINGS,
    TEXT_TABLES,
    TEXT_FOLDERS,
    HUB_TEXTS,
)
# Only the hub has a cache, others need none; any training split can be divided.
_ALWAYS_ALLOWED = ("dataset", "cache_dir", "test_share", "notes")


def read_images(request: ImageRequest) -> tuple[ImageRows, ImageRows | None]:
    """Recognise a data set of images and read the labels of its training and its test split.

    The test split is None if a share of the training split is asked for in its place.

    Raises:
        ConnectionError: the hub cannot be reached.
        ValueError: no reader accepts it, an option has no meaning here, or the content is bad.
    """
    return _read(IMAGE_READERS, request)


def read_texts(request: TextRequest) -> tuple[Dataset, Dataset | None]:
    """Recognise a data set of texts and read its training and its test split.

    The test split is None if a share of the training split is asked for in its place.

    Raises:
        ConnectionError: the hub cannot be reached.
        ValueError: no such data set, an option has no meaning here, or the content is bad.
    """
    return _read(TEXT_READERS, request)


def _read(readers: Sequence[Reader[Any, Any]], request: Request) -> tuple[Any, Any]:
    reader = next((reader for reader in readers if reader.accepts(request)), None)
    if reader is None:
        raise _unknown(readers, request)
    for field in fields(request):
        value = getattr(request, field.name)
        unused = field.name not in (*_ALWAYS_ALLOWED, *reader.options)
        if unused and value != field.default:
            hint = f"It means nothing for {request.dataset!r}, read as {reader.name}."
            raise invalid(field.name, "left out", value, hint=hint)
    try:
        train, test = reader.read(request)
    except NoSuchDataset as missing:
        raise _missing(readers, request, f"{missing}", missing.error) from missing.__cause__
    if request.test_share is not None and test is not None:
        request.notes.say("The test part that the data set has is not used.")
        test = None
    return train, test


def _unknown(readers: Sequence[Reader[Any, Any]], request: Request) -> Exception:
    if not request.is_folder:
        return _missing(readers, request, "There is no such folder")
    what = (
        f"{request.root} is no known kind of data set. Known layouts: {_layouts(readers, request)}."
    )
    return ValueError(f"{what} There is {listing(request.root)}.")


def _missing(
    readers: Sequence[Reader[Any, Any]],
    request: Request,
    reason: str,
    error: type[Exception] = ValueError,
) -> Exception:
    layouts = _layouts(readers, request)
    hint = f"{reason}. Known layouts: {layouts}. A folder in hub layout needs no network."
    names = [reader.layout for reader in readers if reader.is_name]
    expected = f"{', '.join(names)}, a folder that is there or a hub id"
    return invalid("dataset", expected, request.dataset, hint=hint, error=error)


def _layouts(readers: Sequence[Reader[Any, Any]], request: Request) -> str:
    return "; ".join(r.layout.format(train_split=request.train_split) for r in readers)
