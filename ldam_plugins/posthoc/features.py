"""What the head of a model gets and gives on a data set, extracted once and kept in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import broadcast, broadcast_object_list, gather_object, send_to_device
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from ldam_plugins._validation import invalid
from ldam_plugins.counts import check_label_range, label_array
from ldam_plugins.heads.inputs import head_names, one_vector_a_sample, with_head_calls
from ldam_plugins.heads.layers import layer_sizes
from ldam_plugins.losses.model_outputs import find_logits, one_label_a_row
from ldam_plugins.posthoc.feature_files import (
    TENSORS,
    Columns,
    RowsInFiles,
    RowsInMemory,
    digest,
    digest_of_batches,
    digest_of_model,
    open_columns,
    read_info,
)
from ldam_plugins.training.files import write_atomic

if TYPE_CHECKING:
    from accelerate import Accelerator

_LABEL_KEYS = ("labels", "label")
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True, eq=False)
class Features:
    """Features, logits and labels of N samples, on the CPU.

    Args:
        features: (N, D) float32, the input of the model's head; of several heads those of each,
            side by side.
        logits: (N, C) float32, the output of the model.
        labels: (N,) int64 class indices. Where the head is of other classes, as that of a
            pretrained model before fine-tuning, they are no indices into ``logits``.
        class_names: Names of the classes that ``labels`` count.
        origin: What made them, by name; saved with them.

    Raises:
        TypeError: features or logits that are not floats, or labels that are not integers.
        ValueError: other shapes, no sample, a NaN or infinite value, or a label that is negative or
            has no name.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor
    class_names: tuple[str, ...] | None = None
    origin: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        labels = label_array(self.labels)
        if not len(labels):
            raise invalid("labels", "those of at least one sample", "none")
        known = int(labels.max()) + 1 if self.class_names is None else len(self.class_names)
        check_label_range(labels, max(known, 1))
        for name in ("features", "logits"):
            rows = getattr(self, name)
            if not rows.is_floating_point():
                raise invalid(name, "floating-point", rows.dtype, error=TypeError)
            if rows.ndim != 2 or len(rows) != len(labels):
                expected = f"of shape ({len(labels)}, ...), one row for each label"
                raise invalid(name, expected, tuple(rows.shape))
            # In parts, as rows that are mapped from a file may exceed the memory.
            for start, part in enumerate(rows.split(_ROWS_AT_ONCE)):
                bad = (~part.isfinite().all(dim=1)).nonzero()
                if len(bad):
                    row = start * _ROWS_AT_ONCE + int(bad[0])
                    raise invalid(name, "finite", f"NaN or infinity in row {row}")

    def __len__(self) -> int:
        return len(self.labels)

    def head_labels(self) -> Tensor:
        """``labels``, after a check that the head has a logit for each of them.

        Raises:
            ValueError: a label that is no index into ``logits``.
        """
        check_label_range(self.labels.numpy(), self.logits.shape[1])
        return self.labels

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them to a safetensors file, whole or not at all; its folder is made if missing.

        The class names and ``origin`` are in the metadata of the file, as JSON.

        Raises:
            OSError: it cannot be written.
        """
        tensors = {name: getattr(self, name).contiguous() for name in TENSORS}
        metadata = {
            "class_names": json.dumps(self.class_names),
            "origin": json.dumps(dict(self.origin)),
        }
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        write_atomic(path, save(tensors, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Features:
        """Read what :meth:`save` wrote, or open a folder of :func:`extract_features`.

        The features and logits of a folder stay on the disk, and are read where they are used.

        Raises:
            OSError: there is no such file, or it cannot be read.
            ValueError: it is no file or folder of features.
        """
        if os.path.isdir(path):
            return cls._open(path)
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                metadata = file.metadata() or {}
                features, logits, labels = (file.get_tensor(name) for name in TENSORS)
                names, origin = (json.loads(metadata[key]) for key in ("class_names", "origin"))
        except (SafetensorError, KeyError) as error:
            hint = f"It cannot be read as such: {error}."
            raise invalid(
                "path", "a file written by Features.save", os.fspath(path), hint=hint
            ) from error
        return cls(features, logits, labels, None if names is None else tuple(names), origin)

    @classmethod
    def _open(cls, folder: str | os.PathLike[str]) -> Features:
        try:
            columns, info = open_columns(folder), read_info(folder)
        except (OSError, ValueError) as error:
            expected = "a folder of features that extract_features has written"
            hint = f"It cannot be read as such: {error}."
            raise invalid("path", expected, os.fspath(folder), hint=hint) from error
        names = info["class_names"]
        return cls(*columns, None if names is None else tuple(names), info["origin"])


def extract_features(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    head: str | Sequence[str] | None = None,
    device: str | torch.device | None = None,
    autocast: torch.dtype | None = None,
    class_names: Sequence[str] | None = None,
    origin: Mapping[str, object] | None = None,
    accelerator: Accelerator | None = None,
    memmap_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    data_key: str | None = None,
    progress: bool = False,
) -> Features:
    """Run ``model`` over ``loader`` and keep what its head gets and gives.

    The model runs in evaluation mode and without gradients; afterwards each of its modules is in
    the mode that it was in. Give a loader without augmentation, which gives the same batches each
    time.

    Several processes: give the accelerator that prepared ``loader``, on every process. Each runs
    its part of the batches; all get all rows, in the order of the data, those that Accelerate
    repeats to fill up the last batches once.

    Args:
        model: A classifier with a linear, 1x1 convolutional or cosine head (see `find_head`), or
            with several whose logits are averaged: a model of timm or transformers, or any other
            that returns logits or an output that holds them. Not wrapped for parallel training.
        loader: Batches as data loaders give them: pairs (inputs, labels), or mappings with
            ``labels``, as the collators of transformers make. Inputs that are a mapping are passed
            by name, without the labels.
        head: Dotted names of the layers, where `find_head` does not find the right ones.
        device: Where to run; the model is moved there and stays. Default: where its head is, or
            that of the accelerator.
        autocast: The lower precision to run in, such as ``torch.bfloat16``; features and logits
            are then those of it, kept as float32. Default: that of ``torch.autocast`` around the
            call, if any.
        class_names: Names of the classes that the labels count.
        origin: What to record with the features, such as the name of the weights and of the data
            set. The type of the model, its head and torch's version are recorded in any case.
        accelerator: What prepared ``loader``, if anything did.
        memmap_dir: Folder to keep them in, which must not be there: features beyond the memory.
            They are mapped from its files, and :meth:`Features.load` opens them again. Of several
            processes the first one writes it, and all must see it.
        cache_dir: Folder of such folders, each named by a key of weights and data, where the
            features of an earlier call are found again. A model or data that changed has another
            key.
        data_key: For ``cache_dir``, what stands for the data, such as a fingerprint, with whatever
            is done to them before the model. Default: a digest of all that ``loader`` gives, which
            is then run through once more.
        progress: Whether to show a progress bar.

    Raises:
        TypeError: a batch of another form, or labels that are not integers.
        ValueError: the head is not found; it is called more than once, or on several vectors a
            sample of which none gives the logits; the logits are not found in the model's output;
            both folders, or a ``data_key`` without ``cache_dir``; ``memmap_dir`` is there already;
            see also :class:`Features`. No folder is left then.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> found = extract_features(model, [(torch.randn(5, 8), torch.tensor([0, 1, 2, 0, 1]))])
        >>> found.features.shape, found.logits.shape, found.labels.shape
        (torch.Size([5, 4]), torch.Size([5, 3]), torch.Size([5]))
    """
    names = head_names(model, head)
    if memmap_dir is not None and cache_dir is not None:
        raise invalid("memmap_dir", "left out beside `cache_dir`", os.fspath(memmap_dir))
    if data_key is not None and cache_dir is None:
        raise invalid("data_key", "left out without `cache_dir`", data_key)
    _place(model, device, accelerator)
    made = {"model": type(model).__name__, "head": ", ".join(names), "torch": torch.__version__}
    info = _Info(
        None if class_names is None else tuple(map(str, class_names)),
        {**made, **{key: str(value) for key, value in (origin or {}).items()}},
    )
    folder = None if memmap_dir is None else Path(memmap_dir)
    if cache_dir is not None:
        data = _digest_of_data(loader, accelerator) if data_key is None else data_key
        lower = str(_precision(model, autocast))
        key = digest(digest_of_model(model), tuple(names), data, lower, *info)
        folder = Path(cache_dir, _shared(key, accelerator))
        if _shared(folder.is_dir(), accelerator):
            return Features.load(folder)
    batches = _batches(model, loader, names, autocast, accelerator, progress)
    return _kept(batches, info, folder, accelerator)


class _Info(NamedTuple):
    class_names: tuple[str, ...] | None
    origin: dict[str, str]


def _place(
    model: nn.Module, device: str | torch.device | None, accelerator: Accelerator | None
) -> None:
    """Move the model to where it runs, the same on all processes."""
    if accelerator is not None:
        device = accelerator.device if device is None else device
    if device is not None:
        model.to(device)
    if accelerator is not None:
        for buffer in model.buffers():  # every process has batch statistics of its own
            buffer.copy_(broadcast(buffer))


def _kept(
    batches: Iterable[Columns], info: _Info, folder: Path | None, accelerator: Accelerator | None
) -> Features:
    """All rows, in memory or in a folder, which the first process writes."""
    rows: RowsInMemory | RowsInFiles = RowsInMemory()
    writes = folder is None or _is_first(accelerator)
    if folder is not None and writes:
        rows = RowsInFiles(folder, info._asdict())
    try:
        for batch in batches:
            if writes:
                rows.append(batch)
        columns = rows.close(check=Features.load)
    except BaseException:
        rows.abandon()
        raise
    if folder is not None and accelerator is not None:
        accelerator.wait_for_everyone()
    if folder is not None and folder.is_dir():
        return Features.load(folder)
    if columns is None:
        raise invalid("loader", "one that gives at least one batch", "none")
    return Features(*columns, *info)


def _batches(
    model: nn.Module,
    loader: Iterable[Any],
    names: Sequence[str],
    autocast: torch.dtype | None,
    accelerator: Accelerator | None,
    progress: bool,
) -> Iterator[Columns]:
    """Features, logits and labels of each batch, on the CPU; of all processes."""
    layer: Any = model.get_submodule(names[0])
    place, classes = layer.weight.device, layer_sizes(layer)[1]

    def run(net: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        inputs, labels = _inputs_and_labels(batch)
        inputs = send_to_device(inputs, place)
        with _lower(place, autocast):
            output = net(**inputs) if isinstance(inputs, Mapping) else net(inputs)
        return _checked_logits(output, len(labels), classes), labels

    shown = progress and _is_first(accelerator)
    batches = tqdm(loader, unit="batch", desc="features", disable=not shown)
    # A compiled graph does not call hooks that came after it.
    with torch.compiler.set_stance("force_eager"):
        for calls, (logits, labels) in with_head_calls(model, batches, run, names):
            vectors = [one_vector_a_sample(call, logits) for call in calls]
            rows = (torch.cat(vectors, dim=1), logits, labels)
            if accelerator is not None:
                rows = accelerator.gather_for_metrics(send_to_device(rows, accelerator.device))
            features, logits, labels = (each.cpu() for each in rows)
            yield features, logits, labels


def _lower(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def _precision(model: nn.Module, autocast: torch.dtype | None) -> torch.dtype | None:
    """The lower precision that the model runs in, if any."""
    if autocast is not None:
        return autocast
    kind = next(model.parameters()).device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _is_first(accelerator: Accelerator | None) -> bool:
    return accelerator is None or accelerator.is_main_process


def _shared(value: Any, accelerator: Accelerator | None) -> Any:
    """What the first process has."""
    return value if accelerator is None else broadcast_object_list([value])[0]


def _digest_of_data(loader: Iterable[Any], accelerator: Accelerator | None) -> str:
    own = digest_of_batches(loader)
    return own if accelerator is None else digest(*gather_object([own]))


def _inputs_and_labels(batch: Any) -> tuple[Any, Tensor]:
    """The inputs of a batch and its labels, int64 (N,) on the CPU."""
    if isinstance(batch, Mapping):
        keys = [key for key in _LABEL_KEYS if key in batch]
        if len(keys) != 1:
            expected = "one of mappings with `labels`"
            raise invalid("loader", expected, sorted(map(str, batch)), error=TypeError)
        inputs: Any = {key: value for key, value in batch.items() if key != keys[0]}
        labels = batch[keys[0]]
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, labels = batch
    else:
        shown = type(batch).__name__
        if isinstance(batch, tuple | list):
            shown += f" of {len(batch)}"
        expected = "one of pairs (inputs, labels) or of mappings with `labels`"
        raise invalid("loader", expected, shown, error=TypeError)
    if not isinstance(labels, Tensor):
        labels = torch.as_tensor(labels)
    return inputs, torch.from_numpy(label_array(one_label_a_row(labels)).copy())


def _checked_logits(output: Any, samples: int, classes: int) -> Tensor:
    logits = find_logits(output, samples, classes)
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (samples, classes):
        shape = tuple(logits.shape)
        raise invalid("model output", f"logits of shape ({samples}, {classes})", shape)
    return logits.float().cpu()
