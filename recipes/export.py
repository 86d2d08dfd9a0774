"""Hand a trained image or text classifier on: as ONNX, checked against torch, or to a hub.

    python recipes/export.py runs/photos --output photos.onnx
    python recipes/export.py path/to/bert --dataset tickets.csv --test_split 0.2 --output bert.onnx
    python recipes/export.py runs/photos --push_to_hub --hub_model_id me/photos

MODEL, the first word, is a run folder, a folder that transformers wrote, what timm's ``train.py``
left, or a name of timm, as for ``recipes/evaluate.py``. The options of the data are those of
``vision_lt.py`` and ``text_lt.py``; of a run they are known. The graph takes what the model takes
(pixels, or token ids and mask), of any number of samples and any length of text, and gives
``logits``; its metadata hold the names of the classes, and of images how they are prepared. Without
``pip install onnx onnxscript onnxruntime`` it stops. A BiLSTM has no such form and is refused.

``--push_to_hub`` sends the saved model as it lies there, with its card, to the hub of
``HF_ENDPOINT`` under the token of ``hf auth login`` or ``HF_TOKEN``; ONNX is then written only
where ``--output`` is given. timm loads it as ``hf-hub:me/photos``, transformers as ``me/photos``.
"""

from __future__ import annotations

from trained_options import ExportOptions, command_line

if __name__ == "__main__":  # --help and a misspelt flag are answered before torch is imported
    chosen = command_line(ExportOptions)

import json
import tempfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from trained import Host, find_host, load

from ldam_plugins.integrations.hub import Sent, send_model
from ldam_plugins.integrations.transformers.bilstm import BiLSTMForSequenceClassification
from ldam_plugins.integrations.transformers.trained_model import TEXTS
from ldam_plugins.metrics.predictions import probabilities
from ldam_plugins.reports.model_card import CARD_FILE, TO_BE_WRITTEN
from ldam_plugins.training.options import invalid

OPSET = 20
TOLERANCE = 1e-5
"""Largest difference of a probability from torch's."""


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


def main(options: ExportOptions, flags: list[str] | None = None) -> float | Sent | None:
    """Export a model, or send it to a hub.

    Args:
        options: Which model goes where.
        flags: Options of the data.

    Returns:
        The largest difference of a probability from torch's; for a model that is sent, what was.
    """
    difference = None if options.output is None else write_onnx(options, flags or [])
    return push(options) if options.push_to_hub else difference


def push(options: ExportOptions) -> Sent:
    """Send a model to a hub, if it loads."""
    folder = saved_folder(options.model)
    find_host(options)
    name = Path(options.model.removeprefix("local-dir:")).resolve().name
    sent = send_model(
        folder, options.hub_model_id or name, private=options.hub_private_repo or None
    )
    if not options.quiet:
        print(f"{sent.url}: {', '.join(sent.files)}, {sent.size / 2**20:.1f} MB.")
        card = folder / CARD_FILE
        if card.is_file() and TO_BE_WRITTEN in card.read_text(encoding="utf-8"):
            print(f'{CARD_FILE} has parts that only you can write: "{TO_BE_WRITTEN} ...".')
    return sent


def saved_folder(model: str) -> Path:
    """The folder of a model that its host loads, of a run or by itself."""
    folder = Path(model.removeprefix("local-dir:"))
    for place in (folder / "model", folder):
        if (place / "config.json").is_file():
            return place
    hint = "What timm's train.py leaves becomes such a folder by timm.models.save_for_hf."
    expected = "a run, or a folder that timm or transformers load, to be sent to a hub"
    raise invalid("model", expected, model, hint=hint)


def write_onnx(options: ExportOptions, flags: list[str]) -> float:
    """Write a model as ONNX; returns the largest difference of a probability from torch's."""
    output = Path(str(options.output))
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        hint = "Run `pip install onnx onnxscript onnxruntime`."
        raise ImportError(f"{error.name} is needed to write ONNX. {hint}") from error
    host, data = load(options, flags)
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
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(file.read_bytes())
    if not options.quiet:
        rows = sum(len(next(iter(batch.values()))) for batch in batches)
        size = output.stat().st_size / 2**20
        print(f"{output}: {size:.1f} MB, inputs {', '.join(batches[0])}, output logits.")
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
    main(*chosen)
