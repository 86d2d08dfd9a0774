"""The saved model of a run is what its ``metrics.json`` was measured on."""

import contextlib
import io
import json

import numpy as np
import pytest
import timm
import torch
from timm.data import create_dataset, create_transform, resolve_data_config
from transformers import AutoImageProcessor, AutoModelForImageClassification
from vision_runs import picture_folder, vision_run

from ldam_plugins.choices import BUNDLED
from ldam_plugins.data import load_images
from ldam_plugins.integrations.timm.models import BUNDLED_MODELS

SHORT = ["--epochs", 1, "--schedule", "none", "--batch_size", 8, "--lr", 0.02]
PICTURES = ["--dataset", "PICTURES", "--lr", 0.01]
SMALL = [*PICTURES, "--model", "cifar_resnet20"]
RESNET = ["--model", "test_resnet", "--image_size", 32]
FILES = ["--memory_limit", 0, "--workers", 0]
CROP = ["--crop_pct", 0.7, "--crop_mode", "squash"]
RUNS = {
    "digits": ["--dataset", "digits", *RESNET, "--profile", "exp"],
    "another size, average": [*SMALL, "--image_size", 12, "--ema_decay", 0.5],
    "from files, bf16": [*SMALL, *FILES, "--image_size", 20, "--mixed_precision", "bf16"],
    "vit of another size": [*PICTURES, "--model", "test_vit", "--image_size", 48],
    "timm's augmentation": [*PICTURES, "--model", "test_efficientnet", "--workers", 0],
    "own crop": [*PICTURES, *RESNET, "--loss", "ce", *CROP],
}


def metrics_of(logits, labels):
    """Error in %, nll and calibration error (15 equal bins), in float64."""
    z = logits.double().numpy()
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    hit, sure = p.argmax(1) == labels, p.max(1)
    bins = np.minimum((sure * 15).astype(int), 14)
    gaps = [abs((sure[bins == b] - hit[bins == b]).sum()) for b in range(15)]
    nll = -np.log(p[np.arange(len(p)), labels]).mean()
    return 100 * (1 - hit.mean()), nll, sum(gaps) / len(p)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return picture_folder(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize("name", RUNS)
def test_a_stranger_with_timm_measures_what_the_run_did(name, pictures, tmp_path):
    flags = [pictures if flag == "PICTURES" else flag for flag in RUNS[name]]
    measured = vision_run(tmp_path, *SHORT, *flags)
    _, test = load_images(flags[1])

    model = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=model))
    with torch.no_grad():
        logits = model(torch.stack([transform(image) for image, _ in test]))

    stored = json.loads((tmp_path / "metrics.json").read_text())["test"]
    assert stored == {
        k: v for k, v in measured["test"].items() if k not in ("confusion", "predictions")
    }
    error, nll, ece = metrics_of(logits, test.labels)
    assert stored["top1_error"] == pytest.approx(error, abs=1e-9)
    assert stored["nll"] == pytest.approx(nll, abs=1e-5, rel=1e-5)
    assert stored["ece"] == pytest.approx(ece, abs=1e-5)
    assert tuple(model.pretrained_cfg["label_names"]) == test.class_names


@pytest.fixture(scope="module")
def vit(pictures, tmp_path_factory):
    """The folder of a run of a vision transformer, and its metrics."""
    out = tmp_path_factory.mktemp("vit")
    flags = ["--dataset", pictures, "--model", "test_vit.r160_in1k", "--image_size", 48]
    return out, vision_run(out, *SHORT, *flags)


def test_transformers_loads_it_too(vit, pictures):
    out, measured = vit
    model = AutoModelForImageClassification.from_pretrained(out / "model").eval()
    processor = AutoImageProcessor.from_pretrained(out / "model")
    _, test = load_images(pictures)
    with torch.no_grad():
        logits = model(**processor([image for image, _ in test])).logits
    error, nll, _ = metrics_of(logits, test.labels)
    assert measured["test"]["top1_error"] == pytest.approx(error, abs=1e-9)
    assert measured["test"]["nll"] == pytest.approx(nll, rel=1e-5)
    assert model.config.id2label == dict(enumerate(test.class_names))


def test_config_says_nothing_of_another_checkpoint(vit):
    out, _ = vit
    config = json.loads((out / "model" / "config.json").read_text())
    told = config["pretrained_cfg"]
    assert not {"tag", "license", "url", "paper_ids", "paper_name", "origin_url"} & set(told)
    assert not {"hf_hub_id", "hf_hub_filename", "test_input_size", "test_crop_pct"} & set(told)
    assert told["input_size"] == [3, 48, 48]
    assert told["num_classes"] == config["num_classes"] == 3
    assert config["label_names"] == ["1", "2", "10"]
    assert config["model_args"]["img_size"] == [48, 48]


def readme_code(out):
    text = (out / "model" / "README.md").read_text()
    return text, text.split("```python\n")[1].split("```")[0]


def test_readme_says_what_is_needed_and_its_lines_work(vit, pictures, tmp_path):
    out, _ = vit
    text, code = readme_code(out)
    assert "ldam_plugins" not in text
    code = code.replace("PATH/OF/THIS/FOLDER", str(out / "model"))
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(code.replace("IMAGE", f"{pictures}/test/10/00.png"), namespace := {})
    assert shown.getvalue().strip() in ("1", "2", "10")
    parts = {type(part).__module__.split(".")[0] for part in namespace["model"].modules()}
    assert parts == {"timm", "torch"}
    vision_run(tmp_path, *SHORT, "--dataset", pictures, "--model", "cifar_resnet20")
    assert readme_code(tmp_path)[1].startswith("import ldam_plugins.integrations.timm  # makes")


# timm leaves the files it opens to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore:.*unclosed file")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_timm_reads_class_folders_in_the_order_of_the_logits(vit, pictures):
    """Its own order is 1, 2, 10."""
    out, measured = vit
    images = create_dataset("", f"{pictures}/test", class_map=str(out / "model" / "classes.txt"))
    model = timm.create_model(f"local-dir:{out / 'model'}", pretrained=True).eval()
    images.transform = create_transform(**resolve_data_config({}, model=model))
    with torch.no_grad():
        hits = [model(image[None]).argmax().item() == label for image, label in images]
    assert 100 * (1 - np.mean(hits)) == pytest.approx(measured["test"]["top1_error"])


def test_a_saved_model_is_trained_on_under_its_own_classes(vit, pictures, tmp_path):
    """The classes of the second set are those of the first in another order."""
    first = ["--dataset", pictures, *RESNET, "--loss", "ce", "--lr", 0.05, "--epochs", 10]
    before = vision_run(tmp_path / "a", *SHORT, *first)
    lines = {split: [] for split in ("train", "test")}
    for split, found in lines.items():
        for label, name in enumerate(("2", "1", "10")):
            count = {"1": 9, "10": 6, "2": 4}[name] if split == "train" else 5
            found += [f"{split}/{name}/{i:02}.png {label}" for i in range(count)]
        (tmp_path / f"{split}.txt").write_text("\n".join(found))
    config = json.loads((tmp_path / "a" / "model" / "config.json").read_text())
    config["label_names"] = ["1", "0", "2"]  # what the lists call them
    (tmp_path / "a" / "model" / "config.json").write_text(json.dumps(config))
    again = ["--dataset", pictures, "--loss", "ce", "--image_size", 32, "--pretrained"]
    again += ["--train_list", tmp_path / "train.txt", "--test_list", tmp_path / "test.txt"]
    again += ["--model", f"local-dir:{tmp_path / 'a' / 'model'}"]
    after = vision_run(tmp_path / "b", *SHORT, *again, "--lr", 1e-9, "--opt", "momentum")
    # With the classes as they were ordered before, each image would count for another class.
    assert max(run["test"]["top1_error"] for run in (before, after)) < 20
    assert "Trained on from" in (tmp_path / "b" / "model" / "README.md").read_text()


def test_weights_of_a_package_are_trained_on(pictures, tmp_path, monkeypatch):
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_efficientnet").state_dict(), weights)
    monkeypatch.setitem(BUNDLED_MODELS, "small", ("test_efficientnet", lambda: weights))
    monkeypatch.setitem(BUNDLED, "small", "a-package")
    flags = ["--dataset", pictures, "--model", "small", "--image_size", 32, "--workers", 0]
    vision_run(tmp_path / "run", *SHORT, *flags)
    folder = tmp_path / "run" / "model"
    assert "Trained on from the weights of `small`" in (folder / "README.md").read_text()
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert loaded.num_classes == 3
    # The licence of the weights goes on; nothing else of them does.
    assert loaded.pretrained_cfg["license"] == "apache-2.0"
    assert "origin_url" not in json.loads((folder / "config.json").read_text())["pretrained_cfg"]
