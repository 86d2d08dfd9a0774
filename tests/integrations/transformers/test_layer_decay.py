import pytest
import torch
from hf_samples import logged, make_data, make_model, make_trainer
from transformers import Trainer

from ldam_plugins import DRWCallback
from ldam_plugins.heads import cosine_heads
from ldam_plugins.integrations.transformers.layer_decay import LayerDecayTrainer, layer_depths

PLACES = {  # an embedding, a weight of the first layer, and one of what follows the layers
    "Bert": ("bert.embeddings.LayerNorm.bias", "bert.encoder.layer.0.output.dense.weight"),
    "Roberta": ("roberta.embeddings.word_embeddings.weight", "roberta.encoder.layer.0"),
    "DistilBert": ("distilbert.embeddings.LayerNorm.bias", "distilbert.transformer.layer.0"),
    "ModernBert": ("model.embeddings.norm.weight", "model.layers.0.mlp.Wo.weight"),
    "GPT2": ("transformer.wpe.weight", "transformer.h.0.ln_1.weight"),
    "Llama": ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"),
    "ViT": ("vit.embeddings.cls_token", "vit.layers.0"),
}


def cut(depths, name):
    return {depth for key, depth in depths.items() if key.startswith(name)}


@pytest.mark.parametrize("name", PLACES)
def test_embeddings_layers_and_head_by_depth(name):
    size = "n_layer" if name == "GPT2" else "n_layers" if "Distil" in name else "num_hidden_layers"
    model = make_model(name, **{size: 3})
    depths = layer_depths(model)
    embedding, first = PLACES[name]
    assert (cut(depths, embedding), cut(depths, first)) == ({0}, {1})
    assert list(depths) == [key for key, _ in model.named_parameters()]
    assert set(depths.values()) == {0, 1, 2, 3, 4}
    last = list(depths)[-1]
    assert depths[last] == 4


def test_embeddings_that_come_after_the_layers_are_embeddings():
    model = make_model("DebertaV2", relative_attention=True, pos_att_type=["p2c"])
    assert cut(layer_depths(model), "deberta.encoder.rel_embeddings") == {0}
    assert cut(layer_depths(model), "pooler") == {2}


def test_models_without_one_list_of_layers_are_refused():
    with pytest.raises(ValueError, match=r"`layer_decay` must be left out .*has 2: \['transf"):
        layer_depths(make_model("T5"))
    with pytest.raises(ValueError, match=r"Linear has 0: \[\]"):
        layer_depths(torch.nn.Linear(2, 2))


def trainer(folder, kind=LayerDecayTrainer, **options):
    decay = {"layer_decay": 0.5} if kind is LayerDecayTrainer else {}
    make = lambda **given: kind(**decay, **given)  # noqa: E731
    return make_trainer(folder, kind=make, weight_decay=0.1, **options)


def settings(made):
    """Learning rate and weight decay by the name of the parameter."""
    names = {id(p): name for name, p in made.model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in made.optimizer.param_groups
        for p in group["params"]
    }


def test_each_depth_has_its_rate_and_weight_decay_is_that_of_the_trainer(tmp_path):
    model = make_model(num_hidden_layers=2)
    made = trainer(tmp_path, model=model)
    plain = trainer(tmp_path, Trainer, model=model)
    for each in (made, plain):
        each.create_optimizer()
    depths, found, stock = layer_depths(model), settings(made), settings(plain)
    assert found.keys() == stock.keys() == depths.keys()
    for name, (rate, decay) in found.items():
        assert rate == pytest.approx(0.01 * 0.5 ** (3 - depths[name]))
        assert decay == stock[name][1]
    assert {decay for _, decay in found.values()} == {0, 0.1}
    assert made.create_optimizer() is made.optimizer


def test_the_schedule_scales_all_rates_and_the_heads_is_logged(tmp_path):
    rates = []

    class Rates(DRWCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            super().on_step_begin(args, state, control, **kwargs)
            rates.append([group["lr"] for group in kwargs["optimizer"].param_groups])

    drw = Rates(loss="ldam", start=0.5)
    made = trainer(tmp_path, lr_scheduler_type="linear", max_steps=4, callbacks=[drw])
    made.train()
    (head,) = cosine_heads(made.model).values()
    assert any(head.weight is p for p in made.optimizer.param_groups[0]["params"])
    assert [each[0] for each in rates] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert [each[-1] / each[0] for each in rates] == pytest.approx([0.25] * 4)
    assert logged(made, "learning_rate")[0] == pytest.approx(0.01)


def test_a_resumed_run_goes_on_with_its_rates(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    whole = trainer(tmp_path / "whole", data=make_data(), **options)
    whole.train()
    torch.manual_seed(1)
    broken = trainer(tmp_path / "broken", data=make_data(), **options)
    broken.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for left, right in zip(whole.model.parameters(), broken.model.parameters(), strict=True):
        assert left.equal(right)
    assert settings(broken) == settings(whole)


def test_a_factor_out_of_bounds_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`layer_decay` must be in \(0, 1\], got 0"):
        LayerDecayTrainer(layer_decay=0, model=make_model())
