import warnings

import pytest
import torch

from ldam_plugins import ClassCounts, DeferredSchedule, create_loss, list_losses
from ldam_plugins.losses import combination_advice, loss_class, warn_of_combination
from ldam_plugins.schedules import KINDS, Progress

COUNTS = ClassCounts([600, 300, 90, 10])
CORRECTING = [name for name in list_losses() if loss_class(name).corrects_prior]
START, END = Progress(0, 10, 1), Progress(9, 10, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list_losses())
def test_only_what_corrects_the_prior_twice_is_advised_against(name, kind):
    advice = combination_advice(create_loss(name, COUNTS), DeferredSchedule(kind))
    assert (advice is not None) == (name in CORRECTING and kind in ("rw", "drw", "drs"))


@pytest.mark.parametrize("name", CORRECTING)
def test_what_has_no_effect_is_not_advised_against(name):
    assert combination_advice(create_loss(name, COUNTS, tau=0), DeferredSchedule("drw")) is None
    without = DeferredSchedule("drw", beta=0)
    assert combination_advice(create_loss(name, COUNTS), without) is None
    assert "(tau=0.5)" in combination_advice(create_loss(name, COUNTS, tau=0.5), DeferredSchedule())


def test_warning_is_the_callers():
    loss = create_loss("logit_adjusted", COUNTS)
    with pytest.warns(UserWarning, match="loss LogitAdjustedLoss under schedule 'drw'") as caught:
        warn_of_combination(loss, DeferredSchedule("drw"))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "loss .* under schedule")
        warn_of_combination(loss, DeferredSchedule("drw"))
    warn_of_combination(loss, DeferredSchedule("none"))


@pytest.mark.parametrize("name", CORRECTING)
def test_optimum_is_what_the_advice_says(name):
    """Logits without a gradient: balanced before the switch, as far past it as ERM falls short."""
    loss = create_loss(name, COUNTS, reduction="sum")
    factors = getattr(loss, "multiplicative", torch.ones(len(COUNTS)))
    prior = COUNTS.prior(dtype=torch.float64)
    conditional = prior[None]  # p(y | x) of a sample that tells nothing: p(x | y) is all the same
    schedule = DeferredSchedule("drw", beta=1 - 1e-12)
    for progress, expected in [(START, torch.zeros_like(prior)), (END, -prior.log())]:
        loss.weight.copy_(schedule.class_weights(COUNTS, progress))
        logits = (expected / factors)[None].requires_grad_()
        loss(logits, conditional).backward()
        assert logits.grad.abs().max() < 1e-6 * loss.weight.max()
        off = (expected / factors + torch.tensor([1.0, 0, 0, 0]))[None].requires_grad_()
        loss(off, conditional).backward()
        assert off.grad.abs().max() > 1e-3
