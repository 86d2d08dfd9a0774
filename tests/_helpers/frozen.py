"""Simulated features of long-tailed classes, and models that are a head on them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldam_plugins import ClassCounts
from ldam_plugins.posthoc import Features


def long_tail(samples: int, classes: int, ratio: float) -> ClassCounts:
    """About so many samples in an exponential long tail."""
    shares = ratio ** (-np.arange(classes) / (classes - 1))
    return ClassCounts(np.maximum(1, samples * shares / shares.sum()).astype(int))


def gaussians(classes: int, size: int, generator: torch.Generator, *, even: bool = False) -> Tensor:
    """Class means (C, D) about 2.2 apart from 0; of one length if ``even``."""
    means = 2.2 * F.normalize(torch.randn(classes, size, generator=generator), dim=1)
    if even:
        return means
    return means * (0.6 + 0.8 * torch.rand(classes, 1, generator=generator))


def draw(means: Tensor, counts, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Samples (N, D) of unit Gaussians about the means, and their classes."""
    labels = torch.repeat_interleave(torch.arange(len(means)), torch.tensor(counts))
    noise = torch.randn(len(labels), means.shape[1], generator=generator)
    return means[labels] + noise, labels


def bayes(means: Tensor, log_prior: Tensor | float = 0.0) -> nn.Sequential:
    """The model whose logits are ``log p(x | c) + log_prior_c`` up to a constant."""
    model = nn.Sequential(nn.Identity(), nn.Linear(means.shape[1], len(means)))
    with torch.no_grad():
        model[1].weight.copy_(means)
        model[1].bias.copy_(-means.double().square().sum(1) / 2 + log_prior)
    return model


@torch.no_grad()
def features_of(model: nn.Module, x: Tensor, labels: Tensor) -> Features:
    """What extract_features gives of a model that is a head alone."""
    return Features(x, model(x), labels)
