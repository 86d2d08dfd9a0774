"""Losses by their definitions in 40-digit arithmetic, and problems to try them on."""

import mpmath
import torch
from hypothesis import settings
from hypothesis import strategies as st

from ldam_plugins import ClassCounts, create_loss

mpmath.mp.dps = 40
RELATIVE = {torch.float64: 1e-13, torch.float32: 3e-6}
SCALE = 30.0
few = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def problems(draw):
    """Counts, logits and targets of a small batch; the logits have 11 bits, exact in float16."""
    c = draw(st.integers(1, 6))
    counts = draw(st.lists(st.integers(1, 10**9), min_size=c, max_size=c))
    size = draw(st.sampled_from([2.0**-10, 1.0, 32.0, 2.0**14]))
    rows = draw(st.integers(0, 4))
    element = st.integers(-1024, 1024).map(lambda n: n * size / 1024)
    logits = draw(st.lists(element, min_size=rows * c, max_size=rows * c))
    target = draw(st.lists(st.integers(-1, c - 1), min_size=rows, max_size=rows))
    margin = draw(st.sampled_from([0.0, 0.5, 3.0, 100.0]))
    beta = draw(st.sampled_from([0.0, 0.9999, 1 - 1e-12]))
    logits = torch.tensor(logits, dtype=torch.float64).view(rows, c)
    return counts, logits, torch.tensor(target, dtype=torch.int64), margin, beta


def make(name, counts, margin, beta):
    options = (
        {"max_margin": margin} if "margin" in name or "ldam" in name or name == "hinge" else {}
    )
    loss = create_loss(name, counts, ignore_index=-1, **options)
    return loss, ClassCounts(counts).weights(beta, dtype=torch.float64)


def exact_row(name, counts, z, y, margin):
    """Loss of one row from its definition, and the largest number in it."""
    mp = mpmath.mpf
    z = [mp(v) for v in z]
    n, total, smallest, most = [mp(v) for v in counts], mp(sum(counts)), min(counts), max(counts)
    m = mp(margin)
    if name in ("ldam", "ldam_hinge"):
        m = m * mpmath.power(n[y] / smallest, mp(-1) / 4)
    if name in ("hinge", "ldam_hinge"):
        rivals = [v for j, v in enumerate(z) if j != y]
        value = max(mp(0), max(rivals) - z[y] + 30 * m) if rivals else mp(0)
    else:
        if name in ("ldam", "uniform_margin"):
            z[y] = z[y] - 30 * m
        if name in ("logit_adjusted", "vector_scaling"):
            log_prior = [mpmath.log(v / total) for v in n]
            factor = [mp(1)] * len(n)
            if name == "vector_scaling":
                factor = [mpmath.power(v / most, mp("0.15")) for v in n]
            z = [f * v + b for f, v, b in zip(factor, z, log_prior, strict=True)]
        top = max(z)
        value = mpmath.log(sum(mpmath.exp(v - top) for v in z)) + top - z[y]
        if name == "focal":
            value = (1 - mpmath.exp(-value)) ** 2 * value
    return value, max([abs(v) for v in z] + [30 * m])
