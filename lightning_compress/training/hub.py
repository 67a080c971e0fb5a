"""The exported folder on Hugging Face's hub: only where the argument ``hub`` asks for it, and private by default.

That there is a token is checked before training. After the export rank zero pushes the folder; a failure is a warning
with the command that repeats it. Nothing becomes public by accident: a repository that exists and is public gets no
files of a run with ``private: true``. A model card that the user wrote in the repository stays.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_compress.export.model_card import CARD, is_edited

__all__ = ["Hub", "check_token", "push", "read_hub"]

SHAPE = "{repo: user/name, private: true}"


@dataclass(frozen=True)
class Hub:
    """Where to push.

    Args:
        repo: Repository, ``user/name``; made if it does not exist.
        private: Whether it must be private.
    """

    repo: str
    private: bool = True

    def command(self, folder: Path) -> str:
        """The command that pushes ``folder``."""
        return f"hf upload {self.repo} {folder} . {'--private' if self.private else '--no-private'}"


def read_hub(value: Any) -> Hub | None:
    """The argument ``hub``: None, or a mapping of ``repo`` and ``private``.

    Raises:
        ValueError: It is something else, or not the name of a repository.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping) or not value.keys() <= {"repo", "private"}:
        raise ValueError(f"hub={value!r}: expected a mapping such as {SHAPE}")
    hub = Hub(**{"repo": None, **value})
    if not isinstance(hub.repo, str) or hub.repo.count("/") != 1 or not all(hub.repo.split("/")):
        raise ValueError(f"hub: repo={hub.repo!r}, expected the name of a repository: {SHAPE}")
    if not isinstance(hub.private, bool):
        raise ValueError(f"hub: private={hub.private!r}, expected true or false: {SHAPE}")
    return hub


def check_token(hub: Hub) -> None:
    """ValueError, before training, where nothing can be pushed: a missing package, no token, offline mode."""
    try:
        from huggingface_hub import constants, get_token
        from huggingface_hub.utils import validate_repo_id
    except ImportError as error:
        raise ValueError("hub needs huggingface_hub: pip install 'lightning-compress[hf]'") from error
    validate_repo_id(hub.repo)  # a ValueError
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"hub.repo={hub.repo!r}, and HF_HUB_OFFLINE is set: unset it, or leave hub out")
    if get_token() is None:
        raise ValueError(
            f"hub.repo={hub.repo!r}, and there is no token: run `hf auth login`, or set HF_TOKEN to one that may write"
        )


def push(folder: Path, hub: Hub, *, failed: bool = False) -> None:
    """Push an exported folder; a failure is a warning.

    Args:
        folder: The folder.
        hub: Where to.
        failed: The model failed its gate; then it is not pushed.
    """
    if failed:
        rank_zero_warn(f"not pushed to {hub.repo}, since the model failed its gate; {hub.command(folder)} does it")
        return
    try:
        rank_zero_info(f"pushed {folder} to {_upload(folder, hub)}")
    except Exception as error:
        fault = f"{type(error).__name__}: {error}; to repeat it: {hub.command(folder)}"
        rank_zero_warn(f"the push to {hub.repo} failed, while {folder} is complete: {fault}")


def _upload(folder: Path, hub: Hub) -> str:
    """Upload; returns the address of the repository."""
    from huggingface_hub import HfApi

    api = HfApi()
    address = str(api.create_repo(hub.repo, private=hub.private, exist_ok=True))
    if hub.private and not api.model_info(hub.repo).private:
        raise ValueError(f"{hub.repo} exists and is public; make it private, or set hub.private=false")
    edited = False
    if api.file_exists(hub.repo, CARD):
        with tempfile.TemporaryDirectory() as cache:
            edited = is_edited(Path(api.hf_hub_download(hub.repo, CARD, cache_dir=cache)))
    if edited:
        rank_zero_warn(
            f"{CARD} in {hub.repo} was not written by a run, or edited, and stays; that of {folder} is newer"
        )
    ignored = [CARD] if edited else None
    api.upload_folder(
        repo_id=hub.repo, folder_path=folder, ignore_patterns=ignored, commit_message="Upload a compressed model"
    )
    return address
