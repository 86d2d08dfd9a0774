"""Re-balanced heads of real timm and transformers architectures give what the formula gives."""

import copy

import pytest
import timm
import torch
from host_models import IMAGE, TEXT, hugging_face, make_real, random_features, used_by_head
from torch.utils._pytree import tree_map_only

from ldam_plugins import ClassCounts
from ldam_plugins.heads import find_head
from ldam_plugins.heads.inputs import one_vector_a_sample, with_head_calls
from ldam_plugins.posthoc import Features, extract_features, rebalance_head

COUNTS = ClassCounts([900, 300, 100, 40, 12, 5, 2])
TIMM = """
    test_vit test_byobnet test_convnext test_nfnet test_resnet test_efficientnet ghostnet_050
    mobilenetv3_small_050 deit_tiny_distilled_patch16_224 efficientformer_l1 levit_128 levit_512
    crossvit_9_240 swin_tiny_patch4_window7_224 densenet121 convmixer_768_32 repvit_m1
    xcit_nano_12_p8_224 hgnetv2_b0 resnet50_clip poolformer_s12 pit_ti_distilled_224
    inception_next_atto dla34
"""


class Head(torch.nn.Module):
    """The part of a timm model that turns features into logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, features):
        return self.model.forward_head(features)


def unfolded(features, head, method):
    """Logits of the formula in float64."""
    weight, bias = head
    if method == "tau_norm":
        return features.double() @ (weight / weight.norm(dim=1, keepdim=True)).T
    shift = (COUNTS.prior(dtype=torch.float64)[: len(weight)] * len(weight)).log()
    return features.double() @ weight.T + bias - shift


def effective(model, names):
    layers = [model.get_submodule(name) for name in names]
    weights = [layer.weight.detach().flatten(1).double() / len(names) for layer in layers]
    return torch.cat(weights, 1), torch.stack([layer.bias for layer in layers]).double().mean(0)


@torch.no_grad()
@pytest.mark.parametrize("arch", TIMM.split())
def test_timm(arch):
    """Body on the meta device, for its shapes; the head in full."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = timm.create_model(arch, num_classes=7).eval()
        empty = model.forward_features(torch.empty(4, *model.pretrained_cfg["input_size"]))
    for module in used_by_head(model, empty):
        make_real(module)
    names, head = find_head(model), Head(model).eval()
    inputs = tree_map_only(
        torch.Tensor, lambda like: random_features(like).repeat_interleave(3, 0), empty
    )
    inputs = tree_map_only(torch.Tensor, lambda x: x * (1 + torch.rand_like(x)), inputs)
    ((calls, logits),) = with_head_calls(
        head, [inputs], lambda net, x: net(x), [f"model.{n}" for n in names]
    )
    found = Features(
        torch.cat([one_vector_a_sample(c, logits) for c in calls], 1),
        logits.clone(),
        torch.arange(12) % 7,
    )
    before = effective(model, names)
    kept = copy.deepcopy([model.get_submodule(name).state_dict() for name in names])
    for method in ("logit_adjustment", "tau_norm"):
        done = rebalance_head(model, found, COUNTS, method, strength=1.0)
        expected = unfolded(found.features, before, method)
        difference = (head(inputs).double() - expected).abs().max()
        assert difference <= 1e-6 * expected.abs().max()
        done.undo()
    for name, state in zip(names, kept, strict=True):
        for key, value in model.get_submodule(name).state_dict().items():
            assert torch.equal(value, state[key])


@pytest.mark.filterwarnings("ignore:the head 'score' had no bias")
@pytest.mark.parametrize("kind", [*TEXT, *IMAGE])
def test_transformers(kind):
    model, batch = hugging_face(kind)
    model.eval()
    counts = ClassCounts(COUNTS.counts[:5])
    features = extract_features(model, [{**batch, "labels": torch.arange(8) % 5}])
    (name,) = find_head(model)
    layer = model.get_submodule(name)
    bias = torch.zeros(5) if layer.bias is None else layer.bias.detach().clone()
    done = rebalance_head(model, features, counts, "logit_adjustment", strength=1.0)
    shift = (counts.prior(dtype=torch.float64) * 5).log()
    expected = features.features.double() @ layer.weight.detach().double().T + bias - shift
    with torch.no_grad():
        difference = (model(**batch).logits.double() - expected).abs().max()
    assert difference <= 1e-6 * expected.abs().max()
    done.undo()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, features.logits)
