"""Tiny image classifiers of transformers with their image processors, as local folders."""

import torch
import transformers

_VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_VIT |= {"intermediate_size": 24, "image_size": 32, "patch_size": 8}
_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
_MOBILE = {"image_size": 32, "hidden_sizes": [8, 8, 8], "num_attention_heads": 2}
_MOBILE |= {"neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 16]}
_SQUARE = {"size": {"height": 32, "width": 32}}
_CROP = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}

# Options of the config, image processor, its options
IMAGE_FOLDERS = {
    "ViT": (_VIT, "ViTImageProcessor", _SQUARE),
    "DeiT": (_VIT, "DeiTImageProcessor", {**_CROP, "size": {"height": 36, "width": 36}}),
    "Dinov2": (_VIT, "BitImageProcessor", _CROP),
    "CLIP": ({"vision_config": _VIT}, "CLIPImageProcessor", _CROP),
    "ConvNext": (
        {**_STAGES, "num_stages": 2, "patch_size": 4},
        "ConvNextImageProcessor",
        {"size": {"shortest_edge": 32}, "crop_pct": 0.8},
    ),
    "ResNet": (
        {**_STAGES, "embedding_size": 8},
        "ConvNextImageProcessor",
        {"size": {"shortest_edge": 32}},
    ),
    "Swin": (
        {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
        | {"window_size": 2, "patch_size": 4},
        "ViTImageProcessor",
        _SQUARE,
    ),
    "MobileViT": (_MOBILE, "MobileViTImageProcessor", _CROP),
}


def image_folder(path, name="ViT", labels=("cat", "dog", "elk"), **changes):
    """Write a classifier with random weights and its image processor; returns the path as text."""
    options, processor, own = IMAGE_FOLDERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        id2label=dict(enumerate(labels)), **{**options, **changes}
    )
    model = getattr(transformers, f"{name}ForImageClassification")(config)
    for parameter in model.parameters():  # of a size that makes logits differ
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    for module in model.modules():  # statistics that keep the signal
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 32, 32))
    model.save_pretrained(path)
    getattr(transformers, processor)(**own).save_pretrained(path)
    return str(path)
