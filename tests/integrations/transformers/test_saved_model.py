import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification

from ldam_plugins import ClassCounts
from ldam_plugins.integrations.transformers import saved_model as hf_saved_model
from ldam_plugins.integrations.transformers.saved_model import describe_saved, measure_saved
from ldam_plugins.integrations.transformers.tokenizer import train_tokenizer

NAMES = ("low", "high")
COUNTS = ClassCounts([200, 7], class_names=NAMES)
TEXTS = ["a b", "b b b a b", "a", "b a a a", "a a b", "b", "a b a b b a", "a a"] * 5
LABELS = [0, 1, 1, 0, 0, 1, 1, 0] * 5


@pytest.fixture(scope="module")
def texts():
    return Dataset.from_dict({"text": TEXTS, "label": LABELS})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model and its tokenizer, which keeps the last four words, in a folder."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS, max_length=4)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        id2label=dict(enumerate(NAMES)),
        label2id={name: index for index, name in enumerate(NAMES)},
    )
    model = BertForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return SimpleNamespace(folder=folder, model=model, tokenizer=tokenizer)


def right_nll(saved):
    logits = []
    for text in TEXTS:
        words = saved.tokenizer(" ".join(text.split()[-4:]), return_tensors="pt")
        logits.append(saved.model.double()(**words).logits)
    saved.model.float()
    return torch.nn.functional.cross_entropy(torch.cat(logits), torch.tensor(LABELS)).item()


@pytest.mark.parametrize("size", [1, 7, 64])
def test_texts_are_cut_and_measured_in_whatever_batches(saved, texts, size, monkeypatch):
    monkeypatch.setattr(hf_saved_model, "_TEXTS_AT_ONCE", 16)
    metrics = measure_saved(saved.folder, texts, COUNTS, batch_size=size)
    assert metrics["nll"] == pytest.approx(right_nll(saved), abs=1e-6)
    assert (metrics["many"], metrics["few"]) == tuple(metrics["per_class_accuracy"])


def test_processes_share_the_texts(saved, texts, monkeypatch):
    some = texts.select(range(37))
    whole = measure_saved(saved.folder, some, COUNTS, batch_size=1)
    parts = []

    def gathered(mine):
        parts.extend(mine)
        return copy.deepcopy(parts)

    monkeypatch.setattr(hf_saved_model, "gather_object", gathered)
    names = [f"text {row}" for row in range(37)]
    for index in range(3):
        state = SimpleNamespace(process_index=index, num_processes=3, device=torch.device("cpu"))
        monkeypatch.setattr(hf_saved_model, "PartialState", lambda state=state: state)
        missing = pytest.raises(ValueError, match="each of 37 examples once")
        with nullcontext() if index == 2 else missing:
            metrics = measure_saved(saved.folder, some, COUNTS, batch_size=1, examples=names)
    table = metrics.pop("predictions")
    assert table["example"] == names
    assert table["label"] == some["label"][:]
    assert [part.compute() == whole for part, _ in parts] == [False] * 3
    assert metrics == whole


def test_groups_go_with_their_texts_whatever_the_batches(saved, texts, monkeypatch):
    grouped = texts.add_column("group", [f"author {label}" for label in LABELS])
    monkeypatch.setattr(hf_saved_model, "_TEXTS_AT_ONCE", 16)
    metrics = measure_saved(saved.folder, grouped, COUNTS, batch_size=7, detailed=True)
    accuracy = [100 - metrics["by_group"][f"author {c}"]["top1_error"] for c in (0, 1)]
    assert accuracy == pytest.approx([100 * share for share in metrics["per_class_accuracy"]])
    assert metrics["intervals"]["auroc"][0] < metrics["auroc"] < metrics["intervals"]["auroc"][1]
    assert "by_group" not in measure_saved(saved.folder, texts, COUNTS, detailed=True)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (ClassCounts([3, 2, 1]), r"one of 3 classes, as the class counts, got '2 classes'"),
        (
            ClassCounts([3, 2], NAMES[::-1]),
            r"classes \('high', 'low'\), in this order, got \('low'",
        ),
    ],
)
def test_other_classes_are_refused(saved, texts, counts, message):
    with pytest.raises(ValueError, match=message):
        measure_saved(saved.folder, texts, counts)


def test_counts_without_names_fit_any_names(saved, texts):
    assert measure_saved(saved.folder, texts, ClassCounts([3, 2]))["nll"] > 0


def test_a_model_that_finds_no_room_is_measured_on_the_cpu(saved, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 10**9))
    with caplog.at_level("WARNING", "ldam_plugins.integrations.transformers.saved_model"):
        device = hf_saved_model._place(saved.model, torch.device("cuda", 0))
    assert device == torch.device("cpu")
    assert "cuda:0 has 0.0 GiB left: it is measured on the CPU" in caplog.text


def test_the_readme_says_what_loading_needs(saved):
    describe_saved(saved.folder, saved.model, saved.tokenizer)
    readme = (saved.folder / "README.md").read_text()
    assert "trust_remote_code" not in readme
    assert "2 classes" in readme
    assert "cuts longer texts to the 4 tokens" in readme
    (saved.folder / "modeling.py").touch()
    describe_saved(saved.folder, saved.model, saved.tokenizer)
    assert "trust_remote_code=True" in (saved.folder / "README.md").read_text()
    (saved.folder / "modeling.py").unlink()
