"""Weight methods: a smaller or sparser copy of the model, made once, that can be saved and loaded again.

``WeightMethod.apply`` copies the model over shared storage, lets ``transform`` change the copy, describes the result to
transformers, and reports. Which base a method takes depends on what it decides:

- ``WeightPruner`` (here): which heads and channels of every layer stay, from statistics of one calibration pass;
- ``GroupPruner`` (``group_pruning``): the same, from scores of all weights that leave together;
- ``LayerRemover`` (``layer_removal``): which layers leave, or which attention and feed-forward parts of them;
- ``WeightSparsifier`` (``weight_sparsity``): which weights become zero, layer by layer, shapes unchanged;
- ``LayerBudget`` (``layer_budget``): other methods that go layer by layer and can be given a sparsity for each (OWL);
- ``WeightMethod`` itself: anything else, such as methods that need gradients, a search, or another width of the
  residual stream. They implement ``transform``.
"""

from __future__ import annotations

import hashlib
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from zoo.engines.statistics import Progress, Watch, stream
from zoo.engines.surgery import LayerCut, cut_layers, share_parameters
from zoo.errors import BadInput, Refused
from zoo.interface import Applied, Method, Phase, refuse
from zoo.models import LoadedModel
from zoo.models.anatomy import Decoder, DecoderLayer
from zoo.models.pruned import check_prunable, refit, save_pruned
from zoo.report import Bar, Report

SAMPLES, LENGTH = 128, 128
"""Default calibration: windows and tokens per window."""

Facts = dict[str, float | int | str]


class AppliedPruning(Applied):
    """A smaller model. ``loaded`` holds it; the caller's own is untouched (unless pruned ``inplace``)."""

    def __init__(self, method: Method, loaded: LoadedModel, report: Report) -> None:
        super().__init__(method, loaded)
        self._report = report

    @property
    def report(self) -> Report:
        """What left, per layer."""
        return self._report

    def save(self, folder: str | Path) -> Path:
        """Write a model that loads again in a new process; see ``zoo.models.pruned.save_pruned``.

        Raises:
            BadInput: the folder holds something already.
            RunFailed: it could not be written; nothing is left behind.
        """
        record = {
            "method": self.method.slug,
            "parameters": self.method.parameters(),
            "base": {"ref": self.loaded.ref, "revision": self.loaded.revision},
            "report": self.report.model_dump(mode="json"),
        }
        return save_pruned(self.loaded, folder, record)


@dataclass
class Work:
    """What ``transform`` works on and with.

    Attributes:
        loaded: the copy to change. Its parameters share storage with the caller's model: put new ones in their place
            (``zoo.engines.surgery``), never write into them.
        seed: of everything random (see ``generator``).
        device: where layers run, one at a time, during a streamed pass; ``None`` for where the model is.
        progress: called with finished and total steps, if given (see ``step``).
    """

    loaded: LoadedModel
    seed: int
    device: torch.device | str | None
    progress: Progress | None
    _make_windows: Callable[[], torch.Tensor] = field(repr=False)

    @property
    def model(self) -> Any:
        """The transformers model to change."""
        return self.loaded.model

    @property
    def decoder(self) -> Decoder:
        """Parts of its decoder as they are now: ask again after surgery."""
        return _decoder_of(self.loaded)

    @cached_property
    def windows(self) -> torch.Tensor:
        """Calibration ids ``[windows, tokens]``, on the CPU; made when first asked for."""
        return self._make_windows()

    @property
    def batch(self) -> int:
        """Windows per forward pass: about a thousand tokens keep the processor busy and the activations small."""
        return batch_of(self.windows)

    def generator(self) -> torch.Generator:
        """A new source of random numbers, on the CPU, seeded."""
        return torch.Generator().manual_seed(self.seed)

    def observe(
        self,
        observe: Callable[[DecoderLayer], Mapping[str, Watch]],
        prune: Callable[[int, Mapping[str, Any]], None] | None = None,
    ) -> list[dict[str, Any]]:
        """One streamed pass over the windows; see ``zoo.engines.statistics.stream``."""
        return stream(
            self.decoder,
            self.windows,
            observe,
            batch=self.batch,
            device=self.device,
            prune=prune,
            progress=self.progress,
        )

    def step(self, done: int, total: int) -> None:
        """Report progress of a method's own loop."""
        if self.progress is not None:
            self.progress(done, total)


class WeightMethod(Method):
    """Base of all methods that change weights for good.

    The canonical budget is the fraction removed of the weights of all linear layers in the decoder (embeddings, norms,
    biases and LM head not counted). A paper's own figure is a fact of the report.
    """

    phase: ClassVar[Phase] = "weights"
    least_sequences: ClassVar[int] = 1
    """Calibration windows below which the statistics of the method mean nothing."""
    unit: ClassVar[str] = "decoder parameters"
    """What the report counts."""

    @property
    def removes_nothing(self) -> bool:
        """True when the budget is zero: no calibration, no change, the same bits."""
        return False

    @abstractmethod
    def transform(self, work: Work) -> Facts:
        """Change ``work.model``; return the paper's own figures for the report.

        Calibration ids are ``work.windows``, the parts of the model ``work.decoder``. Whatever was replaced must leave
        a model that runs; configuration and class are brought in line afterwards.

        Raises:
            BadInput, RunFailed: one sentence; the caller's model is as it was.
        """

    def remaining(self, decoder: Decoder) -> int:
        """What the report counts, in ``decoder``: the weights of its linear layers."""
        return decoder.prunable_parameters()

    def widths(self, layer: DecoderLayer) -> dict[str, int]:
        """Bars of the report for one layer, by name of their group."""
        return {"attention heads": layer.attention.heads, "FFN channels": layer.mlp.width}

    def check(self, loaded: LoadedModel) -> None:
        """A decoder LLM of a known architecture, alone or in a VLM, with ordinary floating-point linear layers.

        Raises:
            Refused: it is something else.
        """
        anatomy = loaded.anatomy
        if anatomy.decoder is None:
            raise refuse(self, "a decoder LLM, alone or in a vision-language model", anatomy.description)
        for layer in anatomy.decoder.layers:
            for part in layer.places:
                if (
                    type(getattr(part.owner, part.name)) is not nn.Linear
                    or not part.weight.is_floating_point()
                ):
                    raise Refused(
                        f"{self.slug} needs floating-point weights; '{part.name}' of this model is quantised or "
                        "wrapped: load it unquantised, and merge adapters first"
                    )
        check_prunable(loaded.model)

    def apply(
        self,
        loaded: LoadedModel,
        *,
        calibration: Sequence[str] | torch.Tensor | None = None,
        samples: int = SAMPLES,
        length: int = LENGTH,
        seed: int = 0,
        device: torch.device | str | None = None,
        inplace: bool = False,
        progress: Progress | None = None,
        **_: Any,
    ) -> AppliedPruning:
        """Make the smaller model.

        Args:
            loaded: the dense model; it keeps every bit unless ``inplace``.
            calibration: texts, or token ids ``[windows, tokens]``; ``None`` takes the packaged news texts.
            samples: windows to cut from texts.
            length: tokens per window.
            seed: which windows, and everything else that is random.
            device: where layers run during calibration, one at a time; ``None`` for where the model is.
            inplace: change the caller's own model instead of a copy. Saves the weights that leave; cannot be undone,
                and a method that works layer by layer leaves a model half done when it fails.
            progress: called with finished and total steps.

        Resources meant for the other methods of a stack are passed over.

        Raises:
            Refused: the model is not one that the method can work on.
            BadInput: the calibration data do not suffice, or texts are given and the model has no tokenizer.
            RunFailed: NaN or infinite activations.
        """
        self.check(loaded)
        start = time.perf_counter()
        model = loaded.model if inplace else share_parameters(loaded.model)
        changed = LoadedModel(model, loaded.processor, loaded.ref, loaded.revision, dict(loaded.facts))
        work = Work(
            changed,
            seed,
            device,
            progress,
            lambda: self._windows(loaded, calibration, samples, length, seed),
        )
        before = _decoder_of(changed)
        total, widths = self.remaining(before), [self.widths(layer) for layer in before.layers]
        facts: Facts = {}
        if not self.removes_nothing:
            facts |= self.transform(work)
            refit(model)
            if "windows" in vars(work):
                facts["calibration windows"], facts["tokens per window"] = work.windows.shape
                facts["windows sha256"] = _digest(work.windows)
                facts["seed"] = seed
        facts["pruning seconds"] = round(time.perf_counter() - start, 3)
        after = _decoder_of(changed)
        left = {layer.module: self.widths(layer) for layer in after.layers}
        bars = {
            name: [
                Bar(label=str(index), kept=left.get(layer.module, {}).get(name, 0), total=own[name])
                for index, (layer, own) in enumerate(zip(before.layers, widths, strict=True))
            ]
            for name in widths[0]
        }
        report = Report(
            method=self.slug,
            parameters=self.parameters(),
            unit=self.unit,
            kept=self.remaining(after),
            total=total,
            bars=bars,
            facts=facts,
        )
        return AppliedPruning(self, changed, report)

    def _windows(
        self,
        loaded: LoadedModel,
        calibration: Sequence[str] | torch.Tensor | None,
        samples: int,
        length: int,
        seed: int,
    ) -> torch.Tensor:
        """Calibration ids ``[windows, tokens]``."""
        if isinstance(calibration, torch.Tensor):
            windows = calibration
        else:
            if loaded.tokenizer is None:
                raise BadInput(
                    f"{loaded.ref} has no tokenizer, so {self.slug} cannot read calibration text; give token ids "
                    "[windows, tokens] instead"
                )
            from zoo.data import calibration_windows, load_texts

            texts = list(calibration) if calibration is not None else load_texts("news", split="calibration")
            windows = calibration_windows(loaded.tokenizer, texts, samples, length, seed)
        if windows.dim() != 2 or windows.shape[0] < self.least_sequences or windows.shape[1] < 1:
            raise BadInput(
                f"{self.slug} needs at least {self.least_sequences} calibration windows [windows, tokens]; "
                f"given: {list(windows.shape)}. Use more text or shorter windows"
            )
        return windows


class WeightPruner(WeightMethod):
    """Base of methods that remove heads, channels or both, from the statistics of one calibration pass."""

    sparsity: float = Field(0.2, ge=0, lt=1, description="Fraction of decoder-layer weights to remove.")

    @property
    def removes_nothing(self) -> bool:
        """True when the budget is zero."""
        return self.sparsity == 0

    def check(self, loaded: LoadedModel) -> None:
        """As all weight methods; and every layer still has attention and a feed-forward block.

        Raises:
            Refused: it is something else.
        """
        super().check(loaded)
        for layer in _decoder_of(loaded).layers:
            if not layer.attention.heads or not layer.mlp.width:
                raise refuse(self, "attention and a feed-forward block in every layer", "lost some of them")

    @abstractmethod
    def observe(self, layer: DecoderLayer) -> Mapping[str, Watch]:
        """What to accumulate over the calibration data in one layer."""

    @abstractmethod
    def decide(self, decoder: Decoder, seen: Sequence[Mapping[str, Any]]) -> list[LayerCut]:
        """What stays of each layer, given each layer's observers by name."""

    def facts(self, decoder: Decoder, cuts: Sequence[LayerCut]) -> Facts:
        """The paper's own figures; ``decoder`` is the dense one."""
        return {}

    def transform(self, work: Work) -> Facts:
        """Observe, decide, cut."""
        seen = work.observe(self.observe)
        decoder = work.decoder
        with torch.no_grad():
            cuts = self.decide(decoder, seen)
        facts = self.facts(decoder, cuts)
        cut_layers(decoder, cuts)
        return facts


def _digest(windows: torch.Tensor) -> str:
    """Tells calibration windows apart: the first 16 digits of the SHA-256 of their ids."""
    return hashlib.sha256(windows.long().cpu().numpy().tobytes()).hexdigest()[:16]


def batch_of(windows: torch.Tensor) -> int:
    """Windows ``[windows, tokens]`` per forward pass: about a thousand tokens."""
    return max(1, 1024 // windows.shape[1])


def _decoder_of(loaded: LoadedModel) -> Decoder:
    decoder = loaded.anatomy.decoder or loaded.anatomy.text_encoder
    assert decoder is not None
    return decoder
