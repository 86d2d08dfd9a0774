"""A saved model on a hub of Hugging Face's form: its files as they are, its card with its id."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from ldam_plugins._validation import invalid
from ldam_plugins.reports.model_card import CARD_FILE, PLACE

LEFT_OUT = (
    *(".*", "*/.*", "_*", "*/_*", "checkpoint-*", "runs/*", "*.pth.tar"),
    *("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state*.pth"),
)
"""What trainers leave beside a model, and no one needs who uses it."""


class Sent(NamedTuple):
    """What was sent where.

    Args:
        repo_id: With the owner's name.
        url: Of the commit.
        files: Paths in the repository.
        size: Bytes of all of them.
    """

    repo_id: str
    url: str
    files: list[str]
    size: int


def send_model(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    message: str = "Add model",
) -> Sent:
    """Send the folder of a saved model to a hub, whose repository is made if it is not there.

    The hub is that of ``HF_ENDPOINT``, the token that of ``hf auth login`` or ``HF_TOKEN``. All is
    one commit. In ``README.md`` the place of the folder becomes the id, so that its lines load the
    model from the hub; the hub checks its front matter first.

    Args:
        folder: What timm or transformers load.
        repo_id: ``owner/name``; ``name`` alone is the token's own.
        private: Whether others may see a repository that is made; the owner's default unless told.
        message: Of the commit.

    Raises:
        ValueError: the id is none, or there is no token.
        OSError: the hub cannot be reached, or it refuses the token, the id or the card.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        expected = "owner/name or name, of letters, digits, '-', '_' and '.'"
        raise invalid("hub_model_id", expected, repo_id) from error
    if get_token() is None:
        hint = "Run `hf auth login`, or set HF_TOKEN to a token that may write."
        raise invalid("push_to_hub", "given where there is a token of the hub", None, hint=hint)
    api = HfApi(library_name="ldam_plugins")
    try:
        full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        files = _contents(Path(folder), full_id)
        commit = api.create_commit(
            full_id,
            [CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=message,
        )
    except (HTTPError, OSError, ValueError) as error:
        told = " ".join(str(error).split())
        message = f"{api.endpoint} does not take {repo_id!r}: {told}{_hint(error)}"
        raise OSError(message) from error
    size = sum(
        len(content) if isinstance(content, bytes) else content.stat().st_size
        for content in files.values()
    )
    return Sent(full_id, commit.commit_url, [*files], size)


def _contents(folder: Path, repo_id: str) -> dict[str, bytes | Path]:
    """The files of a model by their path in the repository; the card with its id."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    kept = [*filter_repo_objects(names, ignore_patterns=[*LEFT_OUT])]
    files: dict[str, bytes | Path] = {name: folder / name for name in kept}
    if CARD_FILE in files:
        text = (folder / CARD_FILE).read_text(encoding="utf-8")
        text = text.replace(f"local-dir:{PLACE}", f"hf-hub:{repo_id}").replace(PLACE, repo_id)
        files[CARD_FILE] = text.encode()
    return files


def _hint(error: Exception) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return " The token is not known there: `hf auth whoami` tells whose it is."
    if status == 403:
        return " The token may not write there: give an id of yours, or a token that may write."
    return ""
