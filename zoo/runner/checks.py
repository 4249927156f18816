"""What can be refused before any work: what does not fit the method, and files that cannot be read or written."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile

from zoo.errors import BadInput
from zoo.interface import Method
from zoo.runner.request import DRAWN, Job
from zoo.scenes import check_files


def check_request(job: Job) -> None:
    """Refuse what cannot be done, without loading a model.

    Raises:
        BadInput: it does not fit the method, a file is not there, or a target cannot be written.
    """
    if not job.methods and job.request.task is None:
        raise BadInput("without a method there is nothing to set beside the model; give a task to ask it")
    _check_pictures(job)
    _check_prompt(job)
    _check_drafting(job)
    _check_pruning(job)
    _check_targets(job)


def _check_pictures(job: Job) -> None:
    request = job.request
    if request.images and job.kind in ("text", "embedding", "diffusion"):
        raise BadInput(f"{job.method.name} works on text; leave out the image")
    if job.kind != "vlm" and (request.video is not None or request.frames is not None):
        reads = "pictures" if job.kind == "image" else "text"
        raise BadInput(f"{job.method.name} works on {reads}; leave out the video")
    check_files(request.images, request.video)


def _check_prompt(job: Job) -> None:
    prompt = job.request.prompt
    if prompt is None:
        return
    if job.kind == "image":
        raise BadInput(f"{job.method.name} works on images; leave out the prompt")
    if job.kind == "embedding":
        raise BadInput(f"{job.method.name} generates nothing with an embedding model; leave out the prompt")
    if not prompt.strip():
        raise BadInput("the prompt is empty; give some text")


def _check_drafting(job: Job) -> None:
    drafters = [method for method in job.methods if method.phase == "decoding"]
    if drafters and "cache" in job.phases:
        raise BadInput(
            f"{job.method.name}: drafts are taken back out of the cache, which one of them cuts; take one"
        )
    if job.request.draft is not None and not drafters:
        raise BadInput(f"{job.method.name} drafts nothing; leave out the draft model")
    for method in drafters:
        if job.request.draft is None and needs_draft(method):
            raise BadInput(
                f"{method.slug} needs a draft model with the target's tokenizer: give --draft MODEL, or --draft "
                "flap:sparsity=0.3 for a pruned copy of the target"
            )
        if getattr(method, "heads", "") is None:
            raise BadInput(
                f"{method.slug} needs heads trained for this very model: run zoo train {method.slug} --model MODEL "
                f"--output DIR, then zoo run {method.slug} --heads DIR"
            )


def needs_draft(method: Method) -> bool:
    """Whether a decoder drafts with a model of its own, and names none."""
    return getattr(method, "draft_model", "") is None


def _check_pruning(job: Job) -> None:
    request, text = job.request, job.request.calibration
    if text is not None and job.pruner is None:
        raise BadInput(f"{job.method.name} needs no calibration text; leave it out")
    if request.save is not None and job.pruner is None:
        raise BadInput(
            f"{job.method.name} changes how a model runs, not its weights: there is nothing to save"
        )
    if text is not None and not str(text).startswith("hub:") and not Path(text).expanduser().is_file():
        raise BadInput(f"there is no calibration file {text}; give a file, or hub:OWNER/NAME for a dataset")
    if request.calibration_windows < 1:
        raise BadInput("at least one calibration window is needed")


def _check_targets(job: Job) -> None:
    request = job.request
    if request.save is not None:
        check_target(request.save, "the pruned model", must_be_new=True)
    if request.report is not None:
        check_target(request.report, "the report", must_be_new=False)
    if request.overlay is not None:
        if not job.phases & DRAWN:
            raise BadInput(f"{job.method.name} chooses no visual tokens, so there is no overlay to draw")
        check_picture_target(request.overlay)


def check_target(folder: Path, what: str, *, must_be_new: bool) -> None:
    """Raise ``BadInput`` unless ``folder`` can be made (or written into)."""
    if folder.exists():
        if not folder.is_dir():
            raise BadInput(f"{folder} is a file; name a folder for {what}")
        if must_be_new and any(folder.iterdir()):
            raise BadInput(f"{folder} is not empty; name a new folder for {what}")
    home = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        # Asking for permission is not enough: read-only and special file systems grant it and fail.
        with TemporaryFile(dir=home):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise BadInput(f"{what} cannot be written to {folder}: {reason}") from None


def check_picture_target(file: Path) -> None:
    """Raise ``BadInput`` unless ``file`` can be written as a PNG picture."""
    if file.suffix.lower() != ".png":
        raise BadInput(f"the overlay is a PNG picture; give a file name that ends in .png, not {file.name}")
    if file.is_dir():
        raise BadInput(f"{file} is a folder; name a file for the overlay")
    check_target(file.parent, "the overlay", must_be_new=False)
