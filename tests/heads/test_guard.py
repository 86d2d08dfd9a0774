"""What stops the training of a model whose cosine head is gone, and what has to stay unshared."""

import copy
import pickle

import pytest
import torch
from head_models import Net, examples, ordinary
from torch import nn

from ldam_plugins.heads import cosine_heads, fold_cosine_head, use_cosine_head


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def adapted(model):
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["heads.0"], r=2), model)


@pytest.mark.parametrize("change", [ordinary, adapted])
@pytest.mark.parametrize(
    "carry", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_a_head_that_is_replaced_stops_the_training(change, carry):
    x = examples(4)
    model = carry(use_cosine_head(Net()))
    model(x)
    change(model)
    with pytest.raises(ValueError, match=r"heads\.0"):
        model(x)
    with torch.no_grad():
        model(x)
    model.eval()(x)


def test_a_head_that_is_put_on_again_or_folded_trains():
    x = examples(4)
    model = use_cosine_head(Net())
    ordinary(model)
    use_cosine_head(model)(x)
    folded = fold_cosine_head(model)
    assert not folded._forward_pre_hooks
    ordinary(folded)
    folded(x)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_model_trains_without_no_head_either(fullgraph):
    torch.compiler.reset()
    x = examples(4)
    model = use_cosine_head(Net())
    compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
    torch.testing.assert_close(compiled(x), model(x))
    ordinary(model)
    with pytest.raises(Exception, match=r"exception|heads\.0"):
        compiled(x)


def test_a_weight_that_another_module_shares_is_not_parted():
    model = nn.Sequential(nn.Embedding(5, 16), nn.Linear(16, 16), nn.Linear(16, 5, bias=False))
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match=r"'2' has a weight of its own, got \"that of '0'\""):
        use_cosine_head(model)
    model[2].weight = nn.Parameter(model[0].weight.detach().clone())
    assert list(cosine_heads(use_cosine_head(model))) == ["2"]
