"""Fetches one model repository from the Hugging Face hub into the local cache, for the reader ``huggingface``.

Only weights, JSON and the model card are fetched, never code, and nothing is opened here. What is complete in the cache
is not fetched again. ``huggingface_hub`` (extra ``hub``) does the work: progress, retries and resumption are its own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from sane_ray.errors import InputError

if TYPE_CHECKING:
    from types import ModuleType

_ABOUT = ("*.json", "README.md")
_SAFETENSORS = "*.safetensors"
_TORCH = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NO_WEIGHTS = ("*training_args.bin", "*optimizer*", "*scheduler*", "*rng_state*", "*random_states*", "*scaler.pt")
"""What trainers save beside the weights under the same endings."""


def fetch(repo_id: str, cache: Path | None = None) -> Path:
    """Downloads the weights of a repository, or finds them in the cache.

    Where the repository has safetensors, no other weights are fetched; where it has none, its torch files are.
    With ``HF_HUB_OFFLINE=1``, or while the hub cannot be reached, the cache alone is used.

    Args:
        repo_id: ``org/name``, or ``org/name@revision`` with a branch, tag or commit.
        cache: folder of the cache; by default that of ``huggingface_hub`` (``HF_HUB_CACHE``, ``HF_HOME``).

    Returns:
        The snapshot's folder, ``<cache>/models--org--name/snapshots/<commit>``.

    Raises:
        InputError: ``huggingface_hub`` is not installed, there is no such repository or revision, it is gated or has no
            weights, or neither the hub nor a complete copy in the cache can be reached.
    """
    hub = _library()
    name, at, revision = repo_id.partition("@")
    if at and not revision:
        raise InputError(f"--hub {repo_id}: no revision after the @; name a branch, tag or commit, or leave out the @")
    folder = _snapshot(hub, name, revision or None, cache, (_SAFETENSORS, *_ABOUT))
    if not _holds(folder, (_SAFETENSORS,)):
        folder = _snapshot(hub, name, revision or None, cache, (*_TORCH, *_ABOUT))
        if not _holds(folder, _TORCH):
            what = "the copy in the cache" if _offline() else "the repository"
            raise InputError(
                f"--hub {repo_id}: {what} holds no weights that can be read (looked for "
                f"{', '.join((_SAFETENSORS, *_TORCH))}); name a repository with safetensors"
            )
    return folder


def _library() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise InputError("--hub needs the package huggingface_hub: pip install 'sane_ray[hub]'") from error
    return huggingface_hub


def _snapshot(hub: ModuleType, name: str, revision: str | None, cache: Path | None, patterns: tuple[str, ...]) -> Path:
    try:
        folder = hub.snapshot_download(
            name,
            revision=revision,
            cache_dir=cache,
            allow_patterns=list(patterns),
            ignore_patterns=list(_NO_WEIGHTS),
            endpoint=os.environ.get("HF_ENDPOINT"),  # the library itself reads its variables only when first imported
            local_files_only=_offline(),
        )
    except Exception as error:  # which errors of the network there are differs between versions of the library
        raise InputError(f"--hub {name}{f'@{revision}' if revision else ''}: {_sentence(hub, error)}") from error
    return Path(folder)


def _sentence(hub: ModuleType, error: Exception) -> str:
    """What went wrong and what to do; the order matters, since the library derives the first from the second."""
    errors = hub.errors
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if isinstance(error, errors.GatedRepoError):
        return "is gated; accept its terms on its page, then set HF_TOKEN to a token of that account"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such model repository, or a private one; check the name, or set HF_TOKEN to a token that may read it"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision; name one of its branches, tags or commits"
    if isinstance(error, errors.HFValidationError):
        return f"no name of a repository ({first_line}); it is org/name, or org/name@revision"
    if isinstance(error, errors.LocalEntryNotFoundError) and _offline():
        return f"not complete in the cache, and HF_HUB_OFFLINE is set ({first_line}); unset it to download"
    return f"could not be fetched ({first_line}); check the network and try again, what has arrived is kept"


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _holds(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(path.is_file() for pattern in patterns for path in folder.rglob(pattern))
