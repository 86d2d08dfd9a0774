"""The CIFAR ResNets of the paper, with the interface of timm's models.

There is no ``from __future__ import annotations`` here: torch.fx passes annotations on to
TorchScript, which cannot read strings.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, create_classifier, get_device_dtype
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ldam_plugins._validation import check_choice, check_int

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)
_CHANNELS = (16, 32, 64)


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A of He et al.)."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        stride: int,
        drop_path: float,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride, padding=1, bias=False, **factory)
        self.bn1 = nn.BatchNorm2d(out_chs, **factory)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False, **factory)
        self.bn2 = nn.BatchNorm2d(out_chs, **factory)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.stride = stride
        self.pad = (out_chs - in_chs) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.drop_path(self.bn2(self.conv2(out)))
        if self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet for 32x32 images: three stages of 16, 32 and 64 channels, n blocks each.

    The network of He et al. (CVPR 2016, section 4.2) with option-A shortcuts. The weights of all
    convolutions and of the linear layer are initialised as Kaiming normal. Images may have any
    size.

    Args:
        blocks: n; the depth is 6 n + 2.
        num_classes: Outputs; 0 leaves the pooled features.
        in_chans: Channels of the images.
        global_pool: Pooling of timm's ``create_classifier``. ``"fast"`` and ``"avg"`` are both the
            mean; ``"avg"`` uses torch's layer, which compiles to more code. ``""`` with
            ``num_classes=0`` leaves the feature maps.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Share of the samples that skip the last block (stochastic depth). For the
            earlier blocks it falls linearly to 0 at the first.
        device: Device of the parameters, as in torch's layers.
        dtype: Type of the parameters, likewise.

    Raises:
        TypeError: ``blocks`` is not an integer.
        ValueError: ``blocks`` is less than 1.
    """

    def __init__(
        self,
        blocks: int,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "fast",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.num_features = _CHANNELS[-1]
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(in_chans, _CHANNELS[0], 3, padding=1, bias=False, **factory)
        self.bn1 = nn.BatchNorm2d(_CHANNELS[0], **factory)
        # A layer, not a function: timm's feature extraction runs the layers in their order.
        self.act1 = nn.ReLU()
        rates = _drop_path_rates(drop_path_rate, check_int("blocks", blocks, low=1))
        self.layer1 = _stage(_CHANNELS[0], _CHANNELS[0], 1, rates[0], **factory)
        self.layer2 = _stage(_CHANNELS[0], _CHANNELS[1], 2, rates[1], **factory)
        self.layer3 = _stage(_CHANNELS[1], _CHANNELS[2], 2, rates[2], **factory)
        self.feature_info = [
            {"num_chs": channels, "reduction": 2**i, "module": f"layer{i + 1}"}
            for i, channels in enumerate(_CHANNELS)
        ]
        self._make_classifier(num_classes, global_pool, **factory)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each stage in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Parameter groups for layer-wise learning rates."""
        blocks = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"
        return {"stem": r"^conv1|bn1", "blocks": blocks}

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """The last layer, or its name."""
        return "fc" if name_only else self.fc

    @torch.jit.ignore
    def reset_classifier(
        self,
        num_classes: int,
        global_pool: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Replace the last layer (and the pooling, if given) for ``num_classes`` outputs.

        The new layer has the model's device and dtype, unless they are given.
        """
        self.num_classes = num_classes
        pool = global_pool if global_pool is not None else self.global_pool.pool_type
        self._make_classifier(num_classes, pool, **get_device_dtype(self, device, dtype))

    @torch.jit.ignore
    def _make_classifier(self, num_classes: int, global_pool: str, **factory: Any) -> None:
        pool, fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, **factory
        )
        self.global_pool, self.fc = pool.train(self.training), fc.train(self.training)
        self.head_hidden_size = self.num_features * pool.feat_mult()

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature maps of the last stage, (N, 64, H / 4, W / 4)."""
        x = self.act1(self.bn1(self.conv1(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for stage in (self.layer1, self.layer2, self.layer3):
                x = checkpoint(stage, x)
        else:
            x = self.layer3(self.layer2(self.layer1(x)))
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Feature maps of the last stage and of the chosen stages.

        Args:
            x: Images (N, in_chans, H, W).
            indices: Stages from 0, or from the end if negative; an int is the number of last
                stages; all by default.
            norm: Without effect: there is no norm after the last stage.
            stop_early: Leave out the stages after the last chosen one.
            output_fmt: ``"NCHW"``.
            intermediates_only: Return the list of the chosen ones alone.

        Returns:
            ``(maps, chosen)``, or ``chosen``.

        Raises:
            AssertionError: there is no such stage.
            ValueError: another ``output_fmt``.
        """
        check_choice("output_fmt", output_fmt, ("NCHW",))
        taken, last = feature_take_indices(len(_CHANNELS), indices)
        stages = [self.layer1, self.layer2, self.layer3]
        chosen = []
        x = self.act1(self.bn1(self.conv1(x)))
        for index, stage in enumerate(stages[: last + 1] if stop_early else stages):
            x = checkpoint(stage, x) if self.grad_checkpointing else stage(x)
            if index in taken:
                chosen.append(x)
        return chosen if intermediates_only else (x, chosen)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the stages after the last chosen one, and with them the head.

        Args:
            indices: As in :meth:`forward_intermediates`.
            prune_norm: Without effect.
            prune_head: Drop the head also where all stages stay.

        Returns:
            The chosen stages, from 0.
        """
        taken, last = feature_take_indices(len(_CHANNELS), indices)
        for index in range(last + 1, len(_CHANNELS)):
            setattr(self, f"layer{index + 1}", nn.Sequential())
        self.num_features = _CHANNELS[last]
        if prune_head or last + 1 < len(_CHANNELS):
            self.reset_classifier(0, "")
        return taken

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (N, C) of feature maps, or the pooled features (N, 64)."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, C) of images (N, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))


def _drop_path_rates(highest: float, blocks: int) -> list[list[float]]:
    """Rates of the blocks of each stage: from 0 in the first block up to the highest."""
    total = blocks * len(_CHANNELS)
    rates = [highest * index / (total - 1) for index in range(total)]
    return [rates[begin : begin + blocks] for begin in range(0, total, blocks)]


def _stage(
    in_chans: int, out_chans: int, stride: int, drop_path_rates: list[float], **factory: Any
) -> nn.Sequential:
    first = _BasicBlock(in_chans, out_chans, stride, drop_path_rates[0], **factory)
    rest = [_BasicBlock(out_chans, out_chans, 1, rate, **factory) for rate in drop_path_rates[1:]]
    return nn.Sequential(first, *rest)


_CFG = {
    "url": "",
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "fixed_input_size": False,
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": CIFAR_MEAN,
    "std": CIFAR_STD,
    "first_conv": "conv1",
    "classifier": "fc",
}
_BLOCKS = {"cifar_resnet20": 3, "cifar_resnet32": 5, "cifar_resnet44": 7, "cifar_resnet56": 9}
default_cfgs = generate_default_cfgs({f"{name}.untrained": _CFG for name in _BLOCKS})


def _create(name: str, pretrained: bool, **options: Any) -> CifarResNet:
    options.setdefault("blocks", _BLOCKS[name])
    stages = {"out_indices": tuple(range(len(_CHANNELS)))}
    feature_cfg = stages | (options.pop("feature_cfg", None) or {})
    return build_model_with_cfg(CifarResNet, name, pretrained, feature_cfg=feature_cfg, **options)


@register_model
def cifar_resnet20(pretrained: bool = False, **options: Any) -> CifarResNet:
    """CIFAR ResNet of 20 layers, 0.27 M parameters."""
    return _create("cifar_resnet20", pretrained, **options)


@register_model
def cifar_resnet32(pretrained: bool = False, **options: Any) -> CifarResNet:
    """CIFAR ResNet of 32 layers, 0.46 M parameters, the one of the paper's CIFAR tables."""
    return _create("cifar_resnet32", pretrained, **options)


@register_model
def cifar_resnet44(pretrained: bool = False, **options: Any) -> CifarResNet:
    """CIFAR ResNet of 44 layers, 0.66 M parameters."""
    return _create("cifar_resnet44", pretrained, **options)


@register_model
def cifar_resnet56(pretrained: bool = False, **options: Any) -> CifarResNet:
    """CIFAR ResNet of 56 layers, 0.86 M parameters."""
    return _create("cifar_resnet56", pretrained, **options)
