"""Write a trained image or text classifier as ONNX, and check it against torch on real samples.

    python recipes/export.py runs/photos --output photos.onnx
    python recipes/export.py path/to/bert --dataset tickets.csv --test_split 0.2 --output bert.onnx

MODEL, the first word, is a run folder, a folder that transformers wrote, what timm's ``train.py``
left, or a name of timm, as for ``recipes/evaluate.py``. The options of the data are those of
``vision_lt.py`` and ``text_lt.py``; of a run they are known. The graph takes what the model takes
(pixels, or token ids and mask), of any number of samples and any length of text, and gives
``logits``; its metadata hold the names of the classes, and of images how they are prepared. Without
``pip install onnx onnxscript onnxruntime`` it stops. A BiLSTM has no such form and is refused.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from trained import Host, TrainedOptions, command_line, load

from ldam_plugins.integrations.transformers.bilstm import BiLSTMForSequenceClassification
from ldam_plugins.integrations.transformers.trained_model import TEXTS
from ldam_plugins.metrics.predictions import probabilities
from ldam_plugins.training.options import COUNT, Limits, invalid, option

OPSET = 20
TOLERANCE = 1e-5
"""Largest difference of a probability from torch's."""


@dataclass
class ExportOptions(TrainedOptions):
    """Which model is exported. Further flags are those of the recipes that choose the data."""

    LIMITS: ClassVar[dict[str, Limits]] = TrainedOptions.LIMITS | {"compared": COUNT}

    output: str = option("model.onnx", "file that is written")
    compared: int = option(64, "test samples by which it is compared with torch")

    def __post_init__(self) -> None:
        super().__post_init__()
        if Path(self.output).suffix.lower() != ".onnx":
            raise invalid("output", "a file that ends in .onnx", self.output)
        if Path(self.output).exists() and not self.overwrite:
            hint = "Choose another one, or --overwrite it."
            raise invalid("output", "a file that is not there", self.output, hint=hint)


class Logits(nn.Module):
    """A classifier as a function from its inputs, in their order, to its logits.

    Args:
        model: The classifier.
        names: Of its inputs; one without a name is given by place.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits (N, C)."""
        named = dict(zip(self.names, inputs, strict=True))
        output = self.model(*inputs) if PIXELS in named else self.model(**named)
        return output if isinstance(output, Tensor) else output.logits


PIXELS = "pixels"


def main(options: ExportOptions, flags: list[str] | None = None) -> float:
    """Export a model; returns the largest difference of a probability from torch's."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        hint = "Run `pip install onnx onnxscript onnxruntime`."
        raise ImportError(f"{error.name} is needed to write ONNX. {hint}") from error
    host, data = load(options, flags or [])
    batches = inputs_of(host, data.parts["test"].samples, options)
    model = Logits(host.model.cpu().float(), tuple(batches[0])).eval()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "model.onnx")
        write_graph(model, batches[0], file)
        graph = onnx.load(str(file))
        onnx.helper.set_model_props(graph, metadata(host, data.counts.class_names))
        onnx.save(graph, str(file))
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        difference = max(compared(session, model, batch) for batch in batches)
        if not difference <= TOLERANCE:
            expected = f"a model that ONNX computes to {TOLERANCE:g} in probabilities"
            raise invalid("model", expected, f"one that is {difference:.2g} off")
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_bytes(file.read_bytes())
    if not options.quiet:
        rows = sum(len(next(iter(batch.values()))) for batch in batches)
        size = Path(options.output).stat().st_size / 2**20
        print(f"{options.output}: {size:.1f} MB, inputs {', '.join(batches[0])}, output logits.")
        print(f"Its probabilities of {rows} test samples are torch's to {difference:.1e}.")
    return difference


def inputs_of(host: Host, samples: Any, options: ExportOptions) -> list[dict[str, Tensor]]:
    """The inputs of some test samples by name, in batches of two lengths at least."""
    pick = "select" if host.kind == TEXTS else "subset"
    count = min(options.compared, len(samples))
    some = getattr(samples, pick)(np.linspace(0, len(samples) - 1, count).astype(int))
    found = []
    for batch in islice(host.make_loader(some), count):
        if isinstance(batch, Mapping):
            found.append({name: rows for name, rows in batch.items() if name != "labels"})
        else:
            found.append({PIXELS: batch[0]})
    if len(found) == 1:  # another number of samples than that which was traced
        found.append({name: rows[:1] for name, rows in found[0].items()})
    return found


def write_graph(model: Logits, batch: Mapping[str, Tensor], file: Path) -> None:
    """Export through ``torch.export`` with the number of samples, and the length, left open."""
    kind = type(model.model).__name__
    if isinstance(model.model, BiLSTMForSequenceClassification):
        hint = "Its LSTMs run over packed sequences of different lengths, which ONNX has not."
        raise invalid("model", "one that torch.export can follow", kind, hint=hint)
    is_open = torch.export.Dim.DYNAMIC
    shapes = tuple(dict.fromkeys((0, 1) if t.ndim == 2 else (0,), is_open) for t in batch.values())
    # Of one sample the exporter would take it that there is never another number.
    inputs = tuple(torch.cat([rows, rows]) if len(rows) == 1 else rows for rows in batch.values())
    try:
        torch.onnx.export(
            model,
            inputs,
            str(file),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(batch),
            output_names=["logits"],
            dynamic_shapes=(shapes,),
            external_data=False,
            verbose=False,
        )
    except Exception as error:  # whatever an exporter of any model may raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        expected = "one that torch.export can follow"
        raise invalid("model", expected, kind, hint=f"It stopped with: {reason}") from error


def compared(session: Any, model: nn.Module, batch: Mapping[str, Tensor]) -> float:
    """The largest difference of a probability between ONNX and torch."""
    (logits,) = session.run(["logits"], {name: rows.numpy() for name, rows in batch.items()})
    with torch.inference_mode():
        expected = model(*batch.values())
    difference = probabilities(torch.from_numpy(logits)) - probabilities(expected)
    return float(difference.abs().max())


def metadata(host: Host, class_names: Any) -> dict[str, str]:
    """What someone needs who has the file alone."""
    names = host.class_names or class_names or ()
    found = {"class_names": json.dumps(list(names), ensure_ascii=False), "kind": host.kind}
    if host.preparation:
        found["preparation"] = json.dumps(host.preparation)
    return found


if __name__ == "__main__":
    main(*command_line(ExportOptions))
