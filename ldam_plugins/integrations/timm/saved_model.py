"""A trained model as a folder that timm loads by itself, with its classes and preprocessing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf
from torch import nn

from ldam_plugins.heads import cosine_heads, fold_cosine_head
from ldam_plugins.reports.model_card import write_card
from ldam_plugins.training.files import disk_errors, write_atomic

CLASSES_FILE = "classes.txt"
# Entries of timm's config that describe the checkpoint a model was published with.
_OF_A_CHECKPOINT = {"tag", "license", "description", "origin_url", "paper_name", "paper_ids"}
_OF_A_CHECKPOINT |= {"notes", "label_names", "label_descriptions"}
_README = """\
# {name}

{architecture} for {classes} classes: {some}.{begun}
{needs}

```python
{imports}import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

model = timm.create_model("local-dir:PATH/OF/THIS/FOLDER", pretrained=True).eval()
transform = create_transform(**resolve_data_config({{}}, model=model))
with torch.no_grad():
    logits = model(transform(Image.open("IMAGE").convert("RGB"))[None])
print(model.pretrained_cfg["label_names"][logits.argmax()])
```

`metrics.json` of the run was measured so, in float32. `{classes_file}` holds the classes in the
order of the logits, one a line: what timm's `validate.py` and `create_dataset` take as `class_map`.
"""


def save_model(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    class_names: Sequence[str],
    data_config: Mapping[str, Any],
    title: str,
    pretrained: str | None = None,
) -> None:
    """Write a model for ``timm.create_model("local-dir:...", pretrained=True)``.

    Beside the weights and the config there are a README with the lines that use the model, and
    ``classes.txt`` with the classes in the order of the logits. timm's config of a model describes
    the checkpoint that it was published with; here it describes this one. The model itself is
    changed: its cosine head is folded, in place.

    Args:
        model: A model of timm.
        folder: Where to write it.
        class_names: Names of the classes, in the order of the logits.
        data_config: How images become its input, as of timm's ``resolve_data_config``.
        title: Heading of the README.
        pretrained: Name of the model whose weights it was trained on from, if there is one.

    Raises:
        OSError: the folder cannot be written.
    """
    published = model.pretrained_cfg
    licence = published.get("license") if pretrained else None
    if cosine_heads(model):
        fold_cosine_head(model)
    model.to(memory_format=torch.contiguous_format)
    model.pretrained_cfg = {k: v for k, v in published.items() if k not in _OF_A_CHECKPOINT}
    if licence:  # what comes of the weights stands under it, too
        model.pretrained_cfg["license"] = licence
    folder = Path(folder)
    with disk_errors(folder.parent):
        save_for_hf(
            model,
            str(folder),
            model_config={"label_names": list(class_names)},
            data_config=dict(data_config),
            safe_serialization=True,
        )
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        # timm reads it beside the arguments; transformers would pass it to timm twice.
        config.get("model_args", {}).pop("num_classes", None)
        readme = _readme(model, class_names, title, pretrained, licence)
        write_atomic(folder / "config.json", json.dumps(config, indent=2).encode())
        write_atomic(folder / CLASSES_FILE, "".join(f"{c}\n" for c in class_names).encode())
        write_card(
            folder,
            readme,
            library="timm",
            task="image-classification",
            base_model=_hub_id(pretrained, published),
        )


def load_model(folder: str | os.PathLike[str]) -> tuple[nn.Module, Callable[..., Any]]:
    """The model of :func:`save_model` and its transform of images, both by timm alone."""
    model = timm.create_model(f"local-dir:{os.fspath(folder)}", pretrained=True)
    return model, create_transform(**resolve_data_config({}, model=model))


def _hub_id(pretrained: str | None, published: Mapping[str, Any]) -> str | None:
    """Where on the hub the weights are from that a model was trained on from, if they are."""
    if pretrained is None:
        return None
    kind, _, hub_id = pretrained.partition(":")
    if kind in ("hf-hub", "hf_hub"):
        return hub_id
    is_timms = pretrained.partition(".")[0] == published["architecture"]
    return published.get("hf_hub_id") if is_timms else None


def _readme(
    model: Any, class_names: Sequence[str], title: str, pretrained: str | None, licence: str | None
) -> str:
    """What the model is, what it needs, and the lines that use it."""
    module = type(model).__module__
    package = module.partition(".")[0]
    needs, imports = "It needs timm alone.", ""
    if package != "timm":
        needs = f"It is no model of timm's own: it needs the package `{package}`, imported first."
        registers = __package__ if module.startswith(f"{__package__}.") else module
        imports = f"import {registers}  # makes the model known to timm\n"
    weights = ""
    if pretrained is not None:
        weights = f"\nTrained on from the weights of `{pretrained}`"
        weights += f" (licence: {licence})." if licence else "."
    return _README.format(
        name=title,
        architecture=model.pretrained_cfg["architecture"],
        classes=len(class_names),
        some=", ".join(class_names[:10]) + (", ..." if len(class_names) > 10 else ""),
        begun=weights,
        needs=needs,
        imports=imports,
        classes_file=CLASSES_FILE,
    )
