"""What ``vision_lt.py`` leaves in ``model/``: a model that timm loads alone, as it was measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf
from torch import nn
from vision_setup import VisionOptions, image_config

from ldam_plugins import fold_cosine_head
from ldam_plugins.heads import cosine_heads
from ldam_plugins.training.history import disk_errors, write_atomic

CLASSES_FILE = "classes.txt"
# What a config of timm says of the checkpoint a model was published with.
OF_A_CHECKPOINT = {"tag", "license", "description", "origin_url", "paper_name", "paper_ids"}
OF_A_CHECKPOINT |= {"notes", "label_names", "label_descriptions"}
README = """\
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


def model_folder(options: VisionOptions) -> Path:
    """Where the model is left."""
    return Path(options.output_dir, "model")


def write_model(options: VisionOptions, model: Any, class_names: Sequence[str]) -> None:
    """Write the model with its head folded, its classes, and how it takes images; in place.

    timm's config of a model describes the checkpoint that the model was published with. Here it
    describes this one.
    """
    data_config = image_config(options, model)
    begun = model.pretrained_cfg if options.pretrained else None
    if cosine_heads(model):
        fold_cosine_head(model)
    model.to(memory_format=torch.contiguous_format)
    published = model.pretrained_cfg
    model.pretrained_cfg = {k: v for k, v in published.items() if k not in OF_A_CHECKPOINT}
    folder = model_folder(options)
    with disk_errors(options.output_dir):
        save_for_hf(
            model,
            str(folder),
            model_config={"label_names": list(class_names)},
            data_config=data_config,
            safe_serialization=True,
        )
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        # It stands beside them, where timm reads it; transformers gives it to timm once more.
        config.get("model_args", {}).pop("num_classes", None)
        write_atomic(folder / "config.json", json.dumps(config, indent=2).encode())
        write_atomic(folder / CLASSES_FILE, "".join(f"{c}\n" for c in class_names).encode())
        write_atomic(folder / "README.md", readme(options, model, class_names, begun).encode())


def readme(
    options: VisionOptions,
    model: Any,
    class_names: Sequence[str],
    begun: dict[str, Any] | None,
) -> str:
    """What the model is, what it needs, and the lines that use it."""
    package = type(model).__module__.split(".")[0]
    needs, imports = "It needs timm alone.", ""
    if package != "timm":
        needs = f"It is no model of timm's own: it needs the package `{package}`, imported first."
        imports = f"import {type(model).__module__}  # makes the model known to timm\n"
    weights = ""
    if begun is not None:
        licence = begun.get("license")
        weights = f"\nTrained on from the weights of `{options.model}`"
        weights += f" (licence: {licence})." if licence else "."
    return README.format(
        name=Path(options.output_dir).name,
        architecture=model.pretrained_cfg["architecture"],
        classes=len(class_names),
        some=", ".join(class_names[:10]) + (", ..." if len(class_names) > 10 else ""),
        begun=weights,
        needs=needs,
        imports=imports,
        classes_file=CLASSES_FILE,
    )


def read_model(options: VisionOptions) -> tuple[nn.Module, Callable[..., Any]]:
    """The saved model and its transform of images, by timm alone."""
    model = timm.create_model(f"local-dir:{model_folder(options)}", pretrained=True)
    return model, create_transform(**resolve_data_config({}, model=model))
