"""Snapshots of Hugging Face hub repositories: from the hub's own cache, or freshly fetched when it answers.

The hub's cache (``HF_HOME``) is shared with every other tool, so nothing is stored twice. Only what a safetensors model
needs is fetched. An unreachable hub is noticed within seconds, because a model may come from elsewhere.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from zoo.errors import DownloadFailed, ModelNotFound

PATIENCE = 3.0
"""Seconds given to the hub to answer the first question."""

_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*.safetensors"]
"""Sub-folders hold other formats of the same weights; ``consolidated`` is a second copy in another naming."""

_GATED = "{} is gated: accept its terms on the hub, then run: hf auth login"


class HubUnreachable(DownloadFailed):
    """The hub did not answer in time, or offline mode is on."""


def cached_snapshot(repository: str, revision: str | None = None) -> Path | None:
    """The complete local snapshot of ``repository`` (``owner/name``), or ``None``. Uses no network."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "config.json", revision=revision)
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    return folder if _complete(folder) else None


def fetch_snapshot(repository: str, revision: str | None = None, *, code: bool = False) -> Path:
    """Fetch the snapshot of ``repository`` that the hub names ``revision`` (default: its main branch).

    Args:
        repository: ``owner/name``.
        revision: branch, tag or commit.
        code: fetch Python files as well (for models that need their own code).

    Raises:
        HubUnreachable: no answer within a few seconds, or ``HF_HUB_OFFLINE`` is set.
        ModelNotFound: the hub has no such repository, it is gated or private, or holds no safetensors.
        DownloadFailed: the download broke off.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    _ask(repository, revision)
    try:
        folder = Path(
            snapshot_download(
                repository,
                revision=revision,  # by its name, so that the cache finds it under that name when offline
                allow_patterns=_WANTED + (["*.py"] if code else []),
                ignore_patterns=_UNWANTED,
            )
        )
    except GatedRepoError:  # anyone may ask about a gated model; only its files are closed
        raise ModelNotFound(_GATED.format(repository)) from None
    except Exception as error:  # the HTTP library below the hub client changes between its versions
        raise DownloadFailed(f"the download of {repository} broke off: {_first_line(error)}") from None
    if not _complete(folder):
        raise ModelNotFound(
            f"{repository} has no config.json with safetensors weights; choose another revision"
        )
    return folder


def _ask(repository: str, revision: str | None) -> None:
    """Ask the hub whether it has this model: one question, one try, a few seconds."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise HubUnreachable("HF_HUB_OFFLINE is set")
    answer: list[Any] = []

    def ask() -> None:
        try:
            answer.append(HfApi().model_info(repository, revision=revision, timeout=PATIENCE).sha)
        except Exception as error:  # handed to the caller's thread
            answer.append(error)

    # The timeout above does not cover a name server that never answers; a daemon thread that is left behind does.
    question = threading.Thread(target=ask, daemon=True)
    question.start()
    question.join(PATIENCE + 1)
    if not answer:
        raise HubUnreachable(f"the hub gave no answer in {PATIENCE:.0f} s")
    match answer[0]:
        case str():  # a commit
            return
        case GatedRepoError():
            raise ModelNotFound(_GATED.format(repository))
        case RevisionNotFoundError():
            raise ModelNotFound(f"{repository} has no revision '{revision}'")
        case RepositoryNotFoundError():
            raise ModelNotFound(
                f"the hub has no public model called {repository} (private ones need: hf auth login)"
            )
        case error:
            raise HubUnreachable(f"the hub cannot be reached: {_first_line(error)}")


def _complete(folder: Path) -> bool:
    """True when the folder has a configuration and every safetensors file that its index names."""
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        weights = list(folder.glob("*.safetensors"))
        return bool(weights) and not any("-of-" in file.name for file in weights)  # shards need their index
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError):
        return False
    return all((folder / shard).is_file() for shard in shards)


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
