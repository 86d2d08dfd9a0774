"""What `find_head` reads off a model's ``forward``, and that it leaves no traces."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from head_models import mlp
from torch import nn

from ldam_plugins.heads.finder import find_head


class Written(nn.Module):
    """A model whose ``forward`` is the given function."""

    def __init__(self, forward, **children):
        super().__init__()
        self.written = forward
        self.body, self.fc = mlp(4, 6, 8), nn.Linear(8, 3)
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *args, **kwargs):
        return self.written(self, *args, **kwargs)


class Outputs(NamedTuple):
    logits: torch.Tensor
    aux_logits: torch.Tensor


OTHER = {"other": nn.Linear(8, 3)}


def stored(m, x):
    m.last = m.body(x)
    m.calls = getattr(m, "calls", 0) + 1
    m.trail.append(m.last)
    return m.fc(m.last)


def branching(m, x):
    if x.dim() == 3:
        x = x.mean(1)
    if len(x) > 1 and x.sum() > 0:
        x = x - x.mean(0)
    for row in range(x.shape[1]):
        x = x + row
    return m.fc(m.body(x))


@pytest.mark.parametrize(
    ("forward", "children", "names"),
    [
        (lambda m, x: (m.fc(m.body(x)), F.normalize(m.body(x))), {}, ("fc",)),
        (lambda m, x: {"logits": m.fc(m.body(x)), "z": m.other(m.body(x))}, OTHER, ("fc",)),
        (lambda m, x: Outputs(m.fc(m.body(x)), m.other(m.body(x))), OTHER, ("fc", "other")),
        (lambda m, x: (m.fc(m.body(x)) + m.other(m.body(x))) / 2, OTHER, ("fc", "other")),
        (lambda m, x: 0.25 * m.fc(x) + m.other(x) * 0.75, OTHER, ("fc", "other")),
        (lambda m, x: torch.stack([m.fc(x), m.other(x)]).mean(0), OTHER, ("fc", "other")),
        (lambda m, pair: (m.fc(m.body(pair[0])), m.fc(m.body(pair[1]))), {}, ("fc",)),
        (lambda m, x: m.fc(m.body(x))[:, 0, :].float(), {}, ("fc",)),
        (lambda m, x: m.fc(m.other(m.body(x)).softmax(1)), OTHER, ("fc",)),
        (lambda m, x, labels=None: m.fc(x) if labels is None else m.other(x), OTHER, ("fc",)),
        (branching, {}, ("fc",)),
    ],
)
def test_the_layer_whose_output_is_the_models(forward, children, names):
    assert find_head(Written(forward, **children)) == names
    assert find_head(nn.Sequential(Written(forward, **children))) == tuple(f"0.{n}" for n in names)


@pytest.mark.parametrize(
    "last",
    [
        nn.BatchNorm1d(3),
        nn.BatchNorm1d(3, affine=False),
        nn.LayerNorm(3),
        nn.LayerNorm(3, elementwise_affine=False),
        nn.Dropout(),
        nn.Softmax(1),
        nn.LogSoftmax(1),
        nn.Sigmoid(),
        nn.Tanh(),
        nn.ReLU(),
    ],
    ids=repr,
)
def test_what_changes_the_logits_after_the_classifier_is_refused(last):
    plain = nn.Sequential(mlp(4, 6, 8), nn.ReLU(), nn.Linear(8, 3))
    assert find_head(nn.Sequential(plain, nn.Flatten(), nn.Identity())) == ("0.2",)
    for model in (nn.Sequential(plain, last), Written(lambda m, x: m.last(m.fc(x)), last=last)):
        with pytest.raises(ValueError, match=r"after the classifier.*`head=`.*Linear, 8 -> 3"):
            find_head(model)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.fc(x) / 0.5,
        lambda m, x: m.fc(x) + m.other(x),
        lambda m, x: m.fc(x) - m.other(x),
        lambda m, x: m.fc(x) * m.fc.bias.exp(),
        lambda m, x: F.linear(x, m.fc.weight, m.fc.bias),
        lambda m, x: m.fc(x).log_softmax(1),
        lambda m, x: F.dropout(m.fc(x), 0.1, m.training),
        lambda m, x: m.fc(x)[:, -1, [0, 2]],
        lambda m, x: F.normalize(m.fc(x)) @ F.normalize(m.other(x)).T,
        lambda m, x: m.fc(x) if x.sum() > 0 else m.other(x),
        lambda m, x: (m.fc(x), m.other(x)),
        lambda m, x: {"coarse": m.fc(x), "fine": m.other(x)},
        lambda m, x: torch.stack([m.fc(x), m.other(x)]),
        lambda m, x: x.numpy()[0] + m.fc(x),
    ],
)
def test_what_is_not_certain_lists_the_candidates(forward):
    model = Written(forward, **OTHER)
    with pytest.raises(ValueError, match=r"`model` must be .*`head=`.*fc \(Linear, 8 -> 3\)"):
        find_head(model)
    assert find_head(model, "fc") == ("fc",)


def test_looking_leaves_nothing_behind():
    model = Written(stored)
    model.trail, model.fc.training = [], False
    model.register_buffer("steps", torch.zeros(2))
    model.written = lambda m, x: m.steps.add_(1) is not None and stored(m, x)
    before, random = dict(vars(model)), torch.random.get_rng_state()
    assert find_head(model) == ("fc",)
    assert vars(model).keys() == before.keys()
    assert all(vars(model)[key] is value for key, value in before.items())
    assert model.trail == []
    assert model.steps.tolist() == [0, 0]
    assert not model.fc.training
    assert torch.random.get_rng_state().equal(random)


SEEN, CALLS = [1], {"forward": 0}


def test_looking_takes_back_what_forward_leaves_in_variables_outside():
    count, met = 0, {3}

    class Telling(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            nonlocal count
            count += 1
            met.add(len(SEEN))
            SEEN.extend(x.tolist())
            CALLS["forward"] += 1
            return self.fc(self.body(x))

    assert find_head(Telling()) == ("fc",)
    assert (SEEN, CALLS, count, met) == ([1], {"forward": 0}, 0, {3})
