"""Fine-tune or train a text classifier on a long tail with transformers.Trainer and LDAM-DRW.

    python recipes/text_lt.py                                    # docstrings, under two minutes
    python recipes/text_lt.py imdb_lt                            # the paper's run
    python recipes/text_lt.py imdb_lt --loss ce --schedule none
    python recipes/text_lt.py banking77_lt --model bert-base-uncased --lora_rank 8

A preset of ``recipes/presets`` (or a YAML or JSON file) may come first, flags after it override it.
Without one the preset is ``stdlib_lt``, a BiLSTM that tells apart the docstrings of Python's own
library by their module, unless ``--dataset`` says otherwise. Everything a run leaves is in
``--output_dir``: ``test`` in ``metrics.json`` is of ``model/`` as anyone loads it, a BiLSTM with
``trust_remote_code=True``, all else with nothing of this package.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from options import RESUME, parse_options
from text_setup import TextOptions, load_data, make_model, tokenize
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ldam_plugins import ClassCounts, DRWCallback, LongTailMetrics, fold_cosine_head
from ldam_plugins.heads import cosine_heads
from ldam_plugins.integrations.transformers.fast_attention import use_fast_dropout
from ldam_plugins.integrations.transformers.run_callbacks import (
    CheckpointCallback,
    HistoryCallback,
    class_errors,
    drop_partial_trainer_checkpoints,
    newest_trainer_checkpoint,
)
from ldam_plugins.integrations.transformers.saved_model import describe_saved, measure_saved
from ldam_plugins.losses.base import ClassificationLoss
from ldam_plugins.reports.run_report import per_class_table, write_report
from ldam_plugins.training.environment import (
    check_processes,
    choose_precision,
    keep_freed_memory,
    refuse_deepspeed,
)
from ldam_plugins.training.history import (
    device_name,
    disk_errors,
    read_history,
    run_versions,
    write_metrics,
)
from ldam_plugins.training.run_dir import claim_output_dir
from ldam_plugins.training.run_lock import folders_held


@folders_held()
def main(options: TextOptions) -> dict[str, Any]:
    """Train and evaluate once; returns what ``metrics.json`` holds."""
    set_seed(options.seed)
    arguments = make_arguments(options)
    check_processes(arguments.world_size, options.num_processes)
    refuse_deepspeed(arguments.deepspeed_plugin, stages=(3,), hint="Use ZeRO-2 or FSDP2.")
    train, test, counts = load_data(options, show=arguments.process_index == 0)
    criterion = options.make_loss(counts)
    tokenizer, model = make_model(options, train, criterion)
    texts = test
    with arguments.main_process_first(desc="tokenize"):  # the others read what it has kept
        train, test = (tokenize(options, tokenizer, each) for each in (train, test))
    check_start(options, arguments, train)
    callbacks = make_callbacks(options, criterion)
    if arguments.process_index == 0:
        claim_output_dir(options.output_dir, asdict(options), resume=RESUME[options.resume])
        drop_partial_trainer_checkpoints(arguments.output_dir)
    trainer = make_trainer(options, arguments, model, tokenizer, counts, train, test, callbacks)
    with disk_errors(options.output_dir), keep_freed_memory(arguments.device):
        trainer.train(resume_from_checkpoint=newest_trainer_checkpoint(arguments.output_dir))
        leave_model(options, trainer)
    result = measure_saved(
        model_folder(options), texts, counts, batch_size=arguments.per_device_eval_batch_size
    )
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
    if trainer.is_world_process_zero():
        leave_report(options, metrics)
        print(per_class_table(result, counts))
    trainer.accelerator.end_training()
    return metrics


def leave_report(options: TextOptions, metrics: dict[str, Any]) -> None:
    """Write the metrics and the report."""
    seconds = sum(row["seconds"] for row in read_history(options.output_dir))
    metrics["train_seconds"] = seconds
    metrics["examples_per_second"] = sum(metrics["class_counts"]) * options.epochs / seconds
    write_metrics(options.output_dir, metrics)
    write_report(options.output_dir)


def leave_model(options: TextOptions, trainer: Trainer) -> None:
    """Write the model that its Auto class loads, and the tokenizer; all processes wait for it."""
    folder = model_folder(options)
    if trainer.is_fsdp_enabled:  # gathered from all processes, and folded as any model saved
        trainer.save_model(folder)
    if trainer.is_world_process_zero():
        if trainer.is_fsdp_enabled:  # what only this package reads is dropped
            model = AutoModelForSequenceClassification.from_pretrained(folder)
        else:
            model = folded(options, trainer)
        model.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
        describe_saved(folder, model, trainer.processing_class)
    trainer.accelerator.wait_for_everyone()
    trainer.optimizer = trainer.lr_scheduler = None  # makes room for the model that is measured
    trainer.accelerator.free_memory()


def folded(options: TextOptions, trainer: Trainer) -> PreTrainedModel:
    """The model with its head folded to fit training texts, in float32."""
    model = trainer.accelerator.unwrap_model(
        trainer.model, keep_fp32_wrapper=False, keep_torch_compile=False
    )
    model = model.merge_and_unload() if options.lora_rank else model
    if cosine_heads(model):
        loader = DataLoader(
            trainer.train_dataset,
            options.batch_size,
            shuffle=True,
            collate_fn=trainer.data_collator,
            # A resumed run, whose random state is another one, folds as the undisturbed one.
            generator=torch.Generator().manual_seed(options.seed),
        )
        batches = (batch.to(trainer.args.device) for batch in islice(loader, 8))
        fold_cosine_head(model, inputs=batches)
    return model


def model_folder(options: TextOptions) -> str:
    """Where the model is left."""
    return str(Path(options.output_dir, "model"))


def make_arguments(options: TextOptions) -> TrainingArguments:
    """Arguments of a Trainer that logs, evaluates and saves once an epoch."""
    precision = choose_precision(options.mixed_precision)
    resampled = options.make_schedule().is_resampling
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
    options: TextOptions,
    arguments: TrainingArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    counts: ClassCounts,
    train: Dataset,
    test: Dataset,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """A stock Trainer; the loss, the schedule and the history are its callbacks' matter."""
    if options.fast_dropout and arguments.device.type == "cpu":
        use_fast_dropout(model)
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
