"""Models as ONNX, against torch, in another number of samples and length than were traced."""

import json

import export
import numpy as np
import onnxruntime
import pandas as pd
import pytest
import timm
import torch
import trained
from vision_runs import picture_folder

from ldam_plugins.integrations.timm.saved_model import save_model
from ldam_plugins.integrations.transformers.bilstm import (
    BiLSTMConfig,
    BiLSTMForSequenceClassification,
)
from ldam_plugins.integrations.transformers.tokenizer import train_tokenizer

NAMES = ("1", "10", "2")


def exported(model, *flags, output):
    words = [str(model), *map(str, flags), "--output", str(output), "--quiet"]
    return export.main(*trained.parse(export.ExportOptions, words))


@pytest.fixture(scope="module")
def tickets(tmp_path_factory):
    root = tmp_path_factory.mktemp("tickets")
    texts = ["where is my card", "a refund please and soon", "card"]
    rows = {"text": [f"{text} {n}" for n in range(4) for text in texts], "label": [*NAMES] * 4}
    for split in ("train", "test"):
        pd.DataFrame(rows).to_csv(root / f"{split}.csv", index=False)
    return root, train_tokenizer(rows["text"], vocab_size=60, min_frequency=1)


@pytest.mark.filterwarnings("ignore")  # of the exporter's own, which change with every release
def test_an_image_model(tmp_path):
    photos = picture_folder(tmp_path / "photos")
    model = timm.create_model("test_resnet", num_classes=3).eval()
    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    folder = tmp_path / "model"
    save_model(model, folder, class_names=NAMES, data_config=config, title="t", pretrained=None)
    output = tmp_path / "model.onnx"
    assert exported(folder, "--dataset", photos, "--compared", 5, output=output) <= 1e-5
    session = onnxruntime.InferenceSession(str(output))
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    (found,) = session.run(None, {"pixels": pixels.numpy()})
    with torch.inference_mode():
        np.testing.assert_allclose(found, model(pixels).numpy(), atol=1e-4)
    known = session.get_modelmeta().custom_metadata_map
    assert json.loads(known["class_names"]) == list(NAMES)
    assert json.loads(known["preparation"])["std"] == [0.25] * 3
    with pytest.raises(ValueError, match="`output` must be a file that is not there"):
        exported(folder, "--dataset", photos, output=output)
    with pytest.raises(ValueError, match=r"ends in \.onnx"):
        exported(folder, "--dataset", photos, output=tmp_path / "model.pt")


@pytest.mark.filterwarnings("ignore")
def test_a_text_model_of_any_length(tickets, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    root, tokenizer = tickets
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=1,
        id2label=dict(enumerate(NAMES)),
        label2id={name: index for index, name in enumerate(NAMES)},
        **sizes,
    )
    model = BertForSequenceClassification(config).eval()
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "model")
    output = tmp_path / "model.onnx"
    assert exported(tmp_path / "model", "--dataset", root, output=output) <= 1e-5
    session = onnxruntime.InferenceSession(str(output))
    tokens = tokenizer(["card and card and card and card and a refund"] * 3, return_tensors="np")
    names = {each.name for each in session.get_inputs()}
    (found,) = session.run(None, {name: tokens[name] for name in names})
    with torch.inference_mode():
        expected = model(**{k: torch.from_numpy(v) for k, v in tokens.items()}).logits
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_a_bilstm_is_refused_by_name(tickets, tmp_path):
    root, tokenizer = tickets
    config = BiLSTMConfig(
        vocab_size=len(tokenizer),
        embedding_size=8,
        hidden_size=8,
        id2label=dict(enumerate(NAMES)),
        label2id={name: index for index, name in enumerate(NAMES)},
    )
    BiLSTMForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"BiLSTMForSequenceClassification.*packed sequences"):
        exported(tmp_path / "model", "--dataset", root, output=tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
