"""Weight methods: measure on calibration text, decide what leaves every layer, cut.

A method says what it wants to see of a layer (``observe``) and turns what was seen into one ``LayerCut`` per layer
(``decide``). The base class streams the calibration data, cuts a copy that shares all other parameters with the
caller's model, describes the result to transformers, and reports.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

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


class WeightPruner(Method):
    """Base of methods that remove heads, channels or both.

    ``sparsity`` is canonical: the fraction removed of the weights of all linear layers in the decoder (embeddings,
    norms and LM head not counted). A paper's own figure is a fact of the report.
    """

    phase: ClassVar[Phase] = "weights"
    least_sequences: ClassVar[int] = 1
    """Calibration windows below which the statistics of the method mean nothing."""

    sparsity: float = Field(0.2, ge=0, lt=1, description="Fraction of decoder-layer weights to remove.")

    @property
    def removes_nothing(self) -> bool:
        """True when the budget is zero: no calibration, no cut, the same bits."""
        return self.sparsity == 0

    @abstractmethod
    def observe(self, layer: DecoderLayer) -> Mapping[str, Watch]:
        """What to accumulate over the calibration data in one layer."""

    @abstractmethod
    def decide(self, decoder: Decoder, seen: Sequence[Mapping[str, Any]]) -> list[LayerCut]:
        """What stays of each layer, given each layer's observers by name."""

    def facts(self, decoder: Decoder, cuts: Sequence[LayerCut]) -> dict[str, float | int | str]:
        """The paper's own figures; ``decoder`` is the dense one."""
        return {}

    def check(self, loaded: LoadedModel) -> None:
        """A decoder LLM of a known architecture with ordinary floating-point linear layers.

        Raises:
            Refused: it is something else.
        """
        anatomy = loaded.anatomy
        if anatomy.kind != "decoder" or anatomy.decoder is None:
            raise refuse(self, "a decoder LLM", anatomy.description)
        for layer in anatomy.decoder.layers:
            for part in (layer.attention.output, layer.mlp.down):
                if (
                    not isinstance(getattr(part.owner, part.name), torch.nn.Linear)
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
        """Prune ``loaded``.

        Args:
            loaded: the dense model; it keeps every bit unless ``inplace``.
            calibration: texts, or token ids ``[windows, tokens]``; ``None`` takes the packaged news texts.
            samples: windows to cut from texts.
            length: tokens per window.
            seed: which windows.
            device: where layers run during calibration, one at a time; ``None`` for where the model is.
            inplace: cut the caller's own model instead of a copy. Saves the weights that leave; cannot be undone.
            progress: called with finished and total layers.

        Resources meant for the other methods of a stack are passed over.

        Raises:
            Refused: the model is not one that the method can prune.
            BadInput: the calibration data do not suffice, or texts are given and the model has no tokenizer.
            RunFailed: NaN or infinite activations.
        """
        self.check(loaded)
        start = time.perf_counter()
        model = loaded.model if inplace else share_parameters(loaded.model)
        pruned = LoadedModel(model, loaded.processor, loaded.ref, loaded.revision, dict(loaded.facts))
        decoder = pruned.anatomy.decoder
        assert decoder is not None
        total, widths = decoder.prunable_parameters(), _widths(decoder)
        facts: dict[str, float | int | str] = {}
        if not self.removes_nothing:
            windows = self._windows(loaded, calibration, samples, length, seed)
            seen = stream(
                decoder, windows, self.observe, batch=_batch(windows), device=device, progress=progress
            )
            with torch.no_grad():
                cuts = self.decide(decoder, seen)
            facts |= self.facts(decoder, cuts)
            cut_layers(decoder, cuts)
            refit(model)
            facts |= {
                "calibration windows": windows.shape[0],
                "tokens per window": windows.shape[1],
                "seed": seed,
            }
        facts["pruning seconds"] = round(time.perf_counter() - start, 3)
        decoder = pruned.anatomy.decoder
        assert decoder is not None
        bars = {
            name: [
                Bar(label=str(index), kept=after, total=before)
                for index, (before, after) in enumerate(zip(widths[name], left, strict=True))
            ]
            for name, left in _widths(decoder).items()
        }
        report = Report(
            method=self.slug,
            parameters=self.parameters(),
            unit="decoder parameters",
            kept=decoder.prunable_parameters(),
            total=total,
            bars=bars,
            facts=facts,
        )
        return AppliedPruning(self, pruned, report)

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


def _batch(windows: torch.Tensor) -> int:
    """Sequences per step: about a thousand tokens keep the processor busy and the activations small."""
    return max(1, 1024 // windows.shape[1])


def _widths(decoder: Decoder) -> dict[str, list[int]]:
    return {
        "attention heads": [layer.attention.heads for layer in decoder.layers],
        "FFN channels": [layer.mlp.width for layer in decoder.layers],
    }
