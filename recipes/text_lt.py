"""Fine-tune or train a text classifier on a long tail with transformers.Trainer and LDAM-DRW.

    python recipes/text_lt.py                                    # docstrings, under two minutes
    python recipes/text_lt.py imdb_lt                            # the paper's run
    python recipes/text_lt.py imdb_lt --loss ce --schedule none
    python recipes/text_lt.py banking77_lt --model bert-base-uncased --lora_rank 8

A preset of ``recipes/presets`` (or a YAML or JSON file) may come first, flags after it override it.
Without one the preset is ``stdlib_lt``, a BiLSTM that tells apart the docstrings of Python's own
library by their module, unless ``--dataset`` says otherwise. Everything a run leaves is in
``--output_dir``; a saved BiLSTM is loaded after ``import ldam_plugins.hf_bilstm``, or with
``trust_remote_code=True`` where the package is not installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from options import (
    COUNT,
    COUNT_OR_0,
    NOT_NEGATIVE,
    RESUME,
    SHARE_BELOW_1,
    CoreOptions,
    option,
    parse_options,
)
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ldam_plugins import (
    ClassCounts,
    DRWCallback,
    LongTailMetrics,
    fold_cosine_head,
    long_tail_indices,
    use_cosine_head,
)
from ldam_plugins._checks import must_be
from ldam_plugins.heads import cosine_heads, find_head
from ldam_plugins.hf_bilstm import BiLSTMConfig, BiLSTMForSequenceClassification
from ldam_plugins.hf_run import RESAMPLING
from ldam_plugins.hf_text import (
    CheckpointCallback,
    HistoryCallback,
    bundled_minilm,
    class_errors,
    newest_trainer_checkpoint,
)
from ldam_plugins.hf_tokenizer import train_tokenizer
from ldam_plugins.loss_base import ClassificationLoss
from ldam_plugins.metrics import long_tail_metrics
from ldam_plugins.reports import per_class_table, write_report
from ldam_plugins.run_files import (
    claim_output_dir,
    device_name,
    disk_errors,
    read_history,
    run_versions,
    write_metrics,
)
from ldam_plugins.runtime import check_processes, choose_precision
from ldam_plugins.text_data import load_texts, thin_classes

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
    profile: str = option("none", "long-tail profile", choices=("exp", "step", "none"))
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
    attention_dropout: float | None = option(
        None, "dropout of attention [the model's own]; with 0 a CPU computes it in one kernel"
    )
    head: str = option("auto", "auto: cosine where the loss needs it", choices=("auto", "cosine"))
    lora_rank: int = option(0, "train low-rank adapters of this rank and the head; 0: everything")
    lora_alpha: int = option(16, "scale of the adapters, divided by the rank")
    weight_decay: float = option(0.0, "decoupled weight decay")
    warmup: float = option(0.0, "share of the training with a rising learning rate")
    clip_grad: float = option(1.0, "largest gradient norm; 0: no limit")
    mixup: float = option(0.0, "alpha of Mixup of the features that the classifier gets")
    lr_schedule: str = option("linear", "learning rate schedule of transformers")
    compile: bool = option(False, "compile the model")
    eval_every: int = option(1, "epochs between evaluations; the last is always evaluated")


def main(options: TextOptions) -> dict[str, Any]:
    """Train and evaluate once; returns what ``metrics.json`` holds."""
    set_seed(options.seed)
    arguments = make_arguments(options)
    check_processes(arguments.world_size, options.num_processes)
    train, test, counts = load_data(options)
    criterion = options.make_loss(counts)
    tokenizer, model = make_model(options, train, criterion)
    train, test = (tokenize(options, tokenizer, texts) for texts in (train, test))
    check_start(options, arguments, train)
    callbacks = make_callbacks(options, criterion)
    if arguments.process_index == 0:
        claim_output_dir(options.output_dir, asdict(options), resume=RESUME[options.resume])
    trainer = make_trainer(arguments, model, tokenizer, counts, train, test, callbacks)
    with disk_errors(options.output_dir):
        trainer.train(resume_from_checkpoint=newest_trainer_checkpoint(arguments.output_dir))
    prediction = trainer.predict(test)
    result = long_tail_metrics(prediction.predictions, prediction.label_ids, counts)
    metrics = {
        "options": asdict(options),
        "versions": run_versions(),
        "class_counts": counts.counts,
        "class_names": counts.class_names,
        "device": device_name(arguments.device),
        "processes": arguments.world_size,
        "mixed_precision": trainer.accelerator.mixed_precision,
        "test": result,
        "class_errors": class_errors(result, counts),
    }
    if trainer.is_fsdp_enabled:  # gathered from all processes, and folded as any model saved
        trainer.save_model(model_folder(options))
    if trainer.is_world_process_zero():
        leave(options, trainer, metrics)
        print(per_class_table(result, counts))
    trainer.accelerator.end_training()
    return metrics


def leave(options: TextOptions, trainer: Trainer, metrics: dict[str, Any]) -> None:
    """Write the metrics, the report, and the model that its Auto class loads."""
    seconds = sum(row["seconds"] for row in read_history(options.output_dir))
    metrics["train_seconds"] = seconds
    metrics["examples_per_second"] = sum(metrics["class_counts"]) * options.epochs / seconds
    write_metrics(options.output_dir, metrics)
    write_report(options.output_dir)
    if not trainer.is_fsdp_enabled:
        save_folded(options, trainer)


def save_folded(options: TextOptions, trainer: Trainer) -> None:
    """Write the model with its head folded to fit training texts, and the tokenizer."""
    model = trainer.model.merge_and_unload() if options.lora_rank else trainer.model
    if cosine_heads(model):
        loader = DataLoader(
            trainer.train_dataset,
            options.batch_size,
            shuffle=True,
            collate_fn=trainer.data_collator,
        )
        batches = (batch.to(trainer.args.device) for batch in islice(loader, 8))
        fold_cosine_head(model, inputs=batches)
    model.save_pretrained(model_folder(options))
    trainer.processing_class.save_pretrained(model_folder(options))


def model_folder(options: TextOptions) -> str:
    """Where the model is left."""
    return str(Path(options.output_dir, "model"))


def load_data(options: TextOptions) -> tuple[Dataset, Dataset, ClassCounts]:
    """The long-tailed training texts, the test texts, and the training texts per class."""
    train, test = load_texts(
        options.dataset,
        text_column=options.text_column,
        label_column=options.label_column,
        train_split=options.train_split,
        test_split=options.test_split,
        skip_empty=options.skip_empty,
    )
    names = train.features["label"].names
    train = train.select(
        thin_classes(
            train["label"], names, options.rare_classes, options.rare_fraction, options.subset_seed
        )
    )
    keep = long_tail_indices(
        train["label"], options.ratio, options.profile, options.subset_seed, len(names)
    )
    train = train.select(keep)
    return train, test, ClassCounts.from_labels(train["label"], class_names=names)


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
            wanted = "None for a bilstm, which has no attention"
            raise ValueError(must_be("attention_dropout", wanted, options.attention_dropout))
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
        way_out = "Leave --attention_dropout out."
        wanted = f"None for a model of type {config.model_type!r}"
        raise ValueError(must_be("attention_dropout", wanted, options.attention_dropout, way_out))
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
    """The texts as token ids, cut to ``max_length``; batches are padded as they are made."""
    length = min(options.max_length, tokenizer.model_max_length)
    return texts.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=length),
        batched=True,
        remove_columns=["text"],
        desc="tokenize",
    )


def make_arguments(options: TextOptions) -> TrainingArguments:
    """Arguments of a Trainer that logs, evaluates and saves once an epoch."""
    precision = choose_precision(options.mixed_precision)
    resampled = options.schedule in RESAMPLING
    return TrainingArguments(
        output_dir=str(Path(options.output_dir, "checkpoints")),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=2 * options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        warmup_steps=options.warmup,
        max_grad_norm=options.clip_grad,
        lr_scheduler_type=options.lr_schedule,
        train_sampling_strategy="random" if resampled else "group_by_length",
        logging_strategy="epoch",
        eval_strategy="epoch",
        save_strategy="epoch",
        seed=options.seed,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        torch_compile=options.compile,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        report_to=options.report_to,
    )


def check_start(options: TextOptions, arguments: TrainingArguments, train: Dataset) -> None:
    """Refuse a second stage past the end of the training before anything is written."""
    update_size = options.batch_size * options.accumulation * arguments.world_size
    steps = math.ceil(len(train) / update_size)
    options.make_schedule().start_step(options.epochs * steps, steps)


def make_callbacks(options: TextOptions, criterion: ClassificationLoss) -> list[TrainerCallback]:
    """The loss with its schedule, and the history of the run."""
    schedule = options.make_schedule()
    history = HistoryCallback(options.output_dir, schedule, options.eval_every)
    checkpoints = CheckpointCallback(options.keep_checkpoints)
    drw = DRWCallback(criterion, schedule=schedule, mixup=options.mixup)
    return [drw, history, checkpoints]


def make_trainer(
    arguments: TrainingArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    counts: ClassCounts,
    train: Dataset,
    test: Dataset,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """A stock Trainer; the loss, the schedule and the history are its callbacks' matter."""
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=LongTailMetrics(counts),
        preprocess_logits_for_metrics=only_logits,
        callbacks=callbacks,
    )


def only_logits(outputs: Any, labels: Any) -> Any:
    """The logits of models that give more with them, as the states of GPT-2."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


if __name__ == "__main__":
    main(parse_options(TextOptions, default="stdlib_lt"))
