"""Thresholds of a trained model, from the command line to the predictions that they change."""

import json

import numpy as np
import pandas as pd
import predict
import pytest
import thresholds
import trained_options
from sklearn.metrics import precision_recall_curve

from ldam_plugins.integrations.transformers.tokenizer import train_tokenizer

WORDS = [f"w{index}" for index in range(40)]


def chosen(model, *flags):
    words = [str(model), *map(str, flags), "--quiet"]
    return thresholds.main(*trained_options.parse(thresholds.ThresholdOptions, words))


def predicted(model, data, output, *flags):
    words = [str(model), "--dataset", str(data), "--output", str(output), *map(str, flags)]
    return predict.main(*trained_options.parse(predict.PredictOptions, words))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A random BERT of two classes, and texts whose classes follow from what it says of them."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    root = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(2, 9))) for _ in range(600)]
    tokenizer = train_tokenizer(texts, vocab_size=90, min_frequency=1)
    config = BertConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=16,
        id2label={0: "ham", 1: "spam"},
        label2id={"ham": 0, "spam": 1},
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight.mul_(60)
    for each in (model, tokenizer):
        each.save_pretrained(root / "model")
    pd.DataFrame({"text": texts}).to_csv(root / "texts.csv", index=False)
    predicted(root / "model", root / "texts.csv", root / "plain.csv", "--quiet")
    plain = pd.read_csv(root / "plain.csv")
    spam = plain["probability"].where(plain["predicted"] == "spam", plain["probability_2"])
    logit = np.log(spam / (1 - spam))
    logit = (logit - logit.mean()) / logit.std() * 2 - 1.5
    is_spam = rng.random(600) < 1 / (1 + np.exp(-logit))
    labels = np.where(is_spam, "spam", "ham")
    pd.DataFrame({"text": texts, "label": labels}).to_csv(root / "labelled.csv", index=False)
    return root, spam.to_numpy(), is_spam


@pytest.fixture
def model(made):
    """The model, beside which nothing is left."""
    yield made[0] / "model"
    (made[0] / "model" / "thresholds.json").unlink(missing_ok=True)


def test_a_threshold_is_chosen_saved_and_used(made, model, tmp_path, capsys):
    root, spam, is_spam = made
    found = chosen(model, "--dataset", root / "labelled.csv", "--threshold_for", "precision=0.6")
    precision, recall, _ = precision_recall_curve(is_spam, spam)
    best = recall[:-1][precision[:-1] >= 0.6].max()
    assert found.positive == "spam"  # the rarer class
    assert found.facts["figures"]["all"]["at_threshold"]["recall"] == pytest.approx(best)
    assert abs(found.threshold - 0.5) > 0.02
    output = predicted(model, root / "texts.csv", tmp_path / "p.csv")
    told = capsys.readouterr().out
    assert f"Thresholds: 'spam' from a probability of {found.threshold:.4g} on (chosen for" in told
    table, plain = pd.read_csv(output), pd.read_csv(root / "plain.csv")
    assert (table["predicted"] == "spam").tolist() == (spam >= found.threshold).tolist()
    moved = table["predicted"] != plain["predicted"]
    assert moved.any()
    assert (table["probability"][moved] == plain["probability_2"][moved]).all()
    assert (table["predicted_2"][moved] == plain["predicted"][moved]).all()
    predicted(model, root / "texts.csv", tmp_path / "q.csv", "--thresholds", "none", "--quiet")
    assert (tmp_path / "q.csv").read_bytes() == (root / "plain.csv").read_bytes()
    with pytest.raises(ValueError, match=r"`output` must be a file that is not there.*--overwrite"):
        chosen(model, "--dataset", root / "labelled.csv", "--threshold_for", "f1")


def test_below_a_confidence_there_is_no_answer(made, model, tmp_path):
    root, spam, is_spam = made
    flags = ("--dataset", root / "labelled.csv", "--risk", 0.25, "--confidence", 0.8)
    found = chosen(model, *flags, "--choose_on", 0.5, "--test_split", 0.6)
    parts = found.facts["figures"]
    assert list(parts) == ["0.5 of test", "test"]
    assert [part["samples"] for part in parts.values()] == pytest.approx([180, 180], abs=1)
    output = predicted(model, root / "texts.csv", tmp_path / "p.parquet", "--top", 1, "--quiet")
    table = pd.read_parquet(output)
    assert list(table) == ["example", "predicted", "probability", "abstained", "error"]
    confidence = np.maximum(spam, 1 - spam)
    assert table["abstained"].tolist() == (confidence < found.abstain_below).tolist()
    assert 0.05 < table["abstained"].mean() < 0.95
    assert (table["predicted"] == "").tolist() == table["abstained"].tolist()
    assert table["probability"].to_numpy() == pytest.approx(confidence, abs=1e-6)
    assert ((spam >= 0.5) == is_spam)[~table["abstained"]].mean() >= 0.7


def test_costs_and_another_class(made, model):
    root, spam, is_spam = made
    flags = ("--dataset", root / "labelled.csv", "--threshold_for", "cost=1:3")
    found = chosen(model, *flags, "--positive", "ham")
    ham = 1 - spam

    def cost(threshold):
        called = ham >= threshold
        return ((called & is_spam) + 3.0 * (~called & ~is_spam)).mean()

    assert cost(found.threshold) == pytest.approx(min(map(cost, [0, *ham, 2])), abs=0.005)
    stored = json.loads((model / "thresholds.json").read_text())
    assert stored["facts"]["threshold_for"] == "cost=1:3"
    assert stored["positive"] == "ham"


def test_thresholds_of_other_weights_or_classes_are_refused(made, model, tmp_path):
    root = made[0]
    chosen(model, "--dataset", root / "labelled.csv", "--threshold_for", "f1")
    file = model / "thresholds.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({**stored, "weights": "0"}))
    with pytest.raises(ValueError, match="`thresholds` must be chosen for these weights"):
        predicted(model, root / "texts.csv", tmp_path / "p.csv")
    other = {**stored, "class_names": ["spam", "eggs"]}
    file.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="`thresholds` must be those of the classes of the model"):
        predicted(model, root / "texts.csv", tmp_path / "p.csv")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "`threshold_for` must be f1, precision=0.9, .*Or give --risk"),
        (("--threshold_for", "f2"), "`threshold_for` must be f1, precision=0.9"),
        (("--threshold_for", "precision=1.5"), "`threshold_for` must be"),
        (("--threshold_for", "cost=3"), "`threshold_for` must be"),
        (("--threshold_for", "f1", "--positive", "eggs"), "`positive` must be one of"),
        (("--risk", 2), r"`risk` must be in \(0, 1\)"),
        (("--risk", 0.001), "held-out samples can show, got 0.001.*3688 sure ones"),
        (("--risk", 0.1, "--choose_on", "train"), "`choose_on` must be auto, validation"),
        (("--risk", 0.1, "--choose_on", "validation"), "nothing is held out"),
        (("--risk", 0.1, "--test_split", 0.2), "nothing is held out.*--choose_on 0.5"),
    ],
)
def test_bad_input_is_named(made, model, flags, message):
    with pytest.raises(ValueError, match=message):
        chosen(model, "--dataset", made[0] / "labelled.csv", *flags)
    assert not (model / "thresholds.json").exists()
