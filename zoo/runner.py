"""The main job: one method, or a stack, on one model, measured beside the unmodified model.

``run`` is what ``zoo run`` calls::

    record = zoo.run("flap", "smollm2-135m", parameters={"sparsity": 0.3})
    for row in record.comparisons:
        print(row.quantity, row.gain, row.bound)

What can be refused without loading the model is refused first: unknown methods, wrong parameters, missing files,
targets that cannot be written.
"""

from __future__ import annotations

import json
import shlex
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, Literal

from zoo.bench.record import PROTOCOL, ModelFacts, RunRecord
from zoo.bench.settings import Settings
from zoo.errors import BadInput, BadParameter, Refused, RunFailed
from zoo.interface import Method, Stack
from zoo.interface import method as make_method
from zoo.scenes import QUESTION, Scene, check_files, load_scene, scene_inputs, wanted_by

if TYPE_CHECKING:
    import torch

    from zoo.bench.scenarios.decoding import Watch
    from zoo.bench.session import Arm, Progress, Session
    from zoo.bench.tasks import Kept, Task
    from zoo.interface import Applied
    from zoo.models import LoadedModel

Kind = Literal["text", "vlm", "image", "embedding", "diffusion"]

DEFAULT_MODELS: dict[Kind, str] = {
    "text": "smollm2-135m",
    "image": "dinov2-small-saliency",
    "vlm": "small-llava",
    "diffusion": "tiny-diffusion",
}
"""What a method runs on when no model is named. No registry carries a pretrained VLM or diffusion model, hence random
ones."""

PROMPT = "Explain in a few sentences why the sky is blue during the day and red at sunset."
PICTURE_PROMPT = "a cat and a frog on a bench"
PASSAGES = 8
"""Texts in the batch on which a method inside a text encoder is timed."""
CALIBRATION_WINDOWS = 32
CALIBRATION_LENGTH = 128

_KINDS: dict[str, Kind] = {
    "decoder": "text",
    "encoder": "image",
    "vlm": "vlm",
    "embedding": "embedding",
    "diffusion": "diffusion",
}


_DOES: dict[Kind, str] = {
    "text": "writes",
    "vlm": "writes",
    "image": "sees",
    "embedding": "embeds",
    "diffusion": "draws",
}


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C during a run; ``record`` holds what was finished, and is stored already."""

    def __init__(self, record: RunRecord) -> None:
        super().__init__()
        self.record = record


@dataclass(frozen=True)
class Request:
    """Everything that is asked of a run besides method and model.

    Attributes:
        parameters: the method's hyper-parameters, as given.
        prompt: text for generation; ``None`` = a default of the family.
        raw: feed the prompt as it is, without the model's chat template.
        images: picture files, or names of packaged pictures.
        video: a video file, or a folder of frames, for vision-language models.
        frames: how many frames are taken of it.
        calibration: text for weight methods, as for ``load_texts``: a file, or ``hub:owner/name`` for a dataset;
            ``None`` = packaged news.
        calibration_windows: windows of ``CALIBRATION_LENGTH`` tokens drawn from it.
        draft: draft model of decoders that need one: a reference, or ``METHOD:name=value,...`` for a copy of the target
            pruned with that weight method.
        device, dtype: as in ``load_model``; ``None`` = its defaults.
        seed: of calibration windows and of everything random.
        save: folder for the pruned model; must not exist, or be empty.
        report: folder for ``report.html`` and ``record.json``; for token methods also ``overlay.png``.
        overlay: PNG file for a picture of the tokens that stay.
        task: what both sides are asked; ``None`` = what suits the family: speed, memory and quality, side by side.
        store: keep the record in the user's catalogue.
    """

    parameters: Mapping[str, Any] = field(default_factory=dict)
    prompt: str | None = None
    raw: bool = False
    images: Sequence[str] = ()
    video: Path | None = None
    frames: int | None = None
    calibration: str | Path | None = None
    calibration_windows: int = CALIBRATION_WINDOWS
    draft: str | None = None
    device: str | None = None
    dtype: str | None = None
    seed: int = 0
    save: Path | None = None
    report: Path | None = None
    overlay: Path | None = None
    task: Task | None = None
    store: bool = True


def run(
    spec: str | Method | Stack,
    model: str | LoadedModel | None = None,
    request: Request | None = None,
    *,
    settings: Settings | None = None,
    progress: Progress | None = None,
    watch: Watch | None = None,
    kept: Kept | None = None,
    **more: Any,
) -> RunRecord:
    """Apply a method to a model and measure both side by side.

    Args:
        spec: a method, a slug, or slugs joined by ``+``.
        model: reference or loaded model; ``None`` = the default of the method's family.
        request: prompt, pictures, calibration, seed, targets ...
        settings: how much to measure.
        progress: called as the work goes on.
        watch: follows one generation of a decoding method, see ``zoo.live.LiveText.follow``.
        kept: what an earlier run on the same ``model`` object left for this one, see ``zoo.bench.tasks.Kept``.
        more: fields of ``Request`` by name, as ``parameters={"sparsity": 0.3}``.

    Returns:
        The record. It is stored in the user's catalogue unless ``store=False``.

    Raises:
        BadInput: (and its kinds) what is asked for cannot be; nothing has been done.
        RunFailed: the work itself failed.
        RunInterrupted: Ctrl-C; carries the record of what was finished.
    """
    if request is None:
        request = Request(**more)
    elif more:
        raise TypeError("give either a Request or its fields, not both")
    method = make_method(spec, **request.parameters) if isinstance(spec, str) else spec
    methods = method.methods if isinstance(method, Stack) else [method]
    if model is None:
        model = next((method.default_model for method in methods if method.default_model), None)
    kind = kind_of(methods, model)
    _check_request(request, methods, kind)

    # Torch is imported from here on: the refusals above are instant.
    from zoo.bench.session import Session

    job = _Job(method, methods, kind, request, settings or Settings(), progress or (lambda *_: None))
    job.watch, job.kept = watch, kept
    loaded = job.load(model)
    session = Session(job.record, job.settings, loaded.device, job.progress)
    begun = time.perf_counter()
    try:
        job.measure(session, loaded)
    except KeyboardInterrupt:
        job.record.status = "interrupted"
        job.finish(begun)
        raise RunInterrupted(job.record) from None
    except BadInput:
        raise
    except Exception as error:
        failure = _in_one_line(error)
        job.record.status, job.record.error = "failed", str(failure)
        job.finish(begun)
        if failure is error:
            raise
        raise failure from None
    job.finish(begun)
    return job.record


def _in_one_line(error: Exception) -> Exception:
    """What a full machine says, as a sentence; anything else is a bug and stays what it is."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return RunFailed(
            "the machine ran out of memory; use a smaller model, --dtype bfloat16 or shorter inputs"
        )
    return error


def kind_of(methods: Sequence[Method], model: str | LoadedModel | None, who: str = "") -> Kind:
    """What the methods act on. A short name of another kind of model is refused before it is loaded.

    Args:
        methods: at least one.
        model: reference or loaded model; ``None`` = the default.
        who: subject of the refusal; by default the methods' names.
    """
    phases = {method.phase for method in methods}
    if "visual-tokens" in phases:
        kind: Kind = "vlm"
    elif "encoder-tokens" in phases:
        kind = "image"
    elif "diffusion" in phases:
        kind = "diffusion"
    else:
        kind = "text"
    if isinstance(model, str):
        from zoo.models.names import KNOWN

        known = KNOWN.get(model)
        given = None if known is None else _KINDS[known.kind]
    else:
        given = None if model is None else _KINDS[model.anatomy.kind]
    if given in (None, kind):
        return kind
    if given == "vlm" and (kind == "image" or "decoding" in phases):
        return "vlm"
    if given == "embedding" and phases in ({"weights"}, {"cache"}):
        return "embedding"
    names = who or "+".join(method.slug for method in methods)
    wants = {
        "text": "a language model",
        "image": "a vision encoder",
        "vlm": "a vision-language model",
        "embedding": "an embedding model",
        "diffusion": "a text-to-image model",
    }
    ref = model if isinstance(model, str) else getattr(model, "ref", "this model")
    raise Refused(
        f"{names} works on {wants[kind]}, and {ref} is {wants[given]}; zoo models lists models of each kind"
    )


def _check_request(request: Request, methods: Sequence[Method], kind: Kind) -> None:
    """Refuse, before any work, what does not fit the method, and files that are not there or cannot be written."""
    names = "+".join(method.slug for method in methods)
    prunes = any(method.phase == "weights" for method in methods)
    drafts = [method for method in methods if method.phase == "decoding"]
    if request.images and kind in ("text", "embedding", "diffusion"):
        raise BadInput(f"{names} works on text; leave out the image")
    if kind != "vlm" and (request.video is not None or request.frames is not None):
        raise BadInput(f"{names} works on {'pictures' if kind == 'image' else 'text'}; leave out the video")
    check_files(request.images, request.video)
    if drafts and any(method.phase == "cache" for method in methods):
        raise BadInput(f"{names}: drafts are taken back out of the cache, which one of them cuts; take one")
    if request.prompt is not None and kind == "image":
        raise BadInput(f"{names} works on images; leave out the prompt")
    if request.prompt is not None and kind == "embedding":
        raise BadInput(f"{names} generates nothing with an embedding model; leave out the prompt")
    if request.prompt is not None and not request.prompt.strip():
        raise BadInput("the prompt is empty; give some text")
    for method in drafts:
        if request.draft is None and getattr(method, "draft_model", "") is None:
            raise BadInput(
                f"{method.slug} needs a draft model with the target's tokenizer: give --draft MODEL, or --draft "
                "flap:sparsity=0.3 for a pruned copy of the target"
            )
        if getattr(method, "heads", "") is None:
            raise BadInput(
                f"{method.slug} needs heads trained for this very model: run zoo train {method.slug} --model MODEL "
                f"--output DIR, then zoo run {method.slug} --heads DIR"
            )
    if request.calibration is not None and not prunes:
        raise BadInput(f"{names} needs no calibration text; leave it out")
    if request.save is not None and not prunes:
        raise BadInput(f"{names} changes how a model runs, not its weights: there is nothing to save")
    if request.draft is not None and not drafts:
        raise BadInput(f"{names} drafts nothing; leave out the draft model")
    text = request.calibration
    if text is not None and not str(text).startswith("hub:") and not Path(text).expanduser().is_file():
        raise BadInput(f"there is no calibration file {text}; give a file, or hub:OWNER/NAME for a dataset")
    if request.calibration_windows < 1:
        raise BadInput("at least one calibration window is needed")
    for place, what in ((request.save, "the pruned model"), (request.report, "the report")):
        if place is not None:
            check_target(place, what, must_be_new=what == "the pruned model")
    if request.overlay is not None:
        if all(method.phase not in _DRAWN for method in methods):
            raise BadInput(f"{names} chooses no visual tokens, so there is no overlay to draw")
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


_DRAWN = {"visual-tokens", "encoder-tokens"}
"""Phases of methods whose effect on a picture can be drawn."""


class _Job:
    """One run, from loading to the stored record."""

    def __init__(
        self,
        method: Method | Stack,
        methods: list[Method],
        kind: Kind,
        request: Request,
        settings: Settings,
        progress: Progress,
    ) -> None:
        self.method = method
        self.methods = methods
        self.kind = kind
        self.request = request
        self.settings = settings
        self.progress = progress
        self.record: RunRecord
        self.draft: LoadedModel | None = None
        self.watch: Watch | None = None
        self.kept: Kept | None = None
        self.overlay: Path | None = None

    @property
    def phases(self) -> set[str]:
        return {method.phase for method in self.methods}

    # --- loading ----------------------------------------------------------------------------------------------

    def load(self, model: str | LoadedModel | None) -> LoadedModel:
        """Load the model (and the draft model), let the methods look at it, and begin the record."""
        from zoo.bench.environment import environment
        from zoo.models.loading import load_model

        request = self.request
        if model is None:
            model = DEFAULT_MODELS[self.kind]
        if isinstance(model, str):
            self.progress(f"loading {model}", 0, 0)
            model = load_model(model, device=request.device, dtype=request.dtype)
        self.method.check(model)
        pruned = self._draft_pruner()
        if request.draft is not None and pruned is None:
            self.progress(f"loading {request.draft}", 0, 0)
            self.draft = load_model(request.draft, device=str(model.device), dtype=model.dtype)
        config = model.model.config
        device = str(model.device)
        self.record = RunRecord(
            key=uuid.uuid4().hex,
            protocol=PROTOCOL,
            method=self.method.name,
            parameters=self.method.parameters(),
            model=ModelFacts(
                ref=model.ref,
                revision=model.revision,
                architecture=config.model_type,
                facts={name: value for name, value in model.facts.items() if _is_json(value)},
            ),
            started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            device=device,
            dtype=str(model.dtype).removeprefix("torch."),
            seed=request.seed,
            environment=environment(device, getattr(config, "_attn_implementation", None)),
            command=command_line(self.method.name, model.ref, request, self.settings),
        )
        caveat = model.facts.get("caveat")
        if caveat:
            self.record.notes.append(str(caveat))
        return model

    # --- measuring --------------------------------------------------------------------------------------------

    def measure(self, session: Session, loaded: LoadedModel) -> None:
        """Apply and measure, scenario by scenario."""
        import torch

        from zoo.bench.session import Arm
        from zoo.models.quiet import quiet_transformers

        cuda = [loaded.device] if loaded.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), quiet_transformers():
            torch.manual_seed(self.request.seed)
            if self.request.task is not None:
                self._ask(session, loaded, self.request.task)
                return
            text = self._text_inputs(loaded) if self.kind in ("text", "vlm") else None
            pixels = self._pixels(loaded) if self.kind == "image" else None
            self._prune_draft(loaded)
            own = loaded
            if "weights" in self.phases:
                own = self._prune(session, loaded, text)
            rest = [method for method in self.methods if method.phase != "weights"]
            if not rest:
                return
            dense = Arm(loaded)
            arm = Arm(own, rest, {method.slug: self._resources(method) for method in rest})
            if self.kind == "diffusion":
                self._measure_diffusion(session, dense, arm)
                return
            if pixels is not None:
                from zoo.bench.scenarios import measure_encoder_tokens

                self._note_random_weights(session, loaded)
                measure_encoder_tokens(session, dense, arm, pixels)
                if self.request.overlay or self.request.report:
                    self._draw_patches(session, arm, pixels)
                return
            if self.kind == "embedding":
                from zoo.bench.scenarios import measure_embedding_tokens

                passages, _ = self._passages(loaded)
                passages = passages[:PASSAGES]
                task = f"news, {len(passages)} items, {passages.shape[1]} tokens of each"
                measure_embedding_tokens(session, dense, arm, passages, task)
                return
            assert text is not None
            if "cache" in self.phases:
                from zoo.bench.scenarios import measure_text_tokens

                random = self._note_random_weights(session, loaded)
                measure_text_tokens(session, dense, arm, self._prompt, text, random=random)
            if self.phases & {"visual-tokens", "encoder-tokens"}:
                self._measure_visual(session, dense, arm, text)
            if "decoding" in self.phases:
                from zoo.bench.scenarios import measure_decoding

                measure_decoding(
                    session, dense, arm, self._prompt, text,
                    same_weights=self.phases == {"decoding"}, watch=self.watch,
                )  # fmt: skip

    def _note_random_weights(self, session: Session, loaded: LoadedModel) -> bool:
        """Whether the weights are random, which is then said beside the figures."""
        from zoo.models.names import KNOWN

        known = KNOWN.get(loaded.ref)
        random = known is not None and known.random
        if random:
            session.note(
                f"The weights of {loaded.ref} are random: selection, lengths, memory and time are real, "
                f"what it {_DOES[self.kind]} means nothing."
            )
        return random

    def _measure_diffusion(self, session: Session, dense: Arm, arm: Arm) -> None:
        from zoo.bench.scenarios import measure_diffusion

        prompt = self.record.inputs["prompt"] = self.request.prompt or PICTURE_PROMPT
        self._note_random_weights(session, dense.loaded)
        measure_diffusion(session, dense, arm, prompt, self.request.seed)

    def _ask(self, session: Session, loaded: LoadedModel, task: Task) -> None:
        """Put the task to the dense model and to the method."""
        from zoo.bench.session import Arm
        from zoo.bench.tasks import Desk

        self.record.inputs["task"] = {"name": task.name, **task.model_dump(mode="json")}
        self._prune_draft(loaded)
        own = self._pruned(loaded).loaded if "weights" in self.phases else loaded
        rest = [method for method in self.methods if method.phase != "weights"]
        arm = Arm(own, rest, {method.slug: self._resources(method) for method in rest})
        desk = Desk(self.request.seed, self.progress, self.kept)
        for row in task.run(Arm(loaded), arm, desk):
            self.record.comparisons.append(row)
        self.record.reports += arm.reports

    def _measure_visual(self, session: Session, dense: Arm, arm: Arm, inputs: Mapping[str, Any]) -> None:
        from zoo.bench.scenarios import measure_visual_tokens

        random = self._note_random_weights(session, dense.loaded)
        measure_visual_tokens(session, dense, arm, self._prompt, inputs, random=random)
        if self.phases & _DRAWN and (self.request.overlay or self.request.report):
            self._draw_overlay(session, arm, inputs)

    def _draw_overlay(self, session: Session, arm: Arm, inputs: Mapping[str, Any]) -> None:
        """Draw what stays, in one more forward pass: watching must not slow what is measured."""
        from zoo.families.visual_tokens import AppliedTokens
        from zoo.overlays import draw, record

        session.progress("drawing the visual tokens", 0, 0)
        with arm.ready() as applied:
            chooses = any(isinstance(layer, AppliedTokens) for layer in applied.layers)
            trace = record(applied, **inputs)[0] if chooses else None
        if trace is None or not trace.steps:
            session.note("Every visual token stays, so there is no overlay to draw.")
            return
        self._save_overlay(draw(trace, f"{self.record.method} on {self.record.model.ref}"))

    def _draw_patches(self, session: Session, arm: Arm, pixels: Mapping[str, Any]) -> None:
        """Draw what the tokens of the first picture hold, in one more forward pass."""
        from zoo.patch_pictures import draw_patches, record_patches

        session.progress("drawing the patches", 0, 0)
        with arm.ready() as applied:
            first = record_patches(applied, **pixels)[0]
        self._save_overlay(draw_patches(first, f"{self.record.method} on {self.record.model.ref}"))

    def _save_overlay(self, picture: Any) -> None:
        from zoo.overlays import save_picture

        request = self.request
        files = [request.overlay, None if request.report is None else request.report / "overlay.png"]
        saved = [save_picture(picture, file) for file in files if file is not None]
        self.overlay = saved[0]
        self.record.inputs["overlay"] = str(self.overlay)

    def _resources(self, method: Method) -> dict[str, Any]:
        if method.phase == "decoding" and self.draft is not None:
            return {"draft": self.draft}
        return {}

    def _draft_pruner(self) -> Method | None:
        """The weight method that makes the draft model out of the target, when that is what ``draft`` asks for."""
        from zoo.interface import implemented

        slug, _, settings = (self.request.draft or "").partition(":")
        if slug not in implemented() or Path(slug).is_dir():
            return None
        values = parse_assignments([part for part in settings.split(",") if part])
        pruner = make_method(slug, **values)
        if isinstance(pruner, Stack) or pruner.phase != "weights":
            raise BadInput(f"a draft model is made by a weight method; {slug} prunes no weights")
        return pruner

    def _prune_draft(self, loaded: LoadedModel) -> None:
        """Make the draft model, when it is a pruned copy of the target."""
        pruner = self._draft_pruner()
        if pruner is None:
            return
        what = f"pruning a draft model with {pruner.slug}"
        self.progress(what, 0, 0)
        applied = pruner.apply(
            loaded,
            samples=self.request.calibration_windows,
            length=min(CALIBRATION_LENGTH, _context(loaded)),
            seed=self.request.seed,
            progress=lambda done, total: self.progress(what, done, total),
        )
        self.draft = applied.loaded

    def _prune(self, session: Session, loaded: LoadedModel, text: Mapping[str, Any] | None) -> LoadedModel:
        """Prune, save when asked, measure; returns the pruned model."""
        from zoo.bench.scenarios import measure_embedding_weights, measure_weights

        heldout, task = self._passages(loaded) if self.kind == "embedding" else self._heldout(loaded)
        self.record.inputs["held-out text"] = task
        applied = self._pruned(loaded)
        if text is None:
            measure_embedding_weights(session, loaded, applied.loaded, heldout, task)
        else:
            measure_weights(session, loaded, applied.loaded, heldout, task, self._prompt, text)
        return applied.loaded

    def _pruned(self, loaded: LoadedModel) -> Applied:
        """Prune, report, and save when asked; what the last run on this model made is taken again when it is equal."""
        from zoo.data import digest, load_texts

        request = self.request
        if request.calibration is None:
            name, calibration = "news, calibration split", load_texts("news", split="calibration")
        else:
            name, calibration = str(request.calibration), load_texts(request.calibration)
        length = min(CALIBRATION_LENGTH, _context(loaded))
        self.record.inputs |= {
            "calibration": name,
            "calibration sha256": digest(calibration),
            "calibration windows": [request.calibration_windows, length],
        }
        pruner = next(method for method in self.methods if method.phase == "weights")
        what = f"pruning with {pruner.slug}"

        def prune() -> Applied:
            self.progress(what, 0, 0)
            return pruner.apply(
                loaded,
                calibration=calibration,
                samples=request.calibration_windows,
                length=length,
                seed=request.seed,
                progress=lambda done, total: self.progress(what, done, total),
            )

        if self.kept is None:
            applied = prune()
        else:
            asked = [self.record.inputs["calibration sha256"], self.record.inputs["calibration windows"]]
            key = json.dumps([pruner.slug, pruner.parameters(), *asked, request.seed], sort_keys=True)
            applied = self.kept.once("pruned model", key, prune)
        self.record.reports.append(applied.report)
        if request.save is not None:
            self.progress(f"saving to {request.save}", 0, 0)
            self.record.saved = str(applied.save(request.save))
        return applied

    # --- inputs -----------------------------------------------------------------------------------------------

    @property
    def _prompt(self) -> str:
        return str(self.record.inputs["prompt"])

    def _heldout(self, loaded: LoadedModel) -> tuple[torch.Tensor, str]:
        """Consecutive windows of the packaged held-out news: ids ``[windows, T]`` and their description."""
        import torch

        from zoo.data import load_texts

        if loaded.tokenizer is None:
            raise BadInput(f"{loaded.ref} has no tokenizer, so there is no text to measure it on")
        text = "\n\n".join(load_texts("news", split="heldout"))
        ids = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        length = min(self.settings.window, _context(loaded))
        count = min(self.settings.windows, len(ids) // length)
        if count < 1:
            raise BadInput(f"the held-out text has {len(ids)} tokens, fewer than one window of {length}")
        return torch.tensor(ids[: count * length]).view(count, length), f"news, {count} x {length} tokens"

    def _passages(self, loaded: LoadedModel) -> tuple[torch.Tensor, str]:
        """Beginnings of packaged held-out news items, at least half of all: ids ``[items, T]``, description."""
        import torch

        from zoo.data import load_texts

        if loaded.tokenizer is None:
            raise BadInput(f"{loaded.ref} has no tokenizer, so there is no text to measure it on")
        texts = load_texts("news", split="heldout")
        items = loaded.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        middle = sorted(len(item) for item in items)[len(items) // 2]
        length = min(CALIBRATION_LENGTH, _context(loaded) - 2, middle)
        ids = torch.tensor([item[:length] for item in items if len(item) >= length])
        return ids, f"news, {len(ids)} items, {length} tokens of each"

    def _text_inputs(self, loaded: LoadedModel) -> dict[str, Any]:
        """What ``generate`` takes for the prompt (and picture), on the model's device, batch 1."""
        from zoo.bench.scenarios.decoding import NEW_TOKENS

        request = self.request
        if self.kind == "vlm":
            prompt = request.prompt or QUESTION
            inputs: Mapping[str, Any] = scene_inputs(loaded, self._scene(), prompt, request.raw)
        else:
            if loaded.tokenizer is None:
                raise BadInput(f"{loaded.ref} has no tokenizer, so it cannot read a prompt")
            prompt = request.prompt or self._default_prompt()
            inputs = _tokens(loaded.tokenizer, prompt, request.raw)
        self.record.inputs["prompt"] = prompt
        room = _context(loaded) - (self.settings.new_tokens or NEW_TOKENS)
        length = inputs["input_ids"].shape[1]
        if length > room:
            raise BadInput(
                f"the prompt has {length} tokens, and {loaded.ref} has room for {max(0, room)} beside the answer; "
                "shorten it, or lower --max-new-tokens"
            )
        self.record.inputs["prompt tokens"] = length
        return on_device(loaded, inputs)

    def _default_prompt(self) -> str:
        if "decoding" in self.phases:
            from zoo.data import COPY_PROMPT

            return COPY_PROMPT
        return PROMPT

    def _scene(self) -> Scene:
        """The pictures or the video asked for, or what suits the methods."""
        request = self.request
        scene = load_scene(wanted_by(self.methods), request.images, request.video, request.frames)
        self.record.inputs["video" if scene.video else "images"] = list(scene.source)
        if scene.video:
            self.record.inputs["frames"] = len(scene.pictures)
        if scene.note:
            self.record.notes.append(scene.note)
        return scene

    def _pixels(self, loaded: LoadedModel) -> dict[str, Any]:
        if loaded.processor is None:
            raise BadInput(f"{loaded.ref} has no image processor, so it cannot read a picture")
        scene = load_scene("pictures", self.request.images)
        self.record.inputs["images"] = list(scene.source)
        values = loaded.processor(images=list(scene.pictures), return_tensors="pt")["pixel_values"]
        return {"pixel_values": values.to(loaded.device, loaded.dtype)}

    # --- the end ----------------------------------------------------------------------------------------------

    def finish(self, begun: float) -> None:
        """Complete the record, write the report, store the run. A catalogue that refuses costs no figures."""
        record, request = self.record, self.request
        record.seconds = round(time.perf_counter() - begun, 3)
        record.inputs["settings"] = vars(self.settings).copy()
        if request.store:
            from taxonomy.errors import TaxonomyError
            from taxonomy.runs import record_run

            try:
                record_run(stored_form(record))
            except TaxonomyError as error:
                record.notes.append(f"This run could not be stored in the catalogue: {error}")
        if request.report is not None:
            from zoo.html_report import write_report

            write_report(record, request.report, self.overlay)


def on_device(loaded: LoadedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """``inputs`` on the model's device, floating-point ones in its type."""
    return {
        name: value.to(loaded.device, loaded.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def stored_form(record: RunRecord) -> dict[str, Any]:
    """The record as ``taxonomy.runs.record_run`` takes it."""
    body = record.model_dump(mode="json")
    reports = body["reports"]
    report = reports[0] if len(reports) == 1 else {"reports": reports} if reports else {}
    outcomes = _outcomes(record)
    if outcomes:
        report = {**report, "outcomes": outcomes}
    return {
        **{
            name: body[name]
            for name in (
                "key", "method", "started", "seconds", "environment", "parameters",
                "inputs", "seed", "dtype", "device", "status", "error", "protocol",
            )
        },
        "model": record.model.ref,
        "model_revision": record.model.revision or "",
        "model_facts": {"architecture": record.model.architecture, **record.model.facts},
        "report": report or None,
        "measurements": list(record.measurements()),
    }  # fmt: skip


def _outcomes(record: RunRecord) -> dict[str, dict[str, str]]:
    """Right and wrong per question, by quantity and task, and by arm; what paired intervals are computed from."""
    found: dict[str, dict[str, str]] = {}
    for row in record.comparisons:
        for arm, figure in (("dense", row.dense), ("method", row.method)):
            if figure is not None and figure.items is not None:
                found.setdefault(f"{row.quantity}: {row.task}", {})[arm] = figure.items
    return found


def command_line(name: str, ref: str, request: Request, settings: Settings) -> str:
    """The shell command that repeats a run."""
    words = ["zoo", "run", name, "--model", ref]
    for key, value in request.parameters.items():
        words += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    flags: list[tuple[str, Any, Any]] = [
        ("--prompt", request.prompt, None),
        ("--calibration", request.calibration, None),
        ("--calibration-windows", request.calibration_windows, CALIBRATION_WINDOWS),
        ("--draft", request.draft, None),
        ("--device", request.device, None),
        ("--dtype", request.dtype, None),
        ("--seed", request.seed, 0),
        ("--video", request.video, None),
        ("--frames", request.frames, None),
        ("--max-new-tokens", settings.new_tokens, None),
        ("--repeats", settings.repeats, Settings().repeats),
        ("--seconds", settings.seconds, Settings().seconds),
        *(("--image", image, None) for image in request.images),
    ]
    for flag, value, default in flags:
        if value != default:
            words += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    if request.raw:
        words.append("--raw")
    return shlex.join(words)


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """``["sparsity=0.3", "layers=3,6,9"]`` -> ``{"sparsity": 0.3, "layers": [3, 6, 9]}``.

    Values are JSON where they can be (numbers, true, false, null, lists), comma-separated lists of such, else text;
    the method's own types have the last word.

    Raises:
        BadParameter: no ``=``, an empty name, or a name given twice.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name = name.strip().replace("-", "_") if "." not in name else name.strip()
        if not equals or not name:
            raise BadParameter(f"--set takes NAME=VALUE, as in --set sparsity=0.3; given: '{assignment}'")
        if name in values:
            raise BadParameter(f"--set {name} is given twice")
        values[name] = _value(text.strip())
    return values


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        pass
    if "," in text:
        return [_value(part.strip()) for part in text.split(",") if part.strip()]
    return text


def _tokens(tokenizer: Any, prompt: str, raw: bool) -> dict[str, Any]:
    """The prompt as ids and mask ``[1, T]``; in the model's chat template when it has one."""
    if getattr(tokenizer, "chat_template", None) and not raw:
        return dict(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
            )
        )
    found = tokenizer(prompt, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def _context(loaded: LoadedModel) -> int:
    """Positions the model has; a large number where it states none."""
    config = loaded.model.config.get_text_config(decoder=True)
    return int(getattr(config, "max_position_embeddings", None) or 1 << 20)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
