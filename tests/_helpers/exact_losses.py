"""Every loss by its formula, in 40-digit arithmetic and in torch, and problems to try them on.

A new loss gets an entry in ``ROWS`` and in ``TERMS``; then the tests of all losses test it.
"""

import mpmath
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from mpmath import mpf

from ldam_plugins import ClassCounts, create_loss
from ldam_plugins.losses import loss_options

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
    options = {"max_margin": margin} if "max_margin" in loss_options(name) else {}
    loss = create_loss(name, counts, ignore_index=-1, **options)
    return loss, ClassCounts(counts).weights(beta, dtype=torch.float64)


def exact_row(name, counts, z, y, margin):
    """Loss of one row from its definition, and the largest number in it."""
    n, m = [mpf(v) for v in counts], mpf(margin)
    value, used = ROWS[name]([mpf(v) for v in z], y, n, m)
    return value, max(abs(v) for v in used)


def _cross_entropy(z, y):
    top = max(z)
    return mpmath.log(sum(mpmath.exp(v - top) for v in z)) + top - z[y], z


def _focal(z, y):
    nll, _ = _cross_entropy(z, y)
    return (1 - mpmath.exp(-nll)) ** 2 * nll, z


def _with_margin(z, y, m):
    shifted = [v - 30 * m * (j == y) for j, v in enumerate(z)]
    value, _ = _cross_entropy(shifted, y)
    return value, [*shifted, 30 * m]


def _hinge(z, y, m):
    others = [v for j, v in enumerate(z) if j != y]
    value = max(mpf(0), max(others) - z[y] + 30 * m) if others else mpf(0)
    return value, [*z, 30 * m]


def _of_ldam(m, n, y):
    return m * mpmath.power(n[y] / min(n), mpf(-1) / 4)


def _log_prior(n):
    return [mpmath.log(v / sum(n)) for v in n]


def _logit_adjusted(z, y, n):
    return _cross_entropy([v + b for v, b in zip(z, _log_prior(n), strict=True)], y)


def _vector_scaling(z, y, n):
    return _logit_adjusted(
        [mpmath.power(c / max(n), mpf("0.15")) * v for c, v in zip(n, z, strict=True)], y, n
    )


ROWS = {
    "ce": lambda z, y, n, m: _cross_entropy(z, y),
    "focal": lambda z, y, n, m: _focal(z, y),
    "ldam": lambda z, y, n, m: _with_margin(z, y, _of_ldam(m, n, y)),
    "ldam_hinge": lambda z, y, n, m: _hinge(z, y, _of_ldam(m, n, y)),
    "hinge": lambda z, y, n, m: _hinge(z, y, m),
    "uniform_margin": lambda z, y, n, m: _with_margin(z, y, m),
    "logit_adjusted": lambda z, y, n, m: _logit_adjusted(z, y, n),
    "vector_scaling": lambda z, y, n, m: _vector_scaling(z, y, n),
}
"""Loss of a row of logits at class y, with counts n and margin m, and the numbers it is made of."""


def definition(name, counts, weight):
    """Each loss by its formula, in float64, from nothing but operations of torch."""
    n = torch.tensor(counts.counts, dtype=torch.float64)

    def value(logits, target):
        z, w = logits.double(), weight.double()
        if target.ndim == 2:
            return (TERMS[name](z, target.double(), n) * target * w).sum() / len(z)
        q = F.one_hot(target.clamp_min(0), z.shape[1]).double()
        q = q * (target != -100).unsqueeze(1)
        return (TERMS[name](z, q, n) * q * w).sum() / (q * w).sum()

    return value


def _focal_terms(z):
    log_p = z.log_softmax(1)
    return -((1 - log_p.exp()) ** 2) * log_p


def _hinge_terms(z, margins):
    others = z.unsqueeze(1).expand(-1, z.shape[1], -1)
    same = torch.eye(z.shape[1], dtype=torch.bool)
    return (others.masked_fill(same, -torch.inf).amax(2) - z + SCALE * margins).clamp_min(0)


def _margins(n):
    return 0.5 * (n / n.min()) ** -0.25


TERMS = {
    "ce": lambda z, q, n: -z.log_softmax(1),
    "focal": lambda z, q, n: _focal_terms(z),
    "ldam": lambda z, q, n: -(z - SCALE * _margins(n) * q).log_softmax(1),
    "ldam_hinge": lambda z, q, n: _hinge_terms(z, _margins(n)),
    "hinge": lambda z, q, n: _hinge_terms(z, torch.full_like(n, 0.5)),
    "uniform_margin": lambda z, q, n: -(z - SCALE * 0.5 * q).log_softmax(1),
    "logit_adjusted": lambda z, q, n: -(z + (n / n.sum()).log()).log_softmax(1),
    "vector_scaling": lambda z, q, n: (
        -((n / n.max()) ** 0.15 * z + (n / n.sum()).log()).log_softmax(1)
    ),
}
"""Terms (N, C) of the classes, of logits z and targets q (N, C); a row is their sum with q."""
