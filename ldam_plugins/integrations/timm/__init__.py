"""For timm: a training task, and the CIFAR ResNets, which this import registers with timm."""

from ldam_plugins.integrations.timm.cifar_resnet import (
    CIFAR_MEAN,
    CIFAR_STD,
    CifarResNet,
    cifar_resnet20,
    cifar_resnet32,
    cifar_resnet44,
    cifar_resnet56,
)
from ldam_plugins.integrations.timm.task import LongTailTask

__all__ = [
    "CIFAR_MEAN",
    "CIFAR_STD",
    "CifarResNet",
    "LongTailTask",
    "cifar_resnet20",
    "cifar_resnet32",
    "cifar_resnet44",
    "cifar_resnet56",
    "register",
]


def register() -> None:
    """Register the CIFAR ResNets with timm: the import of this package has done it."""
