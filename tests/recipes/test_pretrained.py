"""Both recipes on pretrained models: what is trained of them, and at which rates."""

import json

import numpy as np
import pytest
import timm
import torch
import vision_lt
from accelerate import Accelerator
from forked import run_forked
from hf_images import image_folder
from interruptions import interrupted_at
from options import TextOptions, parse_options
from paths import RECIPES
from safetensors.torch import load_file
from timm.models import save_for_hf
from transformers import AutoModelForImageClassification, pipeline
from vision_runs import parsed, picture_folder, vision_run

from ldam_plugins.data import load_images
from ldam_plugins.heads import cosine_heads
from ldam_plugins.training.history import read_history

SHORT = ["--epochs", 2, "--schedule", "none", "--batch_size", 8, "--lr", 0.01, "--workers", 0]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return picture_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """``saved(name)``: a model of timm with weights to begin from, as its options."""
    folder = tmp_path_factory.mktemp("timm")

    def options(name="test_resnet"):
        path = folder / name
        if not path.exists():
            torch.manual_seed(0)
            model = timm.create_model(name, num_classes=5).train()
            size = model.pretrained_cfg["input_size"]
            with torch.no_grad():  # statistics that are not those of a new model
                for _ in range(3):
                    model(torch.rand(4, *size))
            save_for_hf(model, str(path), safe_serialization=True)
        return ["--model", f"local-dir:{path}", "--pretrained"]

    return options


@pytest.fixture
def run(pictures, tmp_path):
    def start(*flags, out="run", more=SHORT):
        return vision_run(tmp_path / out, "--dataset", pictures, *more, *flags), tmp_path / out

    return start


def moved(out, folder):
    """Tensors of the saved model that are not those it began from."""
    left, right = (load_file(f"{path}/model.safetensors") for path in (f"{out}/model", folder))
    assert left.keys() == right.keys()
    return {name for name in left if not left[name].equal(right[name])}


HEADS = {"test_resnet": "fc", "test_efficientnet": "classifier", "test_vit": "head"}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("more", [(), ("--head", "linear", "--ema_decay", 0.5)], ids=str)
@pytest.mark.filterwarnings("ignore:loss .* on a linear head")
def test_a_frozen_backbone_is_left_as_it_was(run, saved, name, more):
    options = saved(name)
    size = [] if name == "test_vit" else ["--image_size", 32]
    _, out = run("--freeze", "backbone", *options, *size, *more)
    folder = options[1].removeprefix("local-dir:")
    assert moved(out, folder) == {f"{HEADS[name]}.weight", f"{HEADS[name]}.bias"}


def test_without_it_the_backbone_moves(run, saved):
    options = saved()
    _, out = run(*options, "--image_size", 32)
    changed = moved(out, options[1].removeprefix("local-dir:"))
    assert {"conv1.0.weight", "bn1.running_mean", "fc.weight"} <= changed


def checkpoint(out):
    (newest,) = (out / "checkpoints").iterdir()
    return load_file(newest / "model.safetensors")


PARTS = {
    "freeze": ["--freeze", "backbone"],
    "adapters": ["--lora_rank", 2, "--ema_decay", 0.5],
    "layers": ["--layer_decay", 0.7],
    "transformers": ["--ema_decay", 0.5],
}


@pytest.mark.parametrize("part", PARTS)
def test_a_resumed_run_equals_the_undisturbed_one(run, saved, part, tmp_path):
    of_transformers = part == "transformers"
    model = ["--model", image_folder(tmp_path / "given")] if of_transformers else saved()
    flags = [*PARTS[part], *model, "--image_size", 32, "--epochs", 3, "--eval_test_every", 1]
    whole, left = run(*flags, out="whole")
    with interrupted_at(vision_lt, "evaluate"):
        run(*flags, out="broken")
    resumed, right = run(*flags, "--resume", out="broken")
    assert resumed["test"] == whole["test"]
    expected = checkpoint(left)
    assert all(value.equal(expected[name]) for name, value in checkpoint(right).items())
    assert [row["lr"] for row in read_history(left)] == [row["lr"] for row in read_history(right)]


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_adapters_are_merged_into_the_model_that_timm_loads(run, saved, name, pictures):
    options = saved(name)
    size = ["--image_size", 48]
    metrics, out = run("--lora_rank", 2, "--lora_alpha", 4, *options, *size)
    changed = moved(out, options[1].removeprefix("local-dir:")) - {"pos_embed"}
    assert {f"{HEADS[name]}.weight", "blocks.0.attn.qkv.weight"} & changed
    assert not any("running" in key or "norm" in key for key in changed)
    model = timm.create_model(f"local-dir:{out / 'model'}", pretrained=True).eval()
    _, transform = vision_lt.load_model(out / "model")
    _, test = load_images(pictures)
    with torch.no_grad():
        logits = model(torch.stack([transform(image) for image, _ in test])).double()
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(test.labels)).item()
    assert metrics["test"]["nll"] == pytest.approx(nll, abs=1e-5)


def test_adapters_train_few_weights_and_the_whole_head(saved, pictures):
    options = parsed("--dataset", pictures, *saved(), "--image_size", 32, "--lora_rank", 2)
    _, _, counts = vision_lt.load_data(options, show=False)
    model = vision_lt.make_model(options, options.make_loss(counts))
    model = vision_lt.add_adapters(model, 2, 16, (3, 32, 32))
    optimizer, _ = vision_lt.make_optimizer(options, model, torch.device("cpu"))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in held}
    assert "base_model.model.fc.weight" in names
    assert all("lora_" in name for name in names - {"base_model.model.fc.weight"})


def rates(optimizer, model):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("name", ["test_vit", "cifar_resnet20", "tiny ViT of transformers"])
def test_rates_fall_from_the_head_to_the_input_and_follow_the_schedule(name, pictures, tmp_path):
    if name.startswith("tiny"):
        name, head, first = image_folder(tmp_path), "model.classifier", "model.vit.embeddings.cls"
    else:
        head, first = ("head", "cls_token") if name == "test_vit" else ("fc", "conv1")
    flags = ["--dataset", pictures, "--model", name, "--layer_decay", 0.5, "--epochs", 4]
    options = parsed(*flags, "--lr", 0.1, "--sched", "cosine", "--weight_decay", 0.03)
    _, _, counts = vision_lt.load_data(options, show=False)
    model = vision_lt.make_model(options, options.make_loss(counts))
    assert list(cosine_heads(model)) == [head]
    optimizer, scheduler = vision_lt.make_optimizer(options, model, torch.device("cpu"))
    excluded = set(getattr(model, "no_weight_decay", set)())
    for epoch, share in ((0, 1), (2, 0.5), (3, (1 - np.sqrt(0.5)) / 2)):
        scheduler.step(epoch)
        found = rates(optimizer, model)
        assert found[f"{head}.weight"]["lr"] == pytest.approx(0.1 * share)
        (lowest,) = {group["lr"] for key, group in found.items() if key.startswith(first)}
        scales = {group["lr"] / (0.1 * share) for group in found.values()}
        depth = round(-np.log2(lowest / (0.1 * share)))
        assert sorted(scales) == pytest.approx([0.5**d for d in range(depth, -1, -1)])
        decays = {key: group["weight_decay"] for key, group in found.items()}
        assert {key for key, decay in decays.items() if decay != 0.03} == excluded & set(found)


def test_the_history_has_the_rate_of_the_head(run, saved):
    _, out = run("--layer_decay", 0.5, *saved(), "--image_size", 32)
    assert [row["lr"] for row in read_history(out)] == pytest.approx([0.01, 0.005])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--freeze", "backbone", "--model", "resnet18"], r"`freeze` must be left out.*Add --pret"),
        (["--lora_rank", 4, "--model", "resnet18"], r"`lora_rank` must be left out.*resnet18 that"),
        (["--freeze", "backbone", "--lora_rank", 4], r"`lora_rank` must be .* beside --freeze"),
        (["--lora_rank", 4, "--layer_decay", 0.5], r"`layer_decay` must be .* beside --lora_rank"),
        (["--layer_decay", 0], r"`layer_decay` must be in \(0, 1\]"),
        (["--freeze", "head"], r"`freeze` must be .*'backbone'.*got 'head'"),
        (["--model", "./folder", "--crop_pct", 0.9], r"`crop_pct` must be left out for a model of"),
        (["--model", "google/vit", "--crop_mode", "squash"], r"`crop_mode` .* image processor"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        parsed("--dataset", "digits", *flags)


@pytest.mark.parametrize(
    ("name", "is_of_transformers"),
    [
        ("resnet18.a1_in1k", False),
        ("hf-hub:timm/resnet18.a1_in1k", False),
        ("local-dir:runs/mine/model", False),
        ("google/vit-base-patch16-224", True),
        ("./folder", True),
        ("/data/folder", True),
        (None, False),
    ],
)
def test_which_library_a_name_is_of(name, is_of_transformers):
    options = vision_lt.VisionOptions(model=name)
    assert options.is_of_transformers is is_of_transformers or name is None
    if is_of_transformers:
        assert (options.is_pretrained, options.opt, options.lr) == (True, "adamw", 1e-4)


@pytest.mark.parametrize(
    ("flags", "rate", "of_texts"),
    [((), 1e-4, 5e-5), (("--freeze", "backbone"), 5e-3, 5e-3), (("--lora_rank", 4), 2e-3, 3e-4)],
    ids=str,
)
def test_the_rate_unless_told_is_that_of_what_is_trained(flags, rate, of_texts):
    assert parsed("--dataset", "digits", "--model", "./folder", *flags).lr == rate
    texts = ["--dataset", "stdlib_docstrings", "--model", "./folder", *map(str, flags)]
    options = parse_options(TextOptions, texts, default="")
    assert options.lr == of_texts


RUNS = {
    "ViT": (),
    "ViT of another size": ("--image_size", 48, "--layer_decay", 0.7),
    "ViT, adapters, timm's augmentation": ("--lora_rank", 2, "--augment", "timm"),
    "ViT, frozen": ("--freeze", "backbone", "--loss", "ce", "--val_split", 0.3),
    "MobileViT": ("--augment", "timm", "--memory_limit", 0, "--lr", 1e-4),
    "ConvNext": ("--loss", "ce", "--ema_decay", 0.5),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_pipeline_gives_the_measured_probabilities(name, run, pictures, tmp_path):
    kind = name.split(",")[0].split()[0]
    folder = image_folder(tmp_path / "given", kind)
    metrics, out = run("--model", folder, *RUNS[name])
    classify = pipeline("image-classification", str(out / "model"), device="cpu")
    _, test = load_images(pictures)
    found = classify([image for image, _ in test], top_k=3)
    rows = np.array(
        [[{p["label"]: p["score"] for p in row}[c] for c in test.class_names] for row in found]
    )
    nll = -np.log(rows[np.arange(len(rows)), test.labels]).mean()
    assert metrics["test"]["nll"] == pytest.approx(nll, abs=1e-4)
    assert metrics["test"]["top1_error"] == pytest.approx(
        100 * (rows.argmax(1) != test.labels).mean()
    )
    model = classify.model
    assert model.config.id2label == dict(enumerate(test.class_names))
    record = metrics["images"]["evaluation"]
    size = 48 if "another" in name else 32
    assert (tuple(record["input_size"]), record["crop_pct"]) == ((3, size, size), None)
    assert record["processor"].endswith("ImageProcessor")
    if "frozen" in name:
        before = AutoModelForImageClassification.from_pretrained(folder).state_dict()
        changed = {k for k, v in model.state_dict().items() if not v.equal(before[k])}
        assert changed == {"classifier.weight", "classifier.bias"}


def test_a_report_is_written_of_a_model_of_transformers(pictures, tmp_path):
    folder = image_folder(tmp_path / "given")
    flags = ["--dataset", pictures, *SHORT, "--epochs", 1, "--model", folder]
    vision_run(tmp_path / "run", *flags, report=True)
    assert "cropped by ViTImageProcessor" in (tmp_path / "run" / "report.html").read_text()


def test_a_folder_without_a_slash_is_no_model_of_transformers(run):
    with pytest.raises(ValueError, match=r"`model` must be one of|Did you mean"):
        run("--model", "folder")


DISTRIBUTED = {
    "frozen timm": lambda saved, path: [*saved(), "--freeze", "backbone"],
    "adapters": lambda saved, path: [*saved(), "--lora_rank", 2],
    "transformers": lambda saved, path: ["--model", image_folder(path, "Dinov2")],
}


@pytest.mark.parametrize("what", DISTRIBUTED)
def test_two_processes_train_what_has_gradients(what, saved, pictures, tmp_path):
    out = tmp_path / "two"
    flags = [*DISTRIBUTED[what](saved, tmp_path / "given"), "--dataset", pictures, *SHORT]
    words = [*flags, "--image_size", 32, "--output_dir", out, "--num_processes", 2]
    cpu = {"ACCELERATE_USE_CPU": "true"}
    recipe, log = RECIPES / "vision_lt.py", tmp_path / "log"
    done = run_forked(recipe, words, log, environment=cpu, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["processes"] == 2
    if what == "frozen timm":
        folder = flags[1].removeprefix("local-dir:")
        assert moved(out, folder) == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("part", ["freeze", "adapters"])
def test_what_is_trained_can_be_compiled(saved, pictures, part):
    flags = ["--dataset", pictures, *saved(), "--image_size", 32, "--compile", *PARTS[part]]
    options = parsed(*flags)
    accelerator = Accelerator(cpu=True)
    _, _, counts = vision_lt.load_data(options, show=False)
    model = vision_lt.make_model(options, options.make_loss(counts))
    if options.lora_rank:
        model = vision_lt.add_adapters(model, 2, 16, (3, 32, 32))
    net = vision_lt.compiled(accelerator, model).train()
    statistics = {k: v.clone() for k, v in model.named_buffers() if "running" in k}
    with torch.compiler.set_stance("force_eager"):
        net(torch.rand(4, 3, 32, 32)).sum().backward()
    assert all(dict(model.named_buffers())[key].equal(value) for key, value in statistics.items())
