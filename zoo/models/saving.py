"""Whole models on disk: all files or none."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

from safetensors import SafetensorError

from zoo.errors import BadInput, RunFailed
from zoo.models import LoadedModel


def save_model(loaded: LoadedModel, folder: str | Path) -> Path:
    """Write model and processor to a new folder, as safetensors; ``zoo.load_model`` reads it.

    Everything goes to a hidden folder beside the target, which is renamed when complete.

    Raises:
        BadInput: the folder holds something already.
        RunFailed: the disk is full, or the place cannot be written; nothing is left behind.
    """
    target = Path(folder).expanduser().absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise BadInput(f"{target} exists already and is not empty; choose another folder or remove it first")
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        staging.mkdir(parents=True)
        loaded.model.save_pretrained(staging)
        if loaded.processor is not None:
            loaded.processor.save_pretrained(staging)
        staging.replace(target)
    except (OSError, SafetensorError) as error:
        raise RunFailed(f"the model could not be written to {target}, so nothing was: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target
