"""Data sets of six labels, and the labels that are read of them."""

from __future__ import annotations

import random

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers import default_data_collator

from ldam_plugins.data.training_labels import TrainingLabels

LABELS = [2, 0, 1, 0, 0, 1]


def labels_of(data, collate=default_data_collator, size=4, **options):
    """The labels of a data set, as a data loader with this collator gives them."""
    loader = DataLoader(data, size, collate_fn=collate, **options)
    return TrainingLabels(loader, size, progress=False)


def label_table(name="label", **more):
    return Dataset.from_dict({name: LABELS, "text": ["x"] * len(LABELS), **more})


class LabelRows(TorchDataset):
    """Rows as dicts; loading one draws random numbers, as augmentations do."""

    def __init__(self, rows=LABELS, name="labels", **attributes):
        self.rows, self.name, self.loaded = rows, name, []
        vars(self).update(attributes)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.loaded.append(index)
        noise = torch.rand(1).item() + np.random.rand() + random.random()
        return {"x": torch.full((2,), noise), self.name: self.rows[index]}
