"""Fine-tune or train a text classifier on a long tail with transformers.Trainer and LDAM-DRW.

    python recipes/text_lt.py                                    # docstrings, under two minutes
    python recipes/text_lt.py imdb_lt                            # the paper's run
    python recipes/text_lt.py imdb_lt --loss ce --schedule none
    python recipes/text_lt.py banking77_lt --model bert-base-uncased --lora_rank 8

A preset of ``recipes/presets`` (or a YAML or JSON file) may come first, flags after it override it.
Without one the preset is ``stdlib_lt``, a BiLSTM that tells apart the docstrings of Python's own
library by their module, unless ``--dataset`` says otherwise. Everything a run writes is
in ``--output_dir``. ``test`` in ``metrics.json`` is measured on ``model/`` as anyone loads it: a
BiLSTM with ``trust_remote_code=True``, all others without this package.
"""

from __future__ import annotations

from options import TextOptions, command_line

if __name__ == "__main__":  # --help and a misspelt flag are answered before torch is imported
    options = command_line(TextOptions, default="stdlib_lt")

import math
from collections.abc import Collection
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from options import (
    LAST,
    RESUME,
    choose_threads,
    held_out_record,
    keep_split,
    keep_tuned,
    last_step_record,
    load_validation,
    print_header,
    print_kept,
    print_outcome,
    split_samples,
    stream_data,
    tuned_for,
    without_untrained,
)
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from ldam_plugins import (
    ClassCounts,
    DRWCallback,
    LongTailMetrics,
    fold_cosine_head,
    long_tail_indices,
    reports,
)
from ldam_plugins.data.notes import DataNotes
from ldam_plugins.data.streams import stream_texts
from ldam_plugins.data.texts import load_texts, subsample_classes, text_examples, texts_of_classes
from ldam_plugins.heads import cosine_heads, find_head, freeze_backbone
from ldam_plugins.heads.choice import put_head
from ldam_plugins.integrations.transformers.bilstm import (
    BiLSTMConfig,
    BiLSTMForSequenceClassification,
)
from ldam_plugins.integrations.transformers.fast_attention import use_fast_dropout
from ldam_plugins.integrations.transformers.layer_decay import LayerDecayTrainer
from ldam_plugins.integrations.transformers.rebalance import trainer_features
from ldam_plugins.integrations.transformers.run_callbacks import (
    CheckpointCallback,
    HistoryCallback,
    ProgressCallback,
    SelectionCallback,
    class_errors,
    drop_partial_trainer_checkpoints,
    epochs_to_train,
    newest_trainer_checkpoint,
    pretrained_source,
    selection_scores,
)
from ldam_plugins.integrations.transformers.saved_model import describe_saved, measure_saved
from ldam_plugins.integrations.transformers.sharpness_aware import SharpnessAwareTrainer
from ldam_plugins.integrations.transformers.streaming import StreamingTrainer
from ldam_plugins.integrations.transformers.tokenizer import train_tokenizer
from ldam_plugins.integrations.transformers.weight_average import WeightAverageTrainer
from ldam_plugins.losses.base import ClassificationLoss
from ldam_plugins.posthoc import Finished
from ldam_plugins.posthoc.last_step import scratch_folder
from ldam_plugins.training import (
    check_processes,
    claim_output_dir,
    disk_errors,
    folders_held,
    keep_freed_memory,
    refuse_deepspeed,
    run_metrics,
    training_times,
    write_metrics,
)
from ldam_plugins.training.auto_tune import Tuned, by_rule
from ldam_plugins.training.distributed import is_sharded
from ldam_plugins.training.environment import without_hub
from ldam_plugins.training.options import (
    did_you_mean,
    invalid,
)
from ldam_plugins.training.selection import SelectionRule

# Names of the dropout of attention in the configurations of transformers.
ATTENTION_DROPOUTS = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")
LOOKED_AT = 1000  # texts among which the batches are chosen that are timed


@folders_held()
def main(options: TextOptions) -> dict[str, Any]:
    """Train and evaluate once; returns what its files of results hold."""
    set_seed(options.seed)
    disable_progress_bar()  # of transformers: reading and writing weights takes moments
    arguments = make_arguments(options)
    check_processes(arguments.world_size, options.num_processes)
    choose_threads(options)
    refuse_deepspeed(arguments.deepspeed_plugin, stages=(3,), hint="Use ZeRO-2 or FSDP2.")
    options.check_model()
    show = arguments.process_index == 0 and not options.quiet
    if not show:
        disable_progress_bars()  # of datasets, as the texts become tokens
    notes = DataNotes()
    if options.streaming:
        train, test, counts = stream_data(options, stream_parts, show, notes)
    else:
        train, test, counts = load_data(options, show, notes)
    train, validation, counts = hold_out(options, train, counts, show, notes)
    counts = counts.with_limits(many_above=options.many, few_below=options.few)
    if show:
        print_header(
            options,
            counts,
            "texts",
            held_out=0 if validation is None else len(validation),
            test=len(test) if options.measures_test else 0,
            device=arguments.device,
            processes=arguments.world_size,
        )
    criterion = options.make_loss(counts)
    tokenizer, model = make_model(options, train, criterion)
    options.check_last_step(model)
    with arguments.main_process_first(desc="tokenize"):  # the others read its cache
        train_set = tokenize(options, tokenizer, train)
        eval_set = None if validation is None else tokenize(options, tokenizer, validation)
        test_set = tokenize(options, tokenizer, test) if reads_test(options) else None
    steps = steps_per_epoch(options, arguments, train_set)
    options.make_schedule().start_step(options.epochs * steps, steps)  # may be past the end
    tuned = tune(options, arguments, model, criterion, tokenizer, train_set, steps)
    if (tuned.precision, tuned.compile) != precision_of(arguments):
        arguments = make_arguments(options, tuned)
    rule = options.make_selection(steps)
    drawn = test_set if options.eval_test_every else None
    callbacks = make_callbacks(options, criterion, drawn, rule)
    if arguments.process_index == 0:
        # The classes of a run that is resumed must be the same, in the same order.
        claim_output_dir(
            options.output_dir,
            {**asdict(options), "class_names": counts.class_names},
            resume=RESUME[options.resume],
            may_grow=options.may_grow(),
            overwrite=options.overwrite,
        )
        keep_split(options, notes, write=True)
        keep_tuned(options, tuned, write=True)
        drop_partial_trainer_checkpoints(arguments.output_dir)
    checkpoint = newest_trainer_checkpoint(arguments.output_dir)
    arguments.num_train_epochs = epochs_to_train(checkpoint, options.epochs, rule)
    trainer = make_trainer(
        options, arguments, model, tokenizer, counts, train_set, eval_set, callbacks
    )
    with disk_errors(options.output_dir), keep_freed_memory(arguments.device):
        trainer.train(resume_from_checkpoint=checkpoint)
        finished = finish(options, trainer, counts, test_set)
        save_model(options, trainer)
    size = arguments.per_device_eval_batch_size
    held_out: dict[str, Any] = {}
    if rule is not None:
        held_out["selection"] = rule.record(selection_scores(trainer.state, rule.metric))
    if validation is not None:
        labels = validation if options.streaming else validation["label"]
        held_out["held_out"] = held_out_record(labels, counts)
        held_out["validation"] = measure(options, validation, counts, size)
    result = None
    if options.measures_test:
        result = measure(options, test, counts, size)
    held_out |= last_step_record(finished, result or held_out.get("validation"))
    metrics = run_metrics(
        options=asdict(options),
        **notes.record(),
        class_counts=counts,
        device=arguments.device,
        processes=arguments.world_size,
        mixed_precision=trainer.accelerator.mixed_precision,
        auto_tune=asdict(tuned),
        class_errors=None if result is None else class_errors(result, counts),
        **held_out,
        test=result,
    )
    if trainer.is_world_process_zero():
        save_outputs(options, metrics, counts, test if options.measures_test else validation)
    trainer.accelerator.end_training()
    return metrics


def measure(
    options: TextOptions, texts: Dataset, counts: ClassCounts, batch_size: int
) -> dict[str, Any]:
    """Metrics and predictions of the saved model on some texts, as anyone gets them."""
    return measure_saved(
        model_folder(options),
        texts,
        counts,
        batch_size=batch_size,
        detailed=True,
        examples=None if options.streaming else text_examples(texts).names,
    )


def save_outputs(
    options: TextOptions, metrics: dict[str, Any], counts: ClassCounts, measured: Dataset | None
) -> None:
    """Write the metrics and the report, and print the accuracy of each class."""
    times = training_times(options.output_dir, counts.total)
    write_metrics(options.output_dir, metrics | times)
    if measured is not None and not options.streaming:
        reports.write_mistakes(
            options.output_dir, lambda row: measured[row]["text"], options.measured_part
        )
    reports.write_report(options.output_dir)
    print_outcome(options, metrics, counts)


def reads_test(options: TextOptions) -> bool:
    """Whether the test texts are read by the model in training, or by the last step."""
    before = options.make_last_step() is not None and options.measures_test
    return bool(options.eval_test_every) or before


def finish(
    options: TextOptions, trainer: Trainer, counts: ClassCounts, test_set: Dataset | None
) -> Finished | None:
    """Re-balance and calibrate the head of the trained model, if that is asked for."""
    step = options.make_last_step()
    if step is None:
        return None
    trainer.model = plain_model(options, trainer)
    sets = {"train": trainer.train_dataset, "validation": trainer.eval_dataset}
    sets |= {"test": test_set if options.measures_test else None}
    with scratch_folder(options.output_dir) as folder:
        parts = {
            part: partial(trainer_features, trainer, trainer.model, texts, folder / part)
            for part, texts in sets.items()
            if texts is not None
        }
        return step.run(trainer.model, counts, parts)


def save_model(options: TextOptions, trainer: Trainer) -> None:
    """Write the model for its Auto class, and the tokenizer, while the other processes wait."""
    folder = model_folder(options)
    if trainer.is_fsdp_enabled:  # gathered from all processes, and folded as any model saved
        trainer.save_model(folder)
    if trainer.is_world_process_zero():
        if trainer.is_fsdp_enabled:  # saved anew without what only this package reads
            model = AutoModelForSequenceClassification.from_pretrained(folder)
        else:
            model = folded(options, trainer)
        model.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
        describe_saved(folder, model, trainer.processing_class)
    trainer.accelerator.wait_for_everyone()
    trainer.optimizer = trainer.lr_scheduler = None  # room for the saved model
    trainer.accelerator.free_memory()


def folded(options: TextOptions, trainer: Trainer) -> PreTrainedModel:
    """The model with its head folded to fit training texts, in float32."""
    model = plain_model(options, trainer)
    if cosine_heads(model):
        texts = trainer.train_dataset
        if options.streaming:
            texts.rows.set_epoch(0)
        loader = DataLoader(
            texts,
            options.batch_size,
            **({"sampler": texts.rows} if options.streaming else {"shuffle": True}),
            collate_fn=trainer.data_collator,
            # A seed of its own: a resumed run is in another random state, but must fold the same.
            generator=torch.Generator().manual_seed(options.seed),
        )
        batches = (batch.to(trainer.args.device) for batch in islice(loader, 8))
        fold_cosine_head(model, inputs=batches)
    return model


def plain_model(options: TextOptions, trainer: Trainer) -> PreTrainedModel:
    """The model without wrappers, its adapters merged into its weights."""
    model = trainer.accelerator.unwrap_model(
        trainer.model, keep_fp32_wrapper=False, keep_torch_compile=False
    )
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def model_folder(options: TextOptions) -> str:
    """The folder of the saved model."""
    return str(Path(options.output_dir, "model"))


def load_data(
    options: TextOptions, show: bool = False, notes: DataNotes | None = None
) -> tuple[Dataset, Dataset, ClassCounts]:
    """The training texts, cut to a long tail if asked for, the test texts, and texts per class.

    What there is to say of them is printed with ``show``, and kept in ``notes``.
    """
    notes = DataNotes() if notes is None else notes
    train, test = load_parts(options, options.test_split, notes)
    if show:
        notes.print()
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
        print_kept(options, ClassCounts(np.bincount(labels, minlength=len(names))), counts)
    return train, test, counts


def load_parts(
    options: TextOptions, test_split: float | str | None, notes: DataNotes
) -> tuple[Dataset, Dataset]:
    """The texts to train on and those of another part."""
    train, other = load_texts(
        options.dataset,
        text_column=options.text_column,
        label_column=options.label_column,
        train_split=options.train_split,
        test_split=test_split,
        group_column=options.group_column,
        encoding=options.encoding,
        delimiter=options.delimiter,
        skip_empty=options.skip_empty,
        split_file=options.split_file,
        seed=options.subset_seed,
        min_kept=options.min_kept,
        notes=notes,
    )
    labels, names = np.asarray(train["label"][:]), train.features["label"].names
    return without_untrained((train, other), labels, names, texts_of_classes, notes)


def stream_parts(
    options: TextOptions, test_split: Any, notes: DataNotes, *, progress: bool = False
) -> tuple[Any, Any]:
    """The texts to train on and those of another part, as streams."""
    return stream_texts(
        options.dataset,
        text_column=options.text_column,
        label_column=options.label_column,
        train_split=options.train_split,
        test_split=test_split,
        class_counts=options.given_counts(),
        shuffle_buffer=options.shuffle_buffer,
        skip_empty=options.skip_empty,
        seed=options.seed,
        progress=progress,
        notes=notes,
    )


def hold_out(
    options: TextOptions,
    train: Dataset,
    counts: ClassCounts,
    show: bool,
    notes: DataNotes | None = None,
) -> tuple[Dataset, Dataset | None, ClassCounts]:
    """The texts to train on, those of --val_split, and how many of a class are left."""
    if not options.holds_out:
        return train, None, counts
    if isinstance(options.val_split, str):
        notes = DataNotes() if notes is None else notes
        load = stream_parts if options.streaming else load_parts
        validation = load_validation(options, load, notes)
        if show:
            notes.print()
        return train, validation, counts
    kept, held_out = split_samples(options, text_examples(train), counts, show=show, notes=notes)
    validation, train = train.select(held_out), train.select(kept)
    counts = ClassCounts.from_labels(train["label"], class_names=counts.class_names)
    return train, validation, counts


def make_model(
    options: TextOptions, train: Dataset, criterion: ClassificationLoss
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and model, with a head of the kind asked for, and with adapters."""
    names = train.features["label"].names
    labels = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: label for label, name in enumerate(names)},
    }
    if options.model == "bilstm":
        if options.attention_dropout is not None:
            expected = "None for a bilstm, which has no attention"
            raise invalid("attention_dropout", expected, options.attention_dropout)
        new: set[str] = set()
        tokenizer, model = make_bilstm(options, train, labels)
    else:
        folder = pretrained_source(options.model)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except OSError as error:
            expected = "bilstm, minilm, a folder with a model, or a hub id that can be reached"
            near = did_you_mean(options.model, ("bilstm", "minilm"), cutoff=0.7)
            hint = f"{near} {without_hub('minilm')}".strip()
            raise invalid("model", expected, options.model, hint=hint) from error
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            folder,
            **labels,
            **attention_options(options, folder),
            problem_type="single_label_classification",
            trust_remote_code=False,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        new = {*loaded["missing_keys"], *(name for name, *_ in loaded["mismatched_keys"])}
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
            model.config.pad_token_id = tokenizer.pad_token_id
    # Saved with the tokenizer, so that `truncation=True` cuts texts as in training.
    tokenizer.model_max_length = min(options.max_length, tokenizer.model_max_length)
    put_head(model, criterion, options.head, scale=options.scale, init=options.head_init)
    if options.freeze is not None:
        freeze_backbone(model, new=new)
    return tokenizer, add_adapters(options, model, new) if options.lora_rank else model


def attention_options(options: TextOptions, folder: str) -> dict[str, float]:
    """``--attention_dropout`` by its name in the configuration of the model."""
    if options.attention_dropout is None:
        return {}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    known = [name for name in ATTENTION_DROPOUTS if hasattr(config, name)]
    if not known:
        hint = "Leave --attention_dropout out."
        expected = f"None for a model of type {config.model_type!r}"
        raise invalid("attention_dropout", expected, options.attention_dropout, hint=hint)
    return dict.fromkeys(known, options.attention_dropout)


def make_bilstm(
    options: TextOptions, train: Dataset, labels: dict[str, Any]
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """A new BiLSTM, and a tokenizer of the words in the training texts."""
    texts = (row["text"] for row in train) if options.streaming else train["text"]
    tokenizer = train_tokenizer(texts, vocab_size=options.vocab_size, max_length=options.max_length)
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


def add_adapters(
    options: TextOptions, model: PreTrainedModel, new: Collection[str] = ()
) -> PreTrainedModel:
    """Low-rank adapters on the linear layers; the head is trained in full.

    So are the layers of the parameters ``new``, which were not pretrained.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    layers = [*find_head(model), *(name.rpartition(".")[0] for name in sorted(new))]
    adapters = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        target_modules="all-linear",
        modules_to_save=list(dict.fromkeys(layers)),
    )
    return get_peft_model(model, adapters)


def tokenize(options: TextOptions, tokenizer: PreTrainedTokenizerBase, texts: Dataset) -> Dataset:
    """The texts as token ids, cut to ``max_length``; batches are padded as they are made.

    Of texts that lie in the cache of ``datasets`` the token ids are kept there for the next run.
    Those of a stream are made each time they are asked for.
    """
    if options.streaming:
        return texts.map(lambda text: dict(tokenizer(text, truncation=True)))
    return texts.map(
        lambda batch: tokenizer(batch["text"], truncation=True),
        batched=True,
        remove_columns=[name for name in texts.column_names if name != "label"],
        desc="tokenize",
    )


def make_arguments(options: TextOptions, tuned: Tuned | None = None) -> TrainingArguments:
    """Arguments of a Trainer that logs, evaluates held-out texts and saves once an epoch.

    Precision and compilation are those that were chosen; without a choice yet those of the rule.
    """
    chosen = by_rule(options.mixed_precision, options.compile) if tuned is None else tuned
    in_order = options.streaming or options.make_schedule().is_resampling
    selection = {} if options.select == LAST else SelectionCallback.arguments(options.select)
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
        train_sampling_strategy="random" if in_order else "group_by_length",
        logging_strategy="epoch",
        logging_nan_inf_filter=False,  # which would show a loss of 0 once training has diverged
        eval_strategy="epoch" if options.holds_out else "no",
        save_strategy="epoch",
        seed=options.seed,
        bf16=chosen.precision == "bf16",
        fp16=chosen.precision == "fp16",
        torch_compile=chosen.compile,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        report_to=options.report_to,
        disable_tqdm=True,  # ProgressCallback has a bar of its own
        **selection,
    )


def precision_of(arguments: TrainingArguments) -> tuple[str, bool]:
    """Precision and compilation of the arguments, as :class:`Tuned` has them."""
    precision = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "no"
    return precision, bool(arguments.torch_compile)


def tune(
    options: TextOptions,
    arguments: TrainingArguments,
    model: PreTrainedModel,
    criterion: ClassificationLoss,
    tokenizer: PreTrainedTokenizerBase,
    texts: Dataset,
    steps: int,
) -> Tuned:
    """How the model is trained fastest here, found by passes over texts of usual length.

    A compilation has to do for other lengths as well.
    """

    def batches() -> list[tuple[Any, Any]]:
        rows = np.linspace(0, len(texts) - 1, min(len(texts), LOOKED_AT)).astype(int)
        some = texts.select(rows)
        some = some.select(np.argsort([len(ids) for ids in some["input_ids"]], kind="stable"))
        size, collate = min(options.batch_size, len(some)), DataCollatorWithPadding(tokenizer)
        made = []
        for share in (1 / 6, 1 / 2, 5 / 6) if options.compile == "auto" else (1 / 2,):
            first = round(share * (len(some) - size))
            batch = collate([some[row] for row in range(first, first + size)])
            made.append(({k: v for k, v in batch.items() if k != "labels"}, batch["labels"]))
        return made

    if options.fast_dropout and arguments.device.type == "cpu":
        use_fast_dropout(model)
    reason = "the model is sharded" if is_sharded(arguments.distributed_state) else None
    reason = "the texts are a stream" if options.streaming else reason
    return tuned_for(
        options,
        model,
        criterion,
        batches,
        device=arguments.device,
        compile=options.compile,
        passes=options.epochs * steps * options.accumulation,
        unmeasured=f"by rule, as {reason}" if reason else None,
    )


def steps_per_epoch(options: TextOptions, arguments: TrainingArguments, train: Dataset) -> int:
    """Optimizer steps of an epoch."""
    return math.ceil(
        len(train) / (options.batch_size * options.accumulation * arguments.world_size)
    )


def make_callbacks(
    options: TextOptions,
    criterion: ClassificationLoss,
    test_set: Dataset | None = None,
    rule: SelectionRule | None = None,
) -> list[TrainerCallback]:
    """The loss with its schedule, the history of the run, the selection of its result."""
    schedule = options.make_schedule()
    history = HistoryCallback(
        options.output_dir,
        schedule,
        options.eval_every,
        test_set=test_set,
        eval_test_every=options.eval_test_every or 1,
    )
    selection = [] if rule is None else [SelectionCallback(rule)]
    checkpoints = CheckpointCallback(options.keep_checkpoints)
    drw = DRWCallback(
        criterion,
        schedule=schedule,
        head=options.head,
        scale=options.scale,
        mixup=options.mixup,
        mix_until=1.0 if options.mix_until is None else options.make_moment("mix_until").at,
    )
    progress = ProgressCallback(schedule, show=not options.quiet)
    return [drw, history, progress, *selection, checkpoints]


def make_trainer(
    options: TextOptions,
    arguments: TrainingArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    counts: ClassCounts,
    train_set: Dataset,
    eval_set: Dataset | None,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """A Trainer; the callbacks bring the loss, the schedule and the history."""
    if options.fast_dropout and arguments.device.type == "cpu":
        use_fast_dropout(model)
    more: dict[type[Trainer], dict[str, Any]] = {}
    if options.sam:
        more[SharpnessAwareTrainer] = {"sam": options.make_sam()}
    if options.ema_decay:
        more[WeightAverageTrainer] = {"ema_decay": options.ema_decay}
    if options.layer_decay is not None:
        more[LayerDecayTrainer] = {"layer_decay": options.layer_decay}
    if options.streaming:
        more[StreamingTrainer] = {}
    kind: Any = type("RecipeTrainer", tuple(more), {}) if more else Trainer
    trainer: Trainer = kind(
        **{name: value for given in more.values() for name, value in given.items()},
        model=model,
        args=arguments,
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=LongTailMetrics(counts),
        preprocess_logits_for_metrics=only_logits,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # which prints every entry of the log
    return trainer


def only_logits(outputs: Any, labels: Any) -> Any:
    """The logits alone, of models that return more with them, as GPT-2 does its states."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


if __name__ == "__main__":
    main(options)
