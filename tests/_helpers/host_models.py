"""Models of the hosts, small or with a head that is real and a body for its shapes only."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification
from transformers import AutoModelForSequenceClassification as AutoText


def make_real(module):
    """Give the own tensors of a module on the meta device random values."""
    for name, old in list(module._parameters.items()):
        if old is not None:
            around = float(old.ndim == 1 and name == "weight")
            module._parameters[name] = nn.Parameter(torch.randn(old.shape) * 0.1 + around)
    for name, old in list(module._buffers.items()):
        if old is not None:
            module._buffers[name] = torch.full(old.shape, float("var" in name), dtype=old.dtype)


def used_by_head(model, features):
    """List the modules that turn the features into logits."""
    used = [model]
    hooks = [m.register_forward_pre_hook(lambda m, _: used.append(m)) for m in model.modules()]
    model.forward_head(features)
    for hook in hooks:
        hook.remove()
    return used


def random_features(like):
    return torch.randn(like.shape) * torch.randn(4, *[1] * (like.ndim - 1)).exp()


COMMON = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {
    "bert": COMMON,
    "distilbert": {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 40},
    "roberta": COMMON,
    "electra": COMMON | {"embedding_size": 16},
    "deberta-v2": COMMON | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "xlnet": {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 40},
    "modernbert": COMMON | {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2},
    "llama": COMMON | {"num_key_value_heads": 2},
    "t5": {
        "d_model": 32,
        "d_kv": 8,
        "num_layers": 1,
        "num_heads": 2,
        "d_ff": 40,
        "decoder_start_token_id": 0,
    },
    "xlm": {"emb_dim": 32, "n_layers": 1, "n_heads": 2},
    "funnel": {"d_model": 32, "n_head": 2, "d_head": 8, "d_inner": 40, "block_sizes": [1, 1]},
}
IMAGE = {
    "vit": COMMON | {"image_size": 32, "patch_size": 16},
    "convnext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "swin": {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1], "num_heads": [2]},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "timm_wrapper": {"architecture": "test_resnet"},
}


def hugging_face(kind):
    torch.manual_seed(0)
    if kind in IMAGE:
        config = AutoConfig.for_model(kind, num_labels=5, **IMAGE[kind])
        batch = {"pixel_values": torch.randn(8, 3, 32, 32)}
        return AutoModelForImageClassification.from_config(config), batch
    options = {"vocab_size": 64, "num_labels": 5, "pad_token_id": 0} | TEXT[kind]
    config = AutoConfig.for_model(kind, **options)
    ids = torch.randint(3, 60, (8, 12))
    ids[:, -1] = 1
    return AutoText.from_config(config), {"input_ids": ids}
