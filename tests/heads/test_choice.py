"""The head as a choice beside the loss: what its three words mean, and what they do to a model."""

import copy
import warnings

import pytest
import torch
from head_models import Net
from torch import nn

from ldam_plugins import ClassCounts, create_loss, fold_cosine_head, list_losses, use_cosine_head
from ldam_plugins.heads import cosine_heads
from ldam_plugins.heads.choice import (
    HEADS,
    check_linear_head,
    head_scale,
    head_word,
    options_for_head,
    put_head,
    wants_cosine_head,
    warn_of_linear_head,
)
from ldam_plugins.losses import loss_class

COUNTS = ClassCounts([50, 30, 9, 4, 1])
MARGINS = [name for name in list_losses() if loss_class(name).needs_cosine_head]
OTHERS = [name for name in list_losses() if name not in MARGINS]


@pytest.mark.parametrize("name", list_losses())
def test_auto_is_cosine_for_the_losses_with_a_margin(name):
    for loss in (loss_class(name), create_loss(name, COUNTS)):
        wanted = [wants_cosine_head(loss, head) for head in HEADS]
        assert wanted == [name in MARGINS, False, True]


def test_other_words_are_refused():
    loss = create_loss("ce", COUNTS)
    for ask in (
        lambda: wants_cosine_head(loss, "cosin"),
        lambda: options_for_head("ce", {}, "cosin"),
        lambda: put_head(Net(), loss, "cosin"),
    ):
        with pytest.raises(ValueError, match=r"`head` must be .*Did you mean 'cosine'"):
            ask()
    assert list(map(head_word, (None, False, True))) == list(HEADS)
    with pytest.raises(TypeError, match="`cosine_head` must be True, False or None, got 'cosine'"):
        head_word("cosine")


@pytest.mark.parametrize("name", MARGINS)
def test_a_margin_on_a_linear_head_has_scale_1_unless_given(name):
    assert options_for_head(name, {"max_margin": 0.3}, "linear") == {"max_margin": 0.3, "scale": 1}
    assert options_for_head(name, {"scale": 4.0}, "linear") == {"scale": 4}
    for head in ("auto", "cosine"):
        assert options_for_head(name, {"max_margin": 0.3}, head) == {"max_margin": 0.3}
        assert options_for_head(name, {"scale": 4.0}, head) == {"scale": 4}


@pytest.mark.parametrize("name", OTHERS)
def test_a_scale_without_a_margin_is_that_of_the_cosine_head(name):
    assert options_for_head(name, {"scale": 20.0}, "cosine") == {}
    loss = create_loss(name, COUNTS)
    assert (head_scale(loss), head_scale(loss, 20)) == (30, 20)
    for head in ("auto", "linear"):
        with pytest.raises(
            TypeError, match=r"option of .* linear head, got 'scale'.*--head cosine"
        ):
            options_for_head(name, {"scale": 20.0}, head)


def test_the_scale_of_the_head_is_that_of_the_margins():
    loss = create_loss("ldam", COUNTS, scale=12)
    assert head_scale(loss) == head_scale(loss, 12) == 12
    with pytest.raises(ValueError, match="`scale` must be 12 or left out, as the loss's, got 20"):
        head_scale(loss, 20)
    with pytest.raises(ValueError, match="`scale` must be"):
        head_scale(create_loss("ce", COUNTS), 0)


@pytest.mark.parametrize("name", ["ldam", "ce"])
@pytest.mark.parametrize("head", HEADS)
def test_a_model_gets_the_head_that_is_asked_for(name, head):
    model = put_head(Net(), create_loss(name, COUNTS), head)
    cosine = head == "cosine" or (head == "auto" and name == "ldam")
    assert list(cosine_heads(model)) == (["heads.0"] if cosine else [])
    if cosine:
        assert model.heads[0].scale == 30
    else:
        assert type(model.heads[0]) is nn.Linear


def test_a_cosine_head_that_is_there_stays_or_another_scale_is_refused():
    loss = create_loss("ce", COUNTS)
    model = use_cosine_head(Net(), 20.0)
    there = model.heads[0]
    assert put_head(model, loss, "cosine", scale=20).heads[0] is there
    assert put_head(model, loss, "auto").heads[0] is there
    with pytest.raises(ValueError, match=r"`scale` must be 20, got 10.*fold_cosine_head"):
        put_head(model, loss, "cosine", scale=10)
    for name in ("ce", "ldam"):
        linear = create_loss(name, COUNTS)
        with pytest.raises(ValueError, match=r"linear head.*'heads.0'.*fold_cosine_head"):
            put_head(model, linear, "linear")
    assert put_head(fold_cosine_head(model), loss, "linear") is model
    check_linear_head(model)


def test_a_margin_on_a_linear_head_is_taken_off_the_logits_as_they_are():
    model, x, target = Net().eval(), torch.randn(7, 6), torch.arange(7) % 5
    loss = create_loss("ldam", COUNTS, **options_for_head("ldam", {}, "linear"))
    logits = put_head(model, loss, "linear")(x)
    shifted = logits - COUNTS.margins(0.5) * nn.functional.one_hot(target, 5)
    torch.testing.assert_close(loss(logits, target), nn.functional.cross_entropy(shifted, target))


def test_warning_is_of_margins_on_a_linear_head_alone_and_can_be_filtered():
    loss = create_loss("ldam", COUNTS, max_margin=0.4, scale=5)
    said = r"loss LDAMLoss on a linear head: .*max_margin \* scale = 0\.4 \* 5 = 2, .*as they are"
    with pytest.warns(UserWarning, match=said) as caught:
        warn_of_linear_head(loss, cosine=False)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_linear_head(loss, cosine=True)
        warn_of_linear_head(create_loss("ce", COUNTS), cosine=False)
        warnings.filterwarnings("ignore", "loss .* on a linear head")
        warn_of_linear_head(loss, cosine=False)


def test_a_cosine_head_begins_as_is_asked_for():
    """Rows of length 1, or those of the linear head, which keeps its own."""
    model = Net()
    rows = model.heads[0].weight.detach().clone()
    loss = create_loss("ldam", COUNTS)
    kept = put_head(copy.deepcopy(model), loss, init="keep").heads[0].weight
    drawn = put_head(copy.deepcopy(model), loss).heads[0].weight
    assert torch.equal(kept, rows)
    assert torch.allclose(drawn.norm(dim=1), torch.ones(len(rows)))
    linear = put_head(copy.deepcopy(model), create_loss("ce", COUNTS), init="keep").heads[0]
    assert torch.equal(linear.weight, rows)
    with pytest.raises(ValueError, match=r"`init` must be one of 'random', 'keep'"):
        put_head(model, loss, init="kept")
