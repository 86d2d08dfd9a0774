"""What the head of a model gets and gives on a data set, extracted once and kept in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import send_to_device
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from ldam_plugins._validation import invalid
from ldam_plugins.counts import check_label_range, label_array
from ldam_plugins.heads.inputs import head_names, one_vector_a_sample, with_head_calls
from ldam_plugins.heads.layers import layer_sizes
from ldam_plugins.losses.model_outputs import find_logits, one_label_a_row
from ldam_plugins.training.files import write_atomic

_TENSORS = ("features", "logits", "labels")
_LABEL_KEYS = ("labels", "label")


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
            bad = (~rows.isfinite().all(dim=1)).nonzero()
            if len(bad):
                raise invalid(name, "finite", f"NaN or infinity in row {int(bad[0])}")

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
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        metadata = {
            "class_names": json.dumps(self.class_names),
            "origin": json.dumps(dict(self.origin)),
        }
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        write_atomic(path, save(tensors, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Features:
        """Read what :meth:`save` wrote.

        Raises:
            OSError: there is no such file, or it cannot be read.
            ValueError: it is no file of features.
        """
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                metadata = file.metadata() or {}
                features, logits, labels = (file.get_tensor(name) for name in _TENSORS)
                names, origin = (json.loads(metadata[key]) for key in ("class_names", "origin"))
        except (SafetensorError, KeyError) as error:
            hint = f"It cannot be read as such: {error}."
            raise invalid(
                "path", "a file written by Features.save", os.fspath(path), hint=hint
            ) from error
        return cls(features, logits, labels, None if names is None else tuple(names), origin)


def extract_features(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    head: str | Sequence[str] | None = None,
    device: str | torch.device | None = None,
    class_names: Sequence[str] | None = None,
    origin: Mapping[str, object] | None = None,
    progress: bool = False,
) -> Features:
    """Run ``model`` over ``loader`` and keep what its head gets and gives.

    The model runs in evaluation mode and without gradients; afterwards each of its modules is in
    the mode that it was in. Give a loader without augmentation. Under ``torch.autocast`` the
    features are those of the lower precision.

    Args:
        model: A classifier with a linear, 1x1 convolutional or cosine head (see `find_head`), or
            with several whose logits are averaged: a model of timm or transformers, or any other
            that returns logits or an output that holds them.
        loader: Batches as data loaders give them: pairs (inputs, labels), or mappings with
            ``labels``, as the collators of transformers make. Inputs that are a mapping are passed
            by name, without the labels.
        head: Dotted names of the layers, where `find_head` does not find the right ones.
        device: Where to run; the model is moved there and stays. Default: where its head is.
        class_names: Names of the classes that the labels count.
        origin: What to record with the features, such as the name of the weights and of the data
            set. The type of the model, its head and torch's version are recorded in any case.
        progress: Whether to show a progress bar.

    Raises:
        TypeError: a batch of another form, or labels that are not integers.
        ValueError: the head is not found; it is called more than once, or on several vectors a
            sample of which none gives the logits; the logits are not found in the model's output;
            see also :class:`Features`.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> found = extract_features(model, [(torch.randn(5, 8), torch.tensor([0, 1, 2, 0, 1]))])
        >>> found.features.shape, found.logits.shape, found.labels.shape
        (torch.Size([5, 4]), torch.Size([5, 3]), torch.Size([5]))
    """
    names = head_names(model, head)
    if device is not None:
        model.to(device)
    layer: Any = model.get_submodule(names[0])
    place, classes = layer.weight.device, layer_sizes(layer)[1]

    def run(net: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        inputs, labels = _inputs_and_labels(batch)
        inputs = send_to_device(inputs, place)
        output = net(**inputs) if isinstance(inputs, Mapping) else net(inputs)
        return _checked_logits(output, len(labels), classes), labels

    batches = tqdm(loader, unit="batch", disable=not progress)
    rows = []
    # A compiled graph does not call hooks that came after it.
    with torch.compiler.set_stance("force_eager"):
        for calls, (logits, labels) in with_head_calls(model, batches, run, names):
            vectors = [one_vector_a_sample(call, logits) for call in calls]
            rows.append((torch.cat(vectors, dim=1), logits, labels))
    if not rows:
        raise invalid("loader", "one that gives at least one batch", "none")
    features, logits, labels = (torch.cat(column) for column in zip(*rows, strict=True))
    made = {"model": type(model).__name__, "head": ", ".join(names), "torch": torch.__version__}
    return Features(
        features,
        logits,
        labels,
        None if class_names is None else tuple(map(str, class_names)),
        {**made, **{key: str(value) for key, value in (origin or {}).items()}},
    )


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
