"""What timm gets: the CIFAR ResNets of the paper, and LDAM-DRW as a training task."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.task import ClassificationTask
from torch import Tensor, nn

from ldam_plugins._checks import must_be
from ldam_plugins.combinations import enter_stage, warn_of_combination
from ldam_plugins.counts import ClassCounts
from ldam_plugins.heads import check_heads, use_cosine_head
from ldam_plugins.loss_base import ClassificationLoss
from ldam_plugins.losses import create_loss
from ldam_plugins.schedules import DeferredSchedule, Progress

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A of He et al.)."""

    def __init__(self, in_chs: int, out_chs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_chs)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.stride = stride
        self.pad = (out_chs - in_chs) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet for 32x32 images: three stages of 16, 32 and 64 channels, n blocks each.

    The network of He et al. (CVPR 2016, section 4.2) with option-A shortcuts, in which every
    convolution and linear weight begins as Kaiming normal. It takes images of any size.

    Args:
        blocks: n; the depth is 6 n + 2.
        num_classes: Outputs; 0 leaves the pooled features.
        in_chans: Channels of the images.
        global_pool: Pooling of timm's ``create_classifier``; ``"fast"`` is the mean, and compiles
            to less than ``"avg"``, the mean by torch's own layer.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
        self,
        blocks: int,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "fast",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.num_features = self.head_hidden_size = 64
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.feature_info = [
            {"num_chs": 16 * 2**i, "reduction": 2**i, "module": f"layer{i + 1}"} for i in range(3)
        ]
        self.global_pool, self.fc = create_classifier(64, num_classes, pool_type=global_pool)
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
    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer (and the pooling, if given) for ``num_classes`` outputs."""
        self.num_classes = num_classes
        pool = global_pool if global_pool is not None else self.global_pool.pool_type
        self.global_pool, self.fc = create_classifier(64, num_classes, pool_type=pool)

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature maps of the last stage, (N, 64, H / 4, W / 4)."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            if self.grad_checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(stage, x, use_reentrant=False)
            else:
                x = stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (N, C) of feature maps, or the pooled features (N, 64)."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, C) of images (N, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))


def _stage(in_chs: int, out_chs: int, blocks: int, stride: int) -> nn.Sequential:
    first = _BasicBlock(in_chs, out_chs, stride)
    return nn.Sequential(first, *(_BasicBlock(out_chs, out_chs, 1) for _ in range(blocks - 1)))


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
    return build_model_with_cfg(CifarResNet, name, pretrained, **options)


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


def register() -> None:
    """Make the CIFAR ResNets known to timm; importing this module has done it."""


class LongTailTask(ClassificationTask):
    """timm's classification task with a long-tail loss, its cosine head and a schedule.

    ``task(input, target)`` returns ``{"loss": ..., "output": ...}`` as every timm task does; call
    :meth:`set_progress` before an update (or once an epoch) and the class weights follow the
    schedule, in place.

    Args:
        model: A timm model, or any module whose classifier :func:`use_cosine_head` finds.
        class_counts: :class:`ClassCounts` of the training set, or the bare counts.
        loss: One of :func:`list_losses`, or a :class:`ClassificationLoss` of one's own.
        schedule: When classes are re-weighted; the sampling of ``rs`` and ``drs`` is the
            loader's (:class:`ldam_plugins.samplers.DeferredSampler`).
        device: Device of the loss buffers.
        dtype: As in timm's task.
        verbose: As in timm's task.
        **loss_options: Options of :func:`create_loss`, such as ``max_margin`` and ``scale``.
            Losses with a margin put the cosine head of their scale on the model, so make the
            optimizer after the task.

    Raises:
        TypeError: ``loss_options`` beside a ready loss, or an option the loss does not have.
        ValueError: unknown loss, bad counts, or a classifier that cannot be found.

    Example:
        >>> import timm
        >>> task = LongTailTask(timm.create_model("cifar_resnet20"), range(50, 0, -5))
        >>> task.set_progress(Progress(step=8, total_steps=10, steps_per_epoch=1))
        'reweighted'
        >>> sorted(task(torch.zeros(2, 3, 32, 32), torch.tensor([0, 9])))
        ['loss', 'output']
    """

    criterion: ClassificationLoss

    def __init__(
        self,
        model: nn.Module,
        class_counts: ClassCounts,
        *,
        loss: str | ClassificationLoss = "ldam",
        schedule: DeferredSchedule | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
        **loss_options: Any,
    ) -> None:
        if isinstance(loss, str):
            loss = create_loss(loss, class_counts, **loss_options)
        elif loss_options:
            raise TypeError(must_be("loss_options", "empty beside a ready loss", loss_options))
        if loss.needs_cosine_head:
            use_cosine_head(model, loss.scale)
        super().__init__(model, loss, device=device, dtype=dtype, verbose=verbose)
        self.schedule = schedule or DeferredSchedule()
        self._checked: int | None = None
        warn_of_combination(self.criterion, self.schedule, stacklevel=3)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Loss and logits of a batch: ``{"loss": ..., "output": ...}``.

        Raises:
            ValueError: the loss has margins and the model no cosine head of its scale, such as
                another model that took the place of the first.
            TypeError: the model gives several outputs in training.
        """
        model = self.trainable_module
        if self.criterion.needs_cosine_head and id(model) != self._checked:
            check_heads(model, self.criterion.scale)
            self._checked = id(model)
        return super().forward(input, target)

    def set_progress(self, progress: Progress) -> str:
        """Set the class weights of ``progress`` and return the name of its stage."""
        return enter_stage(self.criterion, self.schedule, progress)
