"""The recipe on checkpoints as the hosts' own training leaves them."""

import json
from argparse import Namespace

import numpy as np
import pytest
import rebalance as recipe
import timm
import torch
import trained_options
import transformers
import vision_lt
from options import parse_options
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.utils import CheckpointSaver
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from ldam_plugins.integrations.transformers.tokenizer import train_tokenizer
from ldam_plugins.metrics import long_tail_metrics
from ldam_plugins.training import read_metrics

COUNTS = {"ant": 40, "bee": 12, "cat": 6}
TESTED = 8
WORDS = {"ant": "apple pear plum", "bee": "iron pear lead", "cat": "oak plum lead"}


def picture(label, generator):
    """A colour of its own for each class, and noise."""
    pixels = generator.normal(110, 30, (16, 16, 3))
    pixels[:, :, label] += 50
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Class folders of a long tail, a part held out of it, and a balanced test."""
    root, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split in ("train", "validation", "test"):
        for label, (name, count) in enumerate(COUNTS.items()):
            folder = root / split / name
            folder.mkdir(parents=True)
            for row in range(count if split != "test" else TESTED):
                picture(label, generator).save(folder / f"{row}.png")
    return root


@pytest.fixture(scope="module")
def tickets(tmp_path_factory):
    """train.csv and test.csv of texts with words of their class and of others."""
    root, generator = tmp_path_factory.mktemp("tickets"), np.random.default_rng(0)
    for split in ("train", "test"):
        rows = []
        for name, count in COUNTS.items():
            for _ in range(count if split == "train" else TESTED):
                words = [
                    *generator.choice(WORDS[name].split(), 3),
                    *generator.choice(["and", "or"], 2),
                ]
                rows.append(f"{' '.join(words)},{name}")
        (root / f"{split}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return root


def biased(layer):
    """Make a head prefer the first class, as one that has learned the shares does."""
    with torch.no_grad():
        nn.init.normal_(layer.weight, std=0.5)
        layer.bias.copy_(torch.tensor([2.0, 0.5, -2.0]))


def run(model, *flags, output):
    return recipe.main(
        *trained_options.parse(
            recipe.RebalanceOptions, [str(model), *flags, "--output_dir", str(output), "--quiet"]
        )
    )


def check_outputs(folder, metrics):
    """The files, and that they say what was returned."""
    saved = read_metrics(folder)
    assert saved["test"]["per_class_accuracy"] == metrics["test"]["per_class_accuracy"]
    assert saved["before"]["calibration"]["ece"] == metrics["before"]["calibration"]["ece"]
    assert (folder / "confusion.csv").is_file()
    page = (folder / "report.html").read_text()
    assert "Before and after" in page
    assert "ant" in page
    assert saved["rebalance"]["method"] in page
    assert "http" not in page.replace("http-equiv", "")


def image_logits(model, transform, folder):
    """Logits and labels of the test images, by what the host's own loaders gave."""
    images, labels = [], []
    for label, name in enumerate(sorted(COUNTS)):
        for file in sorted((folder / "test" / name).iterdir()):
            images.append(transform(Image.open(file).convert("RGB")))
            labels.append(label)
    with torch.no_grad():
        return model.eval()(torch.stack(images)), torch.tensor(labels)


def timm_args():
    """The options of timm's train.py that its checkpoints hold."""
    given = {"model": "test_resnet", "num_classes": 3, "img_size": 32, "in_chans": None, "gp": None}
    given |= {"input_size": None, "mean": None, "std": None, "interpolation": "bilinear"}
    return Namespace(**given, crop_pct=1.0, model_kwargs={})


def train_py_folder(folder):
    """What timm's train.py leaves: made by its own saver, as its loop calls it."""
    model = timm.create_model("test_resnet", num_classes=3)
    biased(model.fc)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saver = CheckpointSaver(
        model, optimizer, args=timm_args(), checkpoint_dir=str(folder), recovery_dir=str(folder)
    )
    saver.save_checkpoint(0, metric=50.0)
    return model


def test_a_checkpoint_of_timms_training(photos, tmp_path):
    folder = tmp_path / "output" / "train" / "resnet"
    folder.mkdir(parents=True)
    model = train_py_folder(folder)
    out = tmp_path / "out"
    flags = ["--dataset", str(photos), "--method", "logit_adjustment", "--strength", "1"]
    metrics = run(folder, *flags, output=out)
    check_outputs(out, metrics)
    loaded = timm.create_model(f"local-dir:{out / 'model'}", pretrained=True)
    config = resolve_data_config({}, model=loaded)
    assert (config["input_size"], config["interpolation"], config["crop_pct"]) == (
        (3, 32, 32),
        "bilinear",
        1.0,
    )
    logits, labels = image_logits(loaded, create_transform(**config), photos)
    own, _ = image_logits(model, create_transform(**config), photos)
    shift = -torch.log(torch.tensor([3 * count / 58 for count in COUNTS.values()]))
    torch.testing.assert_close(logits, own + shift, rtol=1e-5, atol=1e-5)
    found = long_tail_metrics(logits, labels, list(COUNTS.values()))
    assert metrics["test"]["per_class_accuracy"] == found["per_class_accuracy"]
    assert metrics["test"]["nll"] == pytest.approx(found["nll"], abs=1e-5)
    before = long_tail_metrics(own, labels, list(COUNTS.values()))
    assert metrics["before"]["top1_error"] == before["top1_error"]
    assert list(loaded.pretrained_cfg["label_names"]) == sorted(COUNTS)
    # The file itself goes as well, and what was re-balanced is a model of timm's own.
    again = run(folder / "model_best.pth.tar", *flags, output=tmp_path / "again")
    assert again["test"] == metrics["test"]
    twice = run(
        f"local-dir:{out / 'model'}",
        "--dataset",
        str(photos),
        "--method",
        "none",
        output=tmp_path / "twice",
    )
    assert twice["before"]["nll"] == pytest.approx(metrics["test"]["nll"], abs=1e-5)


def test_a_choice_on_held_out_images(photos, tmp_path, capsys):
    train_py_folder(tmp_path)
    flags = ["--dataset", str(photos), "--test_split", "test", "--val_split", "validation"]
    out = tmp_path / "out"
    options, rest = trained_options.parse(
        recipe.RebalanceOptions, [str(tmp_path), *flags, "--folds", "2", "--output_dir", str(out)]
    )
    with pytest.warns(UserWarning, match="all 58 samples .* it stays 1"):
        metrics = recipe.main(options, rest)
    printed = capsys.readouterr().out
    assert "in the order of the data, as it names none" in printed
    assert "balanced accuracy" in printed
    assert metrics["options"]["choose_on"] == "validation"
    assert metrics["rebalance"]["choice"]["samples"] == 58
    assert metrics["rebalance"]["temperature"] == 1
    check_outputs(out, metrics)


def text_classifier_folder(folder, tickets, **config):
    """What transformers' text-classification example leaves: by Trainer.save_model."""
    texts = [line.split(",")[0] for line in (tickets / "train.csv").read_text().splitlines()[1:]]
    tokenizer = train_tokenizer(texts, max_length=32)
    names = config.pop("names", sorted(COUNTS))
    options = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1}
    options |= {"num_attention_heads": 2, "intermediate_size": 16, "num_labels": len(names)}
    options |= {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**options | config))
    if len(names) == 3:
        biased(model.classifier)
    arguments = TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True)
    trainer = Trainer(model=model, args=arguments, processing_class=tokenizer)
    trainer.save_model()
    return model.eval()


def text_logits(model, tokenizer, tickets):
    rows = [line.split(",") for line in (tickets / "test.csv").read_text().splitlines()[1:]]
    logits = []
    for text, _ in rows:
        with torch.no_grad():
            logits.append(model(**tokenizer(text, return_tensors="pt")).logits)
    return torch.cat(logits), [name for _, name in rows]


def test_a_checkpoint_of_transformers_text_classification(tickets, tmp_path):
    names = ["cat", "ant", "bee"]  # not the order of the data
    model = text_classifier_folder(tmp_path / "bert", tickets, names=names)
    out = tmp_path / "out"
    flags = ["--dataset", str(tickets), "--method", "logit_adjustment", "--strength", "1"]
    metrics = run(tmp_path / "bert", *flags, output=out)
    check_outputs(out, metrics)
    loaded = AutoModelForSequenceClassification.from_pretrained(out / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert list(loaded.config.id2label.values()) == names
    assert tokenizer.model_max_length == 32
    assert 'pipeline("text-classification"' in (out / "model" / "README.md").read_text()
    logits, labels = text_logits(loaded, tokenizer, tickets)
    own, _ = text_logits(model, tokenizer, tickets)
    counts = [COUNTS[name] for name in names]
    shift = -torch.log(torch.tensor([3 * count / 58 for count in counts]))
    torch.testing.assert_close(logits, own + shift, rtol=1e-5, atol=1e-5)
    target = torch.tensor([names.index(name) for name in labels])
    found = long_tail_metrics(logits, target, counts)
    assert metrics["test"]["per_class_accuracy"] == found["per_class_accuracy"]
    assert metrics["class_names"] == tuple(names)
    pipeline = transformers.pipeline("text-classification", model=str(out / "model"))
    assert pipeline("apple pear")[0]["label"] in names


def test_an_image_classifier_of_transformers(photos, tmp_path):
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3,
        id2label=dict(enumerate(sorted(COUNTS))),
        label2id={name: index for index, name in enumerate(sorted(COUNTS))},
    )  # fmt: skip
    model = transformers.ResNetForImageClassification(config)
    biased(model.classifier[1])
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0)
    model.save_pretrained(tmp_path / "resnet")
    processor.save_pretrained(tmp_path / "resnet")
    out = tmp_path / "out"
    metrics = run(
        tmp_path / "resnet",
        "--dataset",
        str(photos),
        "--method",
        "tau_norm",
        "--strength",
        "1",
        output=out,
    )
    check_outputs(out, metrics)
    loaded = AutoModelForImageClassification.from_pretrained(out / "model")
    weight = model.classifier[1].weight
    torch.testing.assert_close(
        loaded.classifier[1].weight, weight / weight.norm(dim=1, keepdim=True)
    )
    classify = transformers.pipeline("image-classification", model=str(out / "model"))
    found = [
        classify(str(file), top_k=1)[0]["label"] == name
        for name in sorted(COUNTS)
        for file in sorted((photos / "test" / name).iterdir())
    ]
    assert 100 * (1 - np.mean(found)) == pytest.approx(metrics["test"]["top1_error"])


def test_a_run_of_this_package_knows_its_data(photos, tmp_path):
    flags = ["--dataset", str(photos / "train"), "--test_split", "0.2", "--val_split", "0.2"]
    flags += ["--model", "test_resnet", "--image_size", "32", "--epochs", "1", "--workers", "0"]
    flags += [
        "--start",
        "0.5",
        "--batch_size",
        "8",
        "--output_dir",
        str(tmp_path / "run"),
        "--quiet",
    ]
    trained = vision_lt.main(parse_options(vision_lt.VisionOptions, flags, default=""))
    metrics = run(tmp_path / "run", "--folds", "2", output=tmp_path / "out")
    assert metrics["options"]["choose_on"] == "validation"
    assert metrics["class_counts"].tolist() == trained["class_counts"].tolist()
    assert metrics["before"]["per_class_accuracy"] == trained["test"]["per_class_accuracy"]
    with pytest.raises(ValueError, match="`output_dir` must be a folder that holds no") as refused:
        run(tmp_path / "run", output=tmp_path / "out")
    assert "--resume" not in str(refused.value)  # which this recipe does not have
    # What was re-balanced is a run again.
    again = run(tmp_path / "out", "--method", "none", "--no_calibrate", output=tmp_path / "again")
    assert again["before"]["per_class_accuracy"] == metrics["test"]["per_class_accuracy"]


def test_a_share_of_the_test_set_is_chosen_on_and_not_measured(tickets, tmp_path):
    text_classifier_folder(tmp_path / "bert", tickets)
    out = tmp_path / "out"
    metrics = run(
        tmp_path / "bert",
        "--dataset",
        str(tickets),
        "--choose_on",
        "0.5",
        "--folds",
        "2",
        output=out,
    )
    assert sum(metrics["test"]["per_class_samples"]) == 12
    assert metrics["rebalance"]["choice"]["samples"] == 12
    assert metrics["options"]["choose_on"] == "0.5 of test"


def test_target_shares_are_in_the_order_of_the_classes(tickets, tmp_path):
    text_classifier_folder(tmp_path / "bert", tickets, names=["cat", "ant", "bee"])
    flags = ["--dataset", str(tickets), "--method", "logit_adjustment", "--strength", "1"]
    metrics = run(
        tmp_path / "bert", *flags, "--target_prior", "0.2,0.7,0.1", output=tmp_path / "out"
    )
    assert metrics["rebalance"]["target_prior"] == pytest.approx([0.2, 0.7, 0.1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "`dataset` must be given for a model that is no run"),
        (["--lr", "0.1"], "`arguments` must be options of this recipe or of the data, got '--lr'"),
        (["--choose_on", "1.5"], "`choose_on` must be auto, train, validation, or a share"),
        (["--choose_on", "validation"], "`choose_on` must be another part: nothing is held out"),
        (["--target_prior", "even"], "`target_prior` must be uniform, train, estimate, or shares"),
        (["--target_prior", "0.5,0.5"], r"`target_prior` must be of shape \(3,\)"),
        (["--target_prior", "0.5,0.5,0.5"], "`target_prior` must be probabilities that sum to 1"),
        (["--method", "crt", "--strength", "-1"], "`strength` must be a finite number > 0"),
        (["--folds", "1"], "`folds` must be"),
    ],
)
def test_bad_options_leave_nothing(tickets, tmp_path, flags, message):
    text_classifier_folder(tmp_path / "bert", tickets)
    flags = [*flags, "--dataset", str(tickets)] if flags else []
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "bert", *flags, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_classes_and_other_models_are_refused(tickets, photos, tmp_path):
    text_classifier_folder(tmp_path / "bert", tickets, names=["ant", "bee", "dog"])
    given = ["--dataset", str(tickets)]
    with pytest.raises(
        ValueError, match=r"of the model's 3 classes.*model alone: \['dog'\].*\['cat'\]"
    ):
        run(tmp_path / "bert", *given, output=tmp_path / "out")
    text_classifier_folder(tmp_path / "five", tickets, names=[f"LABEL_{n}" for n in range(5)])
    with pytest.raises(ValueError, match=r"data of the model's 5 classes, got 'data of 3 classes'"):
        run(tmp_path / "five", *given, output=tmp_path / "out")
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    (tmp_path / "body").mkdir()
    (tmp_path / "body" / "config.json").write_text(
        json.dumps(config | {"architectures": ["BertModel"]})
    )
    with pytest.raises(ValueError, match=r"a classifier, whose config names a model.*BertModel"):
        run(tmp_path / "body", *given, output=tmp_path / "out")
    (tmp_path / "runs" / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"Give one of its checkpoints, such as .*checkpoint-5"):
        run(tmp_path / "runs", *given, output=tmp_path / "out")
    (tmp_path / "x.pth.tar").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=r"a checkpoint of timm's train.py"):
        run(tmp_path / "x.pth.tar", "--dataset", str(photos), output=tmp_path / "out")
    with pytest.raises(ValueError, match="a model that timm can make and load"):
        run("no_such_model", "--dataset", str(photos), output=tmp_path / "out")
    with pytest.raises(ValueError, match=r"`output_dir` must be a folder.*x\.pth\.tar is a file"):
        run("no_such_model", "--dataset", str(photos), output=tmp_path / "x.pth.tar" / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_without_a_bias_gets_none(tickets, tmp_path):
    texts = [line.split(",")[0] for line in (tickets / "train.csv").read_text().splitlines()[1:]]
    tokenizer = train_tokenizer(texts, max_length=32)
    names = sorted(COUNTS)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, pad_token_id=0,
        num_labels=3, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)},
    )  # fmt: skip
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "gpt")
    tokenizer.save_pretrained(tmp_path / "gpt")
    flags = ["--dataset", str(tickets)]
    with pytest.raises(ValueError, match=r"`method` must be one that needs no bias.*tau_norm"):
        run(tmp_path / "gpt", *flags, "--method", "crt", "--strength", "1", output=tmp_path / "out")
    metrics = run(
        tmp_path / "gpt", *flags, "--method", "tau_norm", "--strength", "1", output=tmp_path / "out"
    )
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model").eval()
    logits, labels = text_logits(
        loaded, AutoTokenizer.from_pretrained(tmp_path / "out" / "model"), tickets
    )
    target = torch.tensor([names.index(name) for name in labels])
    found = long_tail_metrics(logits, target, list(COUNTS.values()))
    assert metrics["test"]["per_class_accuracy"] == found["per_class_accuracy"]


def test_the_shares_of_unlabelled_images_are_estimated_and_doubted(photos, tmp_path):
    folder = tmp_path / "resnet"
    folder.mkdir()
    train_py_folder(folder)
    new = tmp_path / "new"
    new.mkdir()
    for index, path in enumerate((photos / "test" / "cat").iterdir()):
        (new / f"{index}.png").write_bytes(path.read_bytes())
    flags = ["--dataset", str(photos), "--method", "logit_adjustment", "--strength", "1"]
    flags += ["--target_prior", "estimate", "--target_data", str(new)]
    with pytest.warns(UserWarning, match=r"class shares of .*new cannot be trusted"):
        metrics = run(folder, *flags, output=tmp_path / "out")
    found = read_metrics(tmp_path / "out")["target_estimate"]
    assert found["samples"] == TESTED
    assert not found["is_trusted"]
    assert "nothing is held out" in found["reasons"][-1]
    assert metrics["rebalance"]["target_prior"] == pytest.approx(found["prior"])
    for bad, message in (
        (["--target_prior", "estimate"], "`target_data` must be given with"),
        (["--target_data", str(new)], "`target_data` must be given with"),
        (
            ["--target_prior", "estimate", "--target_data", str(tmp_path / "no")],
            "`?target_data`?|no",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(folder, *flags[:6], *bad, output=tmp_path / "other")
    assert not (tmp_path / "other").exists()
