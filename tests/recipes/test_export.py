"""Models as ONNX, against torch, in another number of samples and length than were traced."""

import json

import export
import huggingface_hub.utils
import numpy as np
import onnxruntime
import pandas as pd
import pytest
import timm
import torch
import trained_options
from hub_server import TOKEN, hub
from huggingface_hub import ModelCard
from vision_runs import picture_folder, vision_run

from ldam_plugins.integrations.timm.saved_model import save_model
from ldam_plugins.integrations.transformers.bilstm import (
    BiLSTMConfig,
    BiLSTMForSequenceClassification,
)
from ldam_plugins.integrations.transformers.saved_model import describe_saved
from ldam_plugins.integrations.transformers.tokenizer import train_tokenizer

NAMES = ("1", "10", "2")


def exported(model, *flags, output):
    words = [str(model), *map(str, flags), "--output", str(output), "--quiet"]
    return export.main(*trained_options.parse(export.ExportOptions, words))


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


def bilstm_of(tokenizer):
    config = BiLSTMConfig(
        vocab_size=len(tokenizer),
        embedding_size=8,
        hidden_size=8,
        id2label=dict(enumerate(NAMES)),
        label2id={name: index for index, name in enumerate(NAMES)},
    )
    return BiLSTMForSequenceClassification(config)


def test_a_bilstm_is_refused_by_name(tickets, tmp_path):
    root, tokenizer = tickets
    bilstm_of(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"BiLSTMForSequenceClassification.*packed sequences"):
        exported(tmp_path / "model", "--dataset", root, output=tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def sent(model, *flags):
    words = [str(model), "--push_to_hub", *map(str, flags), "--quiet"]
    return export.main(*trained_options.parse(export.ExportOptions, words))


@pytest.fixture(scope="module")
def image_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("pushed")
    flags = ["--dataset", picture_folder(root / "photos"), "--epochs", 1, "--workers", 0]
    flags += ["--model", "test_resnet", "--image_size", 32, "--batch_size", 8]
    vision_run(root / "cats", *flags, report=True)
    return root / "cats"


def test_an_image_model_on_a_hub_loads_by_timm_alone(image_run, tmp_path, monkeypatch):
    with hub(tmp_path, monkeypatch):
        found = sent(image_run, "--hub_model_id", "zoo/cats")
    assert found.repo_id == "zoo/cats"
    folder = tmp_path / "zoo" / "cats"
    names = ["README.md", "classes.txt", "config.json", "model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == found.files == names
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    own = timm.create_model(f"local-dir:{image_run / 'model'}", pretrained=True).eval()
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(pixels), own(pixels), rtol=0, atol=0)
    assert model.pretrained_cfg["label_names"] == list(NAMES[:1] + NAMES[2:] + NAMES[1:2])
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "timm"
    assert 'create_model("hf-hub:zoo/cats"' in card.text
    assert "PATH/OF/THIS/FOLDER" not in card.text
    assert not (image_run.parent / "model.onnx").exists()


@pytest.mark.filterwarnings("ignore")  # of pipelines
def test_a_text_model_on_a_hub_loads_by_transformers_alone(tickets, tmp_path, monkeypatch):
    from transformers import pipeline

    _, tokenizer = tickets
    model = bilstm_of(tokenizer).eval()
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "bilstm")
    describe_saved(tmp_path / "bilstm", model, tokenizer)
    for left in ("optimizer.pt", "checkpoint-3/model.safetensors", ".cache/lock"):
        (tmp_path / "bilstm" / left).parent.mkdir(exist_ok=True)
        (tmp_path / "bilstm" / left).write_bytes(b"0")
    with hub(tmp_path / "hub", monkeypatch) as requests:
        found = sent(tmp_path / "bilstm", "--hub_private_repo")
    assert json.loads(requests[0][1])["visibility"] == "private"
    assert found.repo_id == "someone/bilstm"
    assert not [name for name in found.files if "checkpoint" in name or "optim" in name]
    folder = str(tmp_path / "hub" / "someone" / "bilstm")
    classify = pipeline("text-classification", model=folder, trust_remote_code=True, top_k=None)
    tokens = tokenizer(["where is my card"], return_tensors="pt")
    with torch.inference_mode():
        expected = model(**tokens).logits.softmax(-1)[0]
    scores = {each["label"]: each["score"] for each in classify(["where is my card"])[0]}
    np.testing.assert_allclose([scores[name] for name in NAMES], expected.numpy(), atol=1e-6)


def test_what_a_hub_refuses_is_said(image_run, tmp_path, monkeypatch):
    with hub(tmp_path, monkeypatch, token=None), pytest.raises(ValueError, match="`hf auth login`"):
        sent(image_run)
    with hub(tmp_path, monkeypatch) as requests:
        for name in ("a/b/c", "no blanks", "-cats"):
            with pytest.raises(ValueError, match="`hub_model_id` must be owner/name"):
                sent(image_run, f"--hub_model_id={name}")
        with pytest.raises(ValueError, match=r"`model` must be a run, .*save_for_hf"):
            sent(tmp_path, "--hub_model_id", "cats")
        assert not requests
    with (
        hub(tmp_path, monkeypatch, token="hf_other"),
        pytest.raises(OSError, match=r"does not take 'cats': .*hf auth whoami"),
    ):
        sent(image_run)
    with (
        hub(tmp_path, monkeypatch, readonly=True),
        pytest.raises(OSError, match="may not write there"),
    ):
        sent(image_run)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="offline mode is enabled"):
        sent(image_run)
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="`hub_model_id` must be given with --push_to_hub"):
        exported(image_run, "--hub_model_id", "cats", output=tmp_path / "model.onnx")
