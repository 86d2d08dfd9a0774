"""Checkpoints of a run, each whole or not there, and where a resumed run goes on.

A run's folder holds them as ``checkpoints/epoch_00012``, named by the epochs that are done.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldam_plugins._validation import check_int
from ldam_plugins.training.files import flush_folder, flush_names
from ldam_plugins.training.history import HistoryWriter
from ldam_plugins.training.run_dir import MAY_CHANGE, claim_output_dir, folders_held

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

_CHECKPOINT = "epoch_"
_PARTIAL = ".partial"


def begin_run(
    accelerator: Accelerator,
    output_dir: str | os.PathLike[str],
    options: Mapping[str, Any],
    *,
    resume: bool | str = False,
    models: Mapping[str, nn.Module] | None = None,
    may_change: Collection[str] = MAY_CHANGE,
    may_grow: Mapping[str, str | None] | None = None,
    overwrite: bool = False,
    test_error: bool = False,
) -> tuple[int, HistoryWriter | None]:
    """Claim the folder of a run, or load the newest checkpoint of the run in it.

    Call it on every process, last before training, when all has been prepared.

    Args:
        accelerator: What prepared the model, the optimizer and so on.
        output_dir: Folder of the run.
        options: Everything that makes the run, ready for JSON.
        resume: As in :func:`~ldam_plugins.training.claim_output_dir`.
        models: As in :func:`save_checkpoint`.
        may_change: Names of options in which a resumed run may differ.
        may_grow: As in :func:`~ldam_plugins.training.claim_output_dir`.
        overwrite: As there.
        test_error: As in :class:`~ldam_plugins.training.HistoryWriter`.

    Returns:
        The first epoch to train, and on the main process the history of the run (None on others).
        The folder is locked while the history exists.

    Raises:
        ValueError: as in :func:`~ldam_plugins.training.claim_output_dir`.
    """
    history = None
    with folders_held():
        if accelerator.is_main_process:
            claim_output_dir(
                output_dir,
                options,
                resume=resume,
                may_change=may_change,
                may_grow=may_grow,
                overwrite=overwrite,
            )
            drop_partial_checkpoints(output_dir)
        accelerator.wait_for_everyone()
        epochs = load_checkpoint(accelerator, output_dir, models=models)
        if accelerator.is_main_process:
            history = HistoryWriter(output_dir, epochs, test_error=test_error)
    return epochs, history


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | os.PathLike[str],
    epochs: int,
    *,
    keep: int = 1,
    models: Mapping[str, nn.Module] | None = None,
) -> Path:
    """Write all that Accelerate has prepared as a checkpoint; call it on every process.

    Args:
        accelerator: What prepared the model, the optimizer and so on.
        output_dir: Folder of the run.
        epochs: Epochs done.
        keep: Checkpoints to keep, at least 1; older ones are dropped.
        models: Modules that Accelerate has not prepared, such as a moving average, by the names of
            their files.

    Raises:
        OSError: it cannot be written; the checkpoints before it are as they were.
        ValueError: ``keep`` is less than 1.
    """

    def save(folder: str) -> None:
        from safetensors.torch import save_model

        accelerator.save_state(folder)
        if accelerator.is_main_process:
            for name, model in (models or {}).items():
                save_model(model, _model_file(folder, name))
        accelerator.wait_for_everyone()

    return write_checkpoint(output_dir, epochs, save, keep)


def load_checkpoint(
    accelerator: Accelerator,
    output_dir: str | os.PathLike[str],
    *,
    models: Mapping[str, nn.Module] | None = None,
) -> int:
    """Load the newest checkpoint of :func:`save_checkpoint`; returns its epochs, 0 without one."""
    from safetensors.torch import load_model

    checkpoint, epochs = newest_checkpoint(output_dir)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        for name, model in (models or {}).items():
            load_model(model, _model_file(checkpoint, name))
    return epochs


def newest_checkpoint(output_dir: str | os.PathLike[str]) -> tuple[Path | None, int]:
    """Newest whole checkpoint of a run and the epochs it holds; (None, 0) if there is none."""
    found = checkpoints(output_dir)
    return (found[max(found)], max(found)) if found else (None, 0)


def checkpoints(output_dir: str | os.PathLike[str]) -> dict[int, Path]:
    """Whole checkpoints of a run by the epochs they hold."""
    found = sorted(_folder(output_dir).glob(f"{_CHECKPOINT}*"))
    return {int(path.name.removeprefix(_CHECKPOINT)): path for path in found if _is_one(path)}


def drop_partial_checkpoints(output_dir: str | os.PathLike[str]) -> None:
    """Remove half-written checkpoints, of a run that was killed while it wrote one.

    Call it on one process, before any writes.
    """
    for path in _folder(output_dir).glob(f".{_CHECKPOINT}*{_PARTIAL}"):
        if path.is_dir():
            shutil.rmtree(path)


def write_checkpoint(
    output_dir: str | os.PathLike[str], epochs: int, save: Callable[[str], None], keep: int = 1
) -> Path:
    """Write a checkpoint whole or not at all, and drop all but the newest ``keep``.

    ``save(folder)`` writes into a temporary folder, which is renamed when it is complete and on the
    disk. Only then older ones are dropped, so that a power cut leaves at least one. Call it on
    every process if ``save`` is collective, as ``Accelerator.save_state`` is.

    Args:
        output_dir: Folder of the run.
        epochs: Epochs done.
        save: Writes the state into the folder it is given.
        keep: Checkpoints to keep, at least 1.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: it could not be written; the checkpoints before it are as they were.
        ValueError: ``keep`` is less than 1.
    """
    check_int("keep", keep, low=1)
    target = _folder(output_dir) / f"{_CHECKPOINT}{epochs:05d}"
    beside = target.with_name(f".{target.name}{_PARTIAL}")
    main = int(os.environ.get("RANK", 0)) == 0
    try:
        save(str(beside))
        if main:
            flush_folder(beside)
    except Exception as error:  # torch, safetensors and the system each have their own
        shutil.rmtree(beside, ignore_errors=True)
        hint = "Make room or mend the folder, then go on from the last one with --resume"
        raise OSError(f"checkpoint {target} cannot be written ({error}). {hint}.") from error
    if main:
        if target.exists():
            target.rename(target.with_name(f".{target.name}.old{_PARTIAL}"))
        beside.rename(target)
        flush_names(target.parent)
        drop_partial_checkpoints(output_dir)
        for _, path in sorted(checkpoints(output_dir).items())[:-keep]:
            shutil.rmtree(path)
    return target


def _folder(output_dir: str | os.PathLike[str]) -> Path:
    return Path(output_dir) / "checkpoints"


def _is_one(path: Path) -> bool:
    return path.is_dir() and path.name.removeprefix(_CHECKPOINT).isdecimal()


def _model_file(checkpoint: str | os.PathLike[str], name: str) -> str:
    return str(Path(checkpoint, f"{name}.safetensors"))
