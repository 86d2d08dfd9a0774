"""What ``text_lt.py`` trains, and on what: options, texts, tokenizer and model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from options import COUNT, COUNT_OR_0, NOT_NEGATIVE, SHARE_BELOW_1, CoreOptions, option, tell_kept
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ldam_plugins import ClassCounts, long_tail_indices, use_cosine_head
from ldam_plugins._validation import invalid
from ldam_plugins.data.texts import load_texts, subsample_classes
from ldam_plugins.heads import find_head
from ldam_plugins.integrations.transformers.bilstm import (
    BiLSTMConfig,
    BiLSTMForSequenceClassification,
)
from ldam_plugins.integrations.transformers.run_callbacks import bundled_minilm
from ldam_plugins.integrations.transformers.tokenizer import train_tokenizer
from ldam_plugins.losses.base import ClassificationLoss

# What the configurations of transformers call the dropout of attention.
_ATTENTION_DROPOUTS = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")


_MODELS: dict[str, Callable[[], str]] = {"minilm": bundled_minilm}


@dataclass
class TextOptions(CoreOptions):
    """Options of the recipe; presets set those that make an experiment."""

    LIMITS = CoreOptions.LIMITS | {
        "rare_fraction": {"low": 0, "high": 1, "low_open": True},
        "max_length": COUNT,
        "vocab_size": COUNT,
        "embedding_size": COUNT,
        "hidden_size": COUNT,
        "embedding_dropout": SHARE_BELOW_1,
        "attention_dropout": SHARE_BELOW_1,
        "lora_rank": COUNT_OR_0,
        "lora_alpha": COUNT,
        "weight_decay": NOT_NEGATIVE,
        "warmup": SHARE_BELOW_1,
        "clip_grad": NOT_NEGATIVE,
        "mixup": NOT_NEGATIVE,
    }

    dataset: str = option("stdlib_docstrings", "hub id, local folder, or stdlib_docstrings")
    model: str = option("bilstm", "bilstm, minilm (in a package), hub id or local folder")
    epochs: int = option(3, "epochs of training")
    batch_size: int = option(32, "texts a process and micro-batch")
    lr: float = option(5e-5, "learning rate of Adam")
    output_dir: str = option("runs/text_lt", "folder of the run")
    rare_classes: list[str] = option([], "names of classes that lose training texts")
    rare_fraction: float = option(0.1, "share of their training texts that rare classes keep")
    text_column: str | None = option(None, "text column of the dataset [by name or type]")
    label_column: str | None = option(None, "label column of the dataset [by name or type]")
    train_split: str = option("train", "split to train on, or a slice: train[:10%%]")
    test_split: str | None = option(None, "split to test on, or a slice [test, else validation]")
    skip_empty: bool = option(False, "leave out rows without a text")
    max_length: int = option(256, "tokens a text is cut to")
    vocab_size: int = option(20_000, "words the tokenizer of a bilstm knows")
    embedding_size: int = option(100, "length of a bilstm's embeddings")
    hidden_size: int = option(64, "length of a bilstm's state in each direction")
    embedding_dropout: float = option(0.5, "dropout of a bilstm's embeddings")
    attention_dropout: float | None = option(None, "dropout of attention [the model's own]")
    head: str = option("auto", "auto: cosine where the loss needs it", choices=("auto", "cosine"))
    lora_rank: int = option(0, "train low-rank adapters of this rank and the head; 0: everything")
    lora_alpha: int = option(16, "scale of the adapters, divided by the rank")
    weight_decay: float = option(0.0, "decoupled weight decay")
    warmup: float = option(0.0, "share of the training with a rising learning rate")
    clip_grad: float = option(1.0, "largest gradient norm; 0: no limit")
    mixup: float = option(0.0, "alpha of Mixup of the features that the classifier gets")
    lr_schedule: str = option("linear", "learning rate schedule of transformers")
    compile: bool = option(False, "compile the model")
    fast_dropout: bool = option(True, "draw dropout from fewer random bits on a CPU")
    eval_every: int = option(1, "epochs between evaluations; the last is always evaluated")


def load_data(options: TextOptions, show: bool = False) -> tuple[Dataset, Dataset, ClassCounts]:
    """The training texts, cut to a long tail if asked for, the test texts, and texts per class."""
    train, test = load_texts(
        options.dataset,
        text_column=options.text_column,
        label_column=options.label_column,
        train_split=options.train_split,
        test_split=options.test_split,
        skip_empty=options.skip_empty,
    )
    names = train.features["label"].names
    labels = np.asarray(train["label"])
    train = train.select(
        subsample_classes(
            train["label"], names, options.rare_classes, options.rare_fraction, options.subset_seed
        )
    )
    keep = long_tail_indices(
        train["label"],
        options.ratio,
        options.profile,
        options.subset_seed,
        len(names),
        options.class_order,
    )
    train = train.select(keep)
    counts = ClassCounts.from_labels(train["label"], class_names=names)
    if show:
        tell_kept(options, ClassCounts(np.bincount(labels, minlength=len(names))), counts)
    return train, test, counts


def make_model(
    options: TextOptions, train: Dataset, criterion: ClassificationLoss
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and model, with a cosine head where the loss needs it, and with adapters."""
    names = train.features["label"].names
    labels = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: label for label, name in enumerate(names)},
    }
    if options.model == "bilstm":
        if options.attention_dropout is not None:
            expected = "None for a bilstm, which has no attention"
            raise invalid("attention_dropout", expected, options.attention_dropout)
        tokenizer, model = make_bilstm(options, train, labels)
    else:
        folder = _MODELS.get(options.model, lambda: options.model)()
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder,
            **labels,
            **attention_options(options, folder),
            problem_type="single_label_classification",
            trust_remote_code=False,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
            model.config.pad_token_id = tokenizer.pad_token_id
    # Saved with the tokenizer, so that `truncation=True` cuts texts as in training.
    tokenizer.model_max_length = min(options.max_length, tokenizer.model_max_length)
    if criterion.needs_cosine_head or options.head == "cosine":
        use_cosine_head(model, options.scale or 30.0)
    return tokenizer, add_adapters(options, model) if options.lora_rank else model


def attention_options(options: TextOptions, folder: str) -> dict[str, float]:
    """What ``--attention_dropout`` is called in the configuration of the model."""
    if options.attention_dropout is None:
        return {}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    known = [name for name in _ATTENTION_DROPOUTS if hasattr(config, name)]
    if not known:
        hint = "Leave --attention_dropout out."
        expected = f"None for a model of type {config.model_type!r}"
        raise invalid("attention_dropout", expected, options.attention_dropout, hint=hint)
    return dict.fromkeys(known, options.attention_dropout)


def make_bilstm(
    options: TextOptions, train: Dataset, labels: dict[str, Any]
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """A new BiLSTM, and a tokenizer of the words in the training texts."""
    tokenizer = train_tokenizer(
        train["text"], vocab_size=options.vocab_size, max_length=options.max_length
    )
    config = BiLSTMConfig(
        vocab_size=len(tokenizer),
        embedding_size=options.embedding_size,
        hidden_size=options.hidden_size,
        embedding_dropout=options.embedding_dropout,
        pad_token_id=tokenizer.pad_token_id,
        problem_type="single_label_classification",
        **labels,
    )
    return tokenizer, BiLSTMForSequenceClassification(config)


def add_adapters(options: TextOptions, model: PreTrainedModel) -> PreTrainedModel:
    """Low-rank adapters on the linear layers; beside them the head alone is trained, in full."""
    from peft import LoraConfig, TaskType, get_peft_model

    adapters = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        target_modules="all-linear",
        modules_to_save=list(find_head(model)),
    )
    return get_peft_model(model, adapters)


def tokenize(options: TextOptions, tokenizer: PreTrainedTokenizerBase, texts: Dataset) -> Dataset:
    """The texts as token ids, cut to ``max_length``; batches are padded as they are made.

    Of texts that lie in the cache of ``datasets`` the token ids are kept there for the next run.
    """
    return texts.map(
        lambda batch: tokenizer(batch["text"], truncation=True),
        batched=True,
        remove_columns=["text"],
        desc="tokenize",
    )
