"""For timm: a training task, and the CIFAR ResNets, which importing this makes known to timm."""

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
    """Make the CIFAR ResNets known to timm; importing this package has done it."""
