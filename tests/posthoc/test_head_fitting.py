"""Heads that are solved for on frozen features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from ldam_plugins import ClassCounts, DeferredSchedule, create_loss
from ldam_plugins.heads.layers import CosineLinear
from ldam_plugins.posthoc import fit_head

COUNTS = ClassCounts([60, 25, 8])


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    """Overlapping classes in 6 dimensions of different spread, one of which never changes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS.counts))
    centres = torch.randn(3, 6, generator=generator)
    features = centres[labels] + torch.randn(len(labels), 6, generator=generator)
    features = features * torch.tensor([1.0, 10.0, 0.1, 1.0, 5.0, 0.0]) + 3.0
    return features, labels


@pytest.mark.parametrize("kind", ["none", "rw", "drw"])
def test_linear_cross_entropy_is_the_optimum_scikit_learn_finds(
    data: tuple[Tensor, Tensor], kind: str
) -> None:
    features, labels = data
    schedule = DeferredSchedule(kind, beta=0.99)
    fitted = fit_head(
        features, labels, create_loss("ce", COUNTS), schedule=schedule, tolerance=1e-8
    )
    weights = COUNTS.weights(0.0 if kind == "none" else 0.99).double().numpy()[labels]
    inputs = StandardScaler().fit_transform(features.double().numpy())
    # The mean loss plus wd / 2 |W|^2 is scikit-learn's sum plus |W|^2 / (2 C), over N.
    oracle = LogisticRegression(C=1 / (0.01 * weights.sum()), tol=1e-10, max_iter=10_000)
    oracle.fit(inputs, labels.numpy(), sample_weight=weights)
    expected = torch.from_numpy(oracle.predict_log_proba(inputs)).float()
    assert fitted.converged
    torch.testing.assert_close(
        fitted.layer(features).detach().log_softmax(1), expected, rtol=1e-4, atol=2e-5
    )


def test_a_cosine_head_converges_and_is_one_of_the_package(data: tuple[Tensor, Tensor]) -> None:
    features, labels = data
    fitted = fit_head(features, labels, create_loss("ldam", COUNTS, max_margin=0.3, scale=10.0))
    layer = fitted.layer
    assert isinstance(layer, CosineLinear)
    assert layer.scale == 10.0
    assert fitted.converged
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(3))
    loss = create_loss("ldam", COUNTS, max_margin=0.3, scale=10.0)(layer(features), labels)
    assert loss.item() == pytest.approx(fitted.objective, rel=1e-5)
    worse = CosineLinear(6, 3, scale=10.0)
    worse.load_state_dict(layer.state_dict())
    with torch.no_grad():
        worse.weight += 0.01 * torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    criterion = create_loss("ldam", COUNTS, max_margin=0.3, scale=10.0)
    assert criterion(worse(features), labels).item() > fitted.objective


def test_weights_and_margins_are_for_rare_classes(data: tuple[Tensor, Tensor]) -> None:
    features, labels = data
    rare = labels == 2
    recall = []
    for loss, kind in (("ce", "none"), ("ce", "rw"), ("logit_adjusted", "none")):
        fitted = fit_head(
            features,
            labels,
            create_loss(loss, COUNTS),
            head="cosine",
            scale=3.0,
            schedule=DeferredSchedule(kind),
        )
        recall.append((fitted.layer(features[rare]).argmax(1) == 2).float().mean().item())
    assert recall[0] < min(recall[1:])


def test_deferred_weights_begin_at_the_solution_without_them(data: tuple[Tensor, Tensor]) -> None:
    features, labels = data
    make = {"features": features, "labels": labels, "head": "cosine", "scale": 5.0}
    fits = {
        kind: fit_head(**make, criterion=create_loss("ce", COUNTS), schedule=DeferredSchedule(kind))
        for kind in ("none", "rw", "drw")
    }
    assert fits["drw"].iterations > fits["none"].iterations
    assert fits["drw"].objective == pytest.approx(fits["rw"].objective, rel=0.02)
    assert fits["drw"].objective != pytest.approx(fits["none"].objective, rel=0.02)


def test_too_few_iterations_are_told(data: tuple[Tensor, Tensor]) -> None:
    fitted = fit_head(*data, create_loss("ce", COUNTS), max_iterations=2)
    assert not fitted.converged
    assert fitted.iterations <= 2
    assert fitted.gradient > 1e-5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.ones(93, 6, dtype=torch.int64)}, TypeError, "`features` must be a flo"),
        ({"features": torch.ones(92, 6)}, ValueError, r"`features` must be of shape \(93, D\)"),
        ({"features": torch.full((93, 6), np.nan)}, ValueError, "`features` must be finite"),
        ({"labels": torch.full((93,), 3)}, ValueError, "3"),
        ({"schedule": DeferredSchedule("drs")}, ValueError, "use 'rw' for 'rs', 'drw' for 'drs'"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay"),
        ({"head": "round"}, ValueError, "`head`"),
        ({"scale": 3.0, "criterion": create_loss("ldam", COUNTS)}, ValueError, "`scale`"),
        ({"scale": 3.0}, ValueError, "`scale` must be left out with a linear head"),
        ({"criterion": create_loss("ce", COUNTS, reduction="sum")}, ValueError, "`reduction`"),
    ],
)
def test_bad_input(
    data: tuple[Tensor, Tensor], change: dict[str, object], error: type[Exception], message: str
) -> None:
    given = {"features": data[0], "labels": data[1], "criterion": create_loss("ce", COUNTS)}
    with pytest.raises(error, match=message):
        fit_head(**{**given, **change})  # type: ignore[arg-type]
