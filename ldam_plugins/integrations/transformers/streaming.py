"""A ``transformers.Trainer`` for texts that are read as a stream."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ldam_plugins.data.streams import StreamedTexts
from ldam_plugins.integrations.transformers.training_run import steps_per_epoch


class StreamingTrainer(Trainer):
    """A Trainer whose data sets may be :class:`~ldam_plugins.data.streams.StreamedTexts`.

    The rows of a stream are read in its order, which changes with the epoch, and Accelerate gives
    each process its batches of them. Their number is known, so epochs, evaluation and
    ``num_train_epochs`` are as with other data. Where it resumes inside an epoch, the rows up to
    there are read again; nothing else is done to them.

    Other data sets are those of a plain Trainer.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_StreamEpochs())

    def get_train_dataloader(self) -> Any:
        """The loader of the training data."""
        if not isinstance(self.train_dataset, StreamedTexts):
            return super().get_train_dataloader()
        return self._stream_loader(self.train_dataset, self._train_batch_size)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The loader of the data to evaluate on, in their order."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(data, StreamedTexts):
            return super().get_eval_dataloader(eval_dataset)
        return self._stream_loader(data, self.args.eval_batch_size)

    def get_test_dataloader(self, test_dataset: Dataset) -> Any:
        """The loader of the data to predict."""
        if not isinstance(test_dataset, StreamedTexts):
            return super().get_test_dataloader(test_dataset)
        return self._stream_loader(test_dataset, self.args.eval_batch_size)

    def _stream_loader(self, texts: StreamedTexts, batch_size: int) -> Any:
        loader: DataLoader[Any] = DataLoader(
            texts,
            batch_size=batch_size,
            sampler=texts.rows,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            drop_last=self.args.dataloader_drop_last and texts is self.train_dataset,
        )
        return self.accelerator.prepare(loader)


class _StreamEpochs(TrainerCallback):
    """Tells the stream which epoch begins.

    A Trainer that resumes inside an epoch in several processes does not reach the sampler: its
    loader is wrapped once more (transformers 5.24, accelerate 1.15).
    """

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(texts := train_dataloader.dataset, StreamedTexts):
            steps = steps_per_epoch(args, train_dataloader, state.max_steps)
            texts.rows.set_epoch(state.global_step // steps)
