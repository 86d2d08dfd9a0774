"""Bad input, one row a case: the error, and that its message names argument, value and way out."""

import os
import shutil

import numpy as np
import options as recipe_options
import pytest
import text_lt
import torch
import vision_lt
from accelerate.state import AcceleratorState
from image_sets import class_folders, write

from ldam_plugins import (
    ClassCounts,
    DeferredSchedule,
    LongTailMetrics,
    create_loss,
    long_tail_counts,
    long_tail_indices,
    use_cosine_head,
)
from ldam_plugins.data.texts import load_texts, subsample_classes
from ldam_plugins.metrics import MetricAccumulator
from ldam_plugins.samplers import DeferredSampler
from ldam_plugins.schedules import Progress
from ldam_plugins.training.checkpoints import write_checkpoint
from ldam_plugins.training.options import read_preset
from ldam_plugins.training.run_dir import claim_output_dir

BOTH, VISION, TEXT = ("vision", "text"), ("vision",), ("text",)
POSITIVE = "a finite number > 0"
NOT_NEGATIVE = "a finite number >= 0"
SHARE_BELOW_1 = r"in \[0, 1\)"
COUNT = "an integer >= 1 and <= 2147483647"
COUNT_OR_0 = "an integer >= 0 and <= 2147483647"
SEED = "an integer >= 0 and <= 4294967295"

# Recipes, option, bad values, what the message says it must be.
OUT_OF_RANGE = [
    (BOTH, "lr", ["nan", "inf", "-1", "0"], POSITIVE),
    (BOTH, "epochs", ["0", "-1", "2147483648"], COUNT),
    (BOTH, "batch_size", ["0", "-4", "999999999999"], COUNT),
    (BOTH, "accumulation", ["0", "-1"], COUNT),
    (BOTH, "seed", ["-1", "4294967296"], SEED),
    (BOTH, "subset_seed", ["-1"], SEED),
    (BOTH, "val_split", ["0", "1", "nan", "-0.1"], r"in \(0, 1\)"),
    (BOTH, "ratio", ["nan", "inf", "-3"], "a finite number >= 1"),
    (BOTH, "beta", ["1", "nan", "-0.1"], SHARE_BELOW_1),
    (BOTH, "max_margin", ["nan", "-1"], NOT_NEGATIVE),
    (BOTH, "scale", ["0", "inf"], POSITIVE),
    (BOTH, "gamma", ["-1"], NOT_NEGATIVE),
    (BOTH, "tau", ["nan"], NOT_NEGATIVE),
    (BOTH, "keep_checkpoints", ["0", "-1"], COUNT),
    (BOTH, "num_processes", ["0", "-1"], COUNT),
    (BOTH, "weight_decay", ["-1", "nan"], NOT_NEGATIVE),
    (VISION, "clip_grad", ["0", "-1", "nan", "inf"], POSITIVE),
    (TEXT, "clip_grad", ["-1", "nan"], NOT_NEGATIVE),
    (VISION, "momentum", ["1.5", "nan", "-1"], SHARE_BELOW_1),
    (VISION, "warmup_epochs", ["-1"], COUNT_OR_0),
    (VISION, "warmup_lr", ["nan"], NOT_NEGATIVE),
    (VISION, "decay_milestones", ["-4"], COUNT_OR_0),
    (VISION, "decay_rate", ["-1", "nan"], NOT_NEGATIVE),
    (VISION, "min_lr", ["-1"], NOT_NEGATIVE),
    (BOTH, "mixup", ["-1", "nan"], NOT_NEGATIVE),
    (VISION, "cutmix", ["-1"], NOT_NEGATIVE),
    (VISION, "smoothing", ["1", "-0.1", "nan"], SHARE_BELOW_1),
    (BOTH, "ema_decay", ["1", "-1", "nan"], SHARE_BELOW_1),
    (BOTH, "sam", ["-1", "nan", "inf"], NOT_NEGATIVE),
    (BOTH, "sam_every", ["0"], COUNT),
    (BOTH, "eval_every", ["0", "-1"], COUNT),
    (BOTH, "eval_test_every", ["-1"], COUNT_OR_0),
    (BOTH, "patience", ["0", "-1"], COUNT),
    (VISION, "image_size", ["0", "-8"], COUNT),
    (VISION, "memory_limit", ["-1"], "an integer >= 0"),
    (VISION, "crop_pct", ["0", "1.5", "nan"], r"in \(0, 1\]"),
    (VISION, "padding", ["-1"], COUNT_OR_0),
    (VISION, "crop_scale", ["0", "1.1"], r"in \(0, 1\]"),
    (VISION, "color_jitter", ["-1", "nan"], NOT_NEGATIVE),
    (VISION, "cutout", ["-1"], COUNT_OR_0),
    (VISION, "erasing", ["-0.1", "1.5", "nan"], r"in \[0, 1\]"),
    (VISION, "hflip", ["2", "nan"], r"in \[0, 1\]"),
    (VISION, "workers", ["-1"], COUNT_OR_0),
    (TEXT, "rare_fraction", ["0", "1.5", "nan"], r"in \(0, 1\]"),
    (TEXT, "max_length", ["0"], COUNT),
    (TEXT, "vocab_size", ["-1"], COUNT),
    (TEXT, "embedding_size", ["0"], COUNT),
    (TEXT, "hidden_size", ["0"], COUNT),
    (TEXT, "embedding_dropout", ["1", "-0.5"], SHARE_BELOW_1),
    (TEXT, "attention_dropout", ["1", "-0.5"], SHARE_BELOW_1),
    (TEXT, "lora_rank", ["-2"], COUNT_OR_0),
    (TEXT, "lora_alpha", ["0"], COUNT),
    (TEXT, "warmup", ["1", "-0.1"], SHARE_BELOW_1),
]
KINDS = {
    "vision": (vision_lt, vision_lt.VisionOptions, "digits_lt"),
    "text": (text_lt, text_lt.TextOptions, "stdlib_lt"),
}


def start(recipe, flags, out):
    """What the recipe's command line does."""
    module, kind, preset = KINDS[recipe]
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = [*flags, *([] if "--output_dir" in flags else ["--output_dir", str(out)])]
    module.main(recipe_options.parse_options(kind, flags, default=preset))


def ranges():
    for recipes, name, values, wanted in OUT_OF_RANGE:
        for recipe in recipes:
            yield from (
                pytest.param(recipe, name, v, wanted, id=f"{recipe} {name}={v}") for v in values
            )


@pytest.mark.parametrize(("recipe", "name", "value", "wanted"), list(ranges()))
def test_option_out_of_range(recipe, name, value, wanted, tmp_path):
    shown = value if value in ("nan", "inf") else f"{float(value):g}".replace("+", r"\+")
    shown = f"({shown}|{value}(\\.0)?)"
    message = rf"`{name}` must be {wanted}, got {shown}\. Give another --{name} or leave it out"
    with pytest.raises(ValueError, match=message):
        start(recipe, [f"--{name}={value}"], tmp_path / "run")
    assert os.listdir(tmp_path) == []


SMALL = ["--epochs", "1", "--start", "0"]
# Recipe, flags, error, message.
REFUSED = [
    ("vision", ["--start", "nan"], ValueError, "`start` must be a share .* or an epoch .*'nan'"),
    ("vision", ["--start", "1e400"], ValueError, r"`start` must be in \[0, 1\], got inf"),
    ("vision", ["--start", "9" * 5000], ValueError, "`start` must be a share .* epoch"),
    ("text", ["--start=-1"], ValueError, "`start` must be a share .* got '-1'"),
    ("vision", ["--start", "1.5"], ValueError, r"`start` must be in \[0, 1\], got 1.5"),
    ("text", ["--start_unit", "fraction", "--start", "2"], ValueError, r"in \[0, 1\], got 2"),
    ("vision", ["--epochs", "1.5"], ValueError, "argument --epochs: invalid int value: '1.5'"),
    ("text", ["--lr", "fast"], ValueError, "argument --lr: invalid float value: 'fast'"),
    ("vision", ["--seed"], ValueError, "argument --seed: expected one argument"),
    ("vision", ["--resume", "maybe"], ValueError, "`resume` must be one of .*auto.*got 'maybe'"),
    ("vision", ["--aug", "randaug"], ValueError, "`aug` must be one of .*got 'randaug'"),
    ("vision", ["--cutout", "99"], ValueError, "`cutout` must be at most .*, the shorter side"),
    ("vision", ["--head", "round"], ValueError, "`head` must be one of .*cosine.*got 'round'"),
    ("vision", ["--sched", "plateau"], ValueError, "`sched` must be one of .*multi.*got 'plateau'"),
    ("text", ["--profile", "line"], ValueError, "`profile` must be one of .*step.*got 'line'"),
    (
        "text",
        ["--report_to", "paper"],
        ValueError,
        "`report_to` must be one of .*none.*got 'paper'",
    ),
    ("text", ["--select", "nll"], ValueError, "`select` must be 'last' .*'nll'.*--val_split 0.1"),
    (
        "vision",
        ["--patience=2", "--val_split=0.2"],
        ValueError,
        "`patience` must be left out .* got 2.*--select balanced_accuracy",
    ),
    ("vision", ["--opt", "sdg"], ValueError, "`opt` must be one of .* got 'sdg'.*'sgd'"),
    ("vision", ["--mixup=1", "--batch_size=3"], ValueError, "`batch_size` must be even .*got 3"),
    (
        "vision",
        ["--cutmix=1", "--batch_size=4096"],
        ValueError,
        "whole batches an epoch.*got 0. Choose a smaller --batch_size; there are 294",
    ),
    (
        "vision",
        ["--opt=adahessian"],
        ValueError,
        "`optimizer` must be one that steps by the gradient it is left, got 'Adahessian'",
    ),
    ("text", ["--sam_start=2"], ValueError, "`sam_start` must be left out without --sam, got '2'"),
    ("vision", ["--sam_every=2"], ValueError, "`sam_every` must be left .* got 2.*--sam 0.05"),
    (
        "vision",
        ["--sam=0.05", "--sam_start=1"],
        ValueError,
        "`sam_start` must be before the end of the training at epoch 1, got 1. Give an earlier --s",
    ),
    (
        "text",
        ["--sam=0.05", "--sam_start=late"],
        ValueError,
        "`sam_start` must be a share such as 0.8 or an epoch such as 160, got 'late'",
    ),
    ("vision", ["--mix_until=0.8"], ValueError, "`mix_until` must be left out .*--mixup 0.2"),
    (
        "text",
        ["--mixup=1", "--mix_until=1.5"],
        ValueError,
        r"`mix_until` must be in \[0, 1\], got 1.5",
    ),
    (
        "vision",
        ["--mixup_prior=remix"],
        ValueError,
        "`mixup_prior` must be none without mixing, got 'remix'.*--cutmix 1",
    ),
    ("vision", ["--mixup_prior=mix"], ValueError, "must be one of .*'remix', got 'mix'"),
    (
        "text",
        ["--cutmix=1"],
        ValueError,
        "There is no option '--cutmix=1'. Another recipe has it. --help lists those of this one",
    ),
    ("vision", ["--output_dir", " "], ValueError, "`output_dir` must be .* Give --output_dir"),
    ("text", ["--output_dir", ""], ValueError, "`output_dir` must be .* Give --output_dir"),
    ("vision", ["--output_dir", "/dev/null"], ValueError, "written, got '/dev/null'. Choose"),
    ("vision", ["--resume"], ValueError, "a run to resume, got .*leave out --resume"),
    ("vision", ["--loss", "ce", "--scale", "10"], TypeError, "option of 'ce' .*got 'scale'"),
    ("text", ["--label_column", "x"], ValueError, "`label_column` must be left out, got 'x'"),
    ("vision", ["--train_list", "x"], ValueError, "`dataset` must be the folder that the list"),
    ("vision", ["--dataset", "/dev/null"], ValueError, "`dataset` must be 'digits', a folder"),
    ("text", ["--dataset", "/dev/null"], ValueError, "'/dev/null'"),
    ("vision", ["no_preset"], ValueError, "`preset` must be one of .*'digits_lt'.*got 'no_preset'"),
]


@pytest.mark.parametrize(
    ("recipe", "flags", "error", "message"), REFUSED, ids=lambda v: str(v)[:60] if v else None
)
def test_refused_before_anything_is_written(recipe, flags, error, message, tmp_path):
    given = flags if not flags[0].startswith("-") else [*SMALL, *flags]
    with pytest.raises(error, match=message):
        start(recipe, given, tmp_path / "run")
    assert os.listdir(tmp_path) == []


LOGITS = torch.zeros(2, 3)
COUNTS = ClassCounts([9, 5, 2])
CYCLE = "a: &a [x]\nb: &b [*a, *a]\nlr: [*b, *b]"
# Call, error, message.
CALLS = {
    "counts nan": (lambda: ClassCounts([float("nan"), 2]), TypeError, "`counts`.*nan.*Map"),
    "counts bool": (lambda: ClassCounts([True, False]), TypeError, "`counts` must be integers"),
    "counts negative": (lambda: ClassCounts([3, -2]), ValueError, "`counts` .*-2 in 1"),
    "counts 2-d": (lambda: ClassCounts(np.ones((2, 2), int)), ValueError, r"`counts`.*\(2, 2\)"),
    "counts huge": (lambda: ClassCounts([1, 10**30]), (TypeError, ValueError), "`counts` must"),
    "counts uint64": (
        lambda: ClassCounts(np.array([1, 2**64 - 1], np.uint64)),
        ValueError,
        "`counts` must",
    ),
    "beta one": (lambda: COUNTS.weights(1.0), ValueError, r"`beta` must be in \[0, 1\), got 1.0"),
    "beta text": (lambda: COUNTS.weights("0.9"), TypeError, r"`beta` must be .* got '0.9'"),
    "margin huge int": (lambda: COUNTS.margins(10**400), ValueError, "`max_margin` must be .*got"),
    "margin none": (lambda: COUNTS.margins(None), TypeError, "`max_margin` must be .*got None"),
    "ratio nan": (lambda: long_tail_counts(9, 3, float("nan")), ValueError, "`ratio`.*got nan"),
    "ratio complex": (lambda: long_tail_counts(9, 3, 2j), TypeError, "`ratio` .*got 2j"),
    "profile": (lambda: long_tail_counts(9, 3, 2, "expo"), ValueError, "'expo'. Did you .*'exp'"),
    "n_max float": (lambda: long_tail_counts(9.5, 3, 2), TypeError, "`n_max` .*got 9.5"),
    "labels floats": (lambda: long_tail_indices([0.5]), TypeError, "`labels`.*0.5.*Map class"),
    "labels none": (lambda: long_tail_indices([]), ValueError, "`labels` must be at least one"),
    "labels out": (
        lambda: ClassCounts.from_labels([0, 7], 3),
        ValueError,
        "0..2, got '7 in row 1'",
    ),
    "subset seed": (lambda: long_tail_indices([0], seed=-1), ValueError, "`seed`.*got -1"),
    "start bool": (lambda: DeferredSchedule("drw", True), TypeError, "`start` .*got True"),
    "start nan": (lambda: DeferredSchedule("drw", float("nan")), ValueError, "`start`.*got nan"),
    "start negative": (lambda: DeferredSchedule("drw", -3), ValueError, "`start`.*got -3"),
    "kind": (lambda: DeferredSchedule("dwr"), ValueError, "`kind` .*'dwr'. Did you mean 'drw'"),
    "progress": (lambda: Progress(-1, 5, 5), ValueError, "`step` must be an integer >= 0, got -1"),
    "rank": (
        lambda: DeferredSampler([0, 1], DeferredSchedule("rs"), epochs=1, rank=1),
        ValueError,
        "`rank` .*got 1",
    ),
    "epochs nan": (
        lambda: DeferredSampler([0, 1], DeferredSchedule("rs"), epochs=float("nan")),
        ValueError,
        "`epochs` .*got nan",
    ),
    "loss": (lambda: create_loss("focl", COUNTS), ValueError, "'focl'. Did you mean 'focal'"),
    "gamma": (
        lambda: create_loss("focal", COUNTS, gamma=float("inf")),
        ValueError,
        "`gamma` .*inf",
    ),
    "ignore_index": (
        lambda: create_loss("ce", COUNTS, ignore_index=None),
        TypeError,
        "`ignore_index` must be an integer, got None",
    ),
    "target bool": (
        lambda: create_loss("ce", COUNTS)(LOGITS, torch.tensor([True, False])),
        TypeError,
        "`target`.*torch.bool.*target.long",
    ),
    "logits array": (
        lambda: create_loss("ce", COUNTS)(np.zeros((2, 3)), torch.zeros(2).long()),
        TypeError,
        "`logits` must be a floating-point tensor",
    ),
    "head": (
        lambda: use_cosine_head(torch.nn.Linear(3, 2), scale=float("nan")),
        ValueError,
        "`scale` .*got nan",
    ),
    "metrics nan": (
        lambda: MetricAccumulator(COUNTS).update(LOGITS / 0, torch.tensor([0, 1])),
        ValueError,
        "`logits` must be finite, got 'NaN in row 0'.*learning rate",
    ),
    "metrics shape": (
        lambda: LongTailMetrics(COUNTS)((np.zeros((2, 5)), np.zeros(2, int))),
        ValueError,
        r"\(2, 5\)",
    ),
    "keep": (lambda: write_checkpoint("/nowhere", 1, print, 0), ValueError, "`keep` .*got 0"),
    "resume": (lambda: claim_output_dir("/x", {}, resume="ja"), ValueError, "`resume` .*'ja'"),
    "options nan": (
        lambda: claim_output_dir("/x", {"lr": float("nan")}, resume=False),
        ValueError,
        r"`options\['lr'\]` must be a finite number",
    ),
    "rare class": (
        lambda: subsample_classes([0, 1], ["neg", "pos"], ["nag"], 0.5),
        ValueError,
        "`rare_classes` must be one of 'neg', 'pos', got 'nag'. Did you mean 'neg'",
    ),
    "texts": (lambda: load_texts("/dev/null"), ValueError, "dataset '/dev/null' cannot be read"),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_are_refused(case):
    call, error, message = CALLS[case]
    with pytest.raises(error, match=message):
        call()


PRESETS = {
    "empty": ("", "`preset` must be a file of `option: value` lines"),
    "list": ("[1, 2]", "a file of `option: value` lines"),
    "not yaml": ("lr: [1,", "cannot be read: while parsing"),
    "not text": (b"\xff\xfe\x00", "cannot be read"),
    "null byte": (b"lr: \x00", "cannot be read"),
    "object": ("lr: !!python/object/apply:os.getcwd []", "cannot be read: could not determine"),
    "deep": ("[" * 1000, "cannot be read"),
    "endless digits": ("lr: " + "9" * 5000, "cannot be read: .*digits"),
    "unhashable": ("? [1]\n: 2", "cannot be read"),
    "number for a name": ("1: 2", "`1 in .*one word .* got 'int and int'"),
    "nested": ("lr: {a: 1}", "`lr in .*a number, a word or a list of such, got 'str and dict'"),
    "date": ("lr: 2020-01-01", "got 'str and date'"),
    "doubling aliases": (CYCLE, "`b in .*got 'str and list'"),
    "endless alias": ("lr: &a [*a]", "`lr in .*got 'str and list'"),
}


@pytest.mark.parametrize("case", PRESETS)
def test_presets_are_plain_data(case, tmp_path):
    content, message = PRESETS[case]
    path = write(tmp_path / "preset.yaml", content)
    with pytest.raises(ValueError, match=message):
        read_preset(path)
    with pytest.raises(ValueError, match=message):
        recipe_options.parse_options(vision_lt.VisionOptions, [str(path)], default="")


def test_presets_may_hold_truths_and_nothing(tmp_path):
    path = write(tmp_path / "preset.yaml", "resume: yes\ncompile: true\nimage_size: null\nlr: 1e-2")
    parsed = recipe_options.parse_options(vision_lt.VisionOptions, [str(path)], default="")
    assert (parsed.resume, parsed.compile, parsed.image_size, parsed.lr) == (
        "yes",
        True,
        None,
        0.01,
    )


def folder_in_place_of_image(root):
    class_folders(root)
    (root / "train" / "ant" / "9.png").mkdir()


def truncated_jpeg(root):
    from PIL import Image

    class_folders(root)
    path = root / "train" / "ant" / "9.jpg"
    Image.new("RGB", (64, 64), (1, 2, 3)).save(path)
    path.write_bytes(path.read_bytes()[:-200])


def pipe(root):
    class_folders(root)
    os.mkfifo(root / "train" / "ant" / "9.png")


def text_named_png(root):
    class_folders(root)
    write(root / "train" / "ant" / "9.png", "no picture")


def empty_png(root):
    class_folders(root)
    write(root / "train" / "ant" / "9.png", "")


def bomb(root):
    """A PNG header that promises 60,000 x 60,000 pixels."""
    import struct
    import zlib

    class_folders(root)
    head = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    write(root / "train" / "ant" / "9.png", b"\x89PNG\r\n\x1a\n" + chunk)


@pytest.mark.parametrize(
    "build", [truncated_jpeg, text_named_png, empty_png, bomb], ids=lambda f: f.__name__
)
def test_damaged_images_stop_the_recipe_before_it_writes(build, tmp_path):
    build(tmp_path / "set")
    flags = ["--dataset", str(tmp_path / "set"), "--image_size", "8", "--model", "cifar_resnet20"]
    flags += ["--profile", "none", "--epochs", "1", "--start", "0"]
    with pytest.raises(ValueError, match=r"9\.\w+ cannot be read .*--skip_corrupt"):
        start("vision", flags, tmp_path / "run")
    shutil.rmtree(tmp_path / "set")
    assert os.listdir(tmp_path) == []


def test_a_folder_named_as_an_image_is_no_example(tmp_path):
    folder_in_place_of_image(tmp_path / "set")
    train, _ = vision_lt.load_images(tmp_path / "set")
    assert len(train) == 6
    assert train.find_corrupt() == []


def test_a_pipe_is_not_waited_for(tmp_path):
    pipe(tmp_path / "set")
    with pytest.raises(ValueError, match=r"9\.png is a pipe or device, not a file; remove it"):
        vision_lt.load_images(tmp_path / "set")
