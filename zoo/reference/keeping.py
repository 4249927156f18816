"""Models put together from packaged ones and a small part that comes with the zoo: made once, then kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from zoo.errors import BadInput, DownloadFailed
from zoo.models.names import KnownModel
from zoo.models.packages import locked, progress
from zoo.models.quiet import quiet_transformers
from zoo.reference import assembly, classifier

_PUT_TOGETHER = {
    "vlm": (assembly.put_together, "zoo reference train"),
    "encoder": (classifier.put_together, "zoo reference train-probe"),
}
"""By kind of the model: what makes it of its trained part, and the command that makes that part."""


def assembled(known: KnownModel) -> Path:
    """The folder with the assembled model; it is put together when it is not there yet.

    Raises:
        DownloadFailed: a part could not be fetched, or the result not be kept.
        BadInput: the trained part is missing, or does not fit.
    """
    folder = known.folder
    put_together, command = _PUT_TOGETHER[known.kind]
    assert known.trained is not None
    if folder is None:
        raise BadInput(
            f"no weights of {known.name} come with this version: make some with {command} -o DIR, and put "
            f"{known.trained.name} from there into {known.trained.parent}"
        )
    if folder.is_dir():
        return folder
    with locked(folder.parent) as parent:
        if folder.is_dir():  # another process was quicker
            return folder
        for leftover in parent.glob("incoming-*"):  # of a process that was killed: we hold the lock
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            with (
                TemporaryDirectory(prefix="incoming-", dir=parent) as work,
                progress(f"assembling {known.name}"),
                quiet_transformers(),
            ):
                model, processor = put_together(known.trained)
                written = Path(work) / "model"
                model.save_pretrained(written)
                processor.save_pretrained(written)
                written.replace(folder)
        except OSError as error:
            reason = error.strerror or str(error).splitlines()[0]
            raise DownloadFailed(f"could not keep the assembled {known.name}: {reason.lower()}") from None
    return folder
