"""``config.loss_type = "LDAM"`` for the models that ask transformers for their loss."""

import pytest
import torch
from hf_samples import COUNTS, ldam_oracle, make_data, make_model, tensors
from transformers.loss.loss_utils import LOSS_MAPPING

from ldam_plugins import use_cosine_head
from ldam_plugins.integrations.transformers import register


def _outputs(name, **changes):
    model = use_cosine_head(make_model(name, **changes)).train()
    inputs, labels = tensors(make_data(name))
    return model, inputs, labels


@pytest.mark.parametrize("name", ["Llama", "ViT", "Swin", "ConvNext", "TimmWrapper"])
def test_models_that_ask_are_answered(name):
    model, inputs, labels = _outputs(name, loss_type="LDAM", class_counts=COUNTS)
    out = model(**inputs, labels=labels)
    torch.testing.assert_close(out.loss, ldam_oracle(out.logits, labels))
    with torch.no_grad():
        out = model(**inputs, labels=labels)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))


@pytest.mark.parametrize("name", ["Llama", "ViT", "ConvNext"])
def test_other_models_keep_their_loss(name):
    model, inputs, labels = _outputs(name)
    out = model(**inputs, labels=labels)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))


def test_options_and_items_are_used():
    options = {"max_margin": 0.25, "scale": 30.0}
    model, inputs, labels = _outputs(
        "ViT", loss_type="LDAM", class_counts=[1, 1, 1], ldam_options=options
    )
    out = model(**inputs, labels=labels, num_items_in_batch=48)
    shifted = out.logits - 7.5 * torch.nn.functional.one_hot(labels, 3)
    wanted = torch.nn.functional.cross_entropy(shifted, labels) / 2
    torch.testing.assert_close(out.loss, wanted)


def test_loss_type_of_the_model_works_as_well():
    model, inputs, labels = _outputs("Llama", class_counts=COUNTS)
    model.loss_type = "LDAM"
    out = model(**inputs, labels=labels)
    torch.testing.assert_close(out.loss, ldam_oracle(out.logits, labels))


def test_missing_counts_say_what_to_write():
    model, inputs, labels = _outputs("ViT", loss_type="LDAM")
    with pytest.raises(ValueError, match=r"config\.class_counts ="):
        model(**inputs, labels=labels)


def test_registering_again_changes_nothing():
    before = dict(LOSS_MAPPING)
    register()
    assert before == LOSS_MAPPING
    assert "LDAM" in LOSS_MAPPING
