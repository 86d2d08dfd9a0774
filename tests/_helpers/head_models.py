"""Small classifiers to put a cosine head on, and what their tests share."""

from itertools import pairwise

import torch
from torch import nn


class Net(nn.Module):
    """Features of varying length, dropout, and one or two heads whose logits are averaged."""

    def __init__(self, heads=1, dropout=0.0, classes=5, shared=True):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU())
        self.other = self.body if shared else nn.Sequential(nn.Linear(6, 16), nn.ReLU())
        self.drop = nn.Dropout(dropout)
        self.heads = nn.ModuleList(nn.Linear(16, classes) for _ in range(heads))
        self.num_classes = classes

    def forward(self, x):
        features = (self.drop(self.body(x)), self.drop(self.other(x)))
        pairs = zip(features, self.heads, strict=False)
        return torch.stack([head(part) for part, head in pairs]).mean(0)


def examples(n=200):
    """Inputs (n, 6) of very different lengths."""
    return torch.randn(n, 6) * torch.randn(n, 1).exp()


def ordinary(model):
    """Replace the first head of a `Net` by an ordinary layer."""
    model.heads[0] = nn.Linear(16, 5)


def mlp(*sizes):
    """Linear layers of these sizes, ReLU between them."""
    pairs = pairwise(sizes)
    return nn.Sequential(*(part for a, b in pairs for part in (nn.Linear(a, b), nn.ReLU())))[:-1]
