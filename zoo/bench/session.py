"""What the scenarios share: the arms that are compared, the settings, and a record that grows as figures come in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from zoo.bench.memory import peak_bytes
from zoo.bench.quality import common_prefix
from zoo.bench.record import Comparison, Figure, Outputs, RunRecord, compare
from zoo.bench.settings import Settings
from zoo.bench.timing import Samples, TimingInterrupted, Version, alternate
from zoo.errors import BadInput
from zoo.interface import Applied, AppliedStack, Method, Stack
from zoo.models import LoadedModel
from zoo.report import Report

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how many of how many steps of it are finished (0 of 0 = unknown)."""


@dataclass
class Arm:
    """One side of the comparison: a model, and methods that are put to work only while this side runs.

    Attributes:
        loaded: the dense model, or the pruned one.
        methods: reversible methods, in the order of application; none for the dense side.
        resources: what their ``apply`` takes, by slug.
        reports: what the methods said of their latest input, once one has run.
    """

    loaded: LoadedModel
    methods: list[Method] = field(default_factory=list)
    resources: dict[str, dict[str, Any]] = field(default_factory=dict)
    reports: list[Report] = field(default_factory=list, init=False)

    @contextmanager
    def ready(self) -> Iterator[AppliedStack]:
        """The applied methods (or, without any, the plain model behind the same interface); undone on exit."""
        if not self.methods:
            plain = Stack([])
            yield AppliedStack(plain, [Applied(plain, self.loaded)])
            return
        layers: list[Applied] = []
        loaded = self.loaded
        try:
            for method in Stack(self.methods).units:
                layers.append(method.apply(loaded, **self.resources.get(method.slug, {})))
                loaded = layers[-1].loaded
            applied_stack = AppliedStack(Stack(self.methods), layers)
            yield applied_stack
            with suppress(BadInput):  # nothing has run, so there is nothing to report
                self.reports = applied_stack.reports
        finally:
            for applied in reversed(layers):
                applied.close()

    @contextmanager
    def forward(self, inputs: Mapping[str, Any]) -> Iterator[Callable[[], Any]]:
        """A version for ``alternate``: one forward pass without gradients."""
        with torch.no_grad(), self.ready() as applied:
            yield lambda: applied(**inputs)

    def version(self, inputs: Mapping[str, Any]) -> Version:
        """``forward`` as ``alternate`` takes it."""
        return partial(self.forward, inputs)


class Session:
    """A run in progress: measures, and adds to ``record`` what is finished, so that an interrupt loses little."""

    def __init__(
        self, record: RunRecord, settings: Settings, device: torch.device, progress: Progress
    ) -> None:
        self.record = record
        self.settings = settings
        self.device = device
        self.progress = progress
        self._interrupted = False

    def time(self, what: str, versions: Mapping[str, Version]) -> dict[str, Samples]:
        """``alternate`` with the session's settings; after an interrupt the complete rounds are still returned.

        The interrupt is raised by the next ``checkpoint``, once the caller has added what it got.
        """
        repeats = self.settings.repeats
        self.progress(what, 0, repeats)
        try:
            return alternate(
                versions,
                self.device,
                repeats=repeats,
                seconds=self.settings.seconds,
                progress=lambda done: self.progress(what, done, repeats),
            )
        except TimingInterrupted as interrupt:
            self._interrupted = True
            return interrupt.samples

    def checkpoint(self) -> None:
        """Raise the interrupt that came while ``time`` was measuring."""
        if self._interrupted:
            raise KeyboardInterrupt

    def add(self, quantity: str, dense: Figure | None, method: Figure | None, **more: Any) -> Comparison:
        """Compare and keep; see ``record.compare``."""
        row = compare(quantity, dense, method, **more)
        self.record.comparisons.append(row)
        if row.suspect:
            self.record.notes.append(
                f"The gain in {row.about.label} ({row.gain:.2f}x) lies above its bound ({row.bound:.2f}x) by more "
                "than the noise: distrust it, and measure again with more --repeats on a quiet machine."
            )
        return row

    def add_exact(self, quantity: str, dense: float, method: float, *, n: int = 1, **more: Any) -> Comparison:
        """As ``add`` for counts and averages, which have no spread of their own."""
        return self.add(quantity, Figure(median=dense, n=n), Figure(median=method, n=n), **more)

    def add_peak_memory(self, arms: Mapping[str, Arm], inputs: Mapping[str, Any], task: str) -> None:
        """Most memory in one forward pass of ``arms["dense"]`` and ``arms["method"]``, where the device counts it."""
        if self.device.type != "cuda":  # no count, so no reason to put the methods to work
            return
        peaks = {}
        for name, arm in arms.items():
            with arm.forward(inputs) as work:
                peaks[name] = peak_bytes(self.device, work) / 1e6
        self.add_exact("peak-memory", peaks["dense"], peaks["method"], task=task)

    def add_fidelity(self, quantity: str, value: float, *, n: int = 1, task: str = "") -> None:
        """A figure that only the method has: how close it stays to the dense model."""
        self.add(quantity, None, Figure(median=value, n=n), task=task)

    def note(self, text: str) -> None:
        """Add a sentence that the reader of the figures must know (once)."""
        if text not in self.record.notes:
            self.record.notes.append(text)


def greedy(tokenizer: Any, new_tokens: int) -> dict[str, Any]:
    """Arguments of ``generate`` for plain greedy decoding, whatever the model's own generation config says."""
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "num_beams": 1}
    options |= {"temperature": None, "top_p": None, "top_k": None, "repetition_penalty": None}
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None:
        pad = getattr(tokenizer, "eos_token_id", None)
    if pad is not None:
        options["pad_token_id"] = pad
    return options


def outputs_of(
    tokenizer: Any,
    prompt: str,
    dense: list[int],
    method: list[int],
    gap: Callable[[int], float] | None = None,
) -> Outputs:
    """Both generated texts side by side.

    Args:
        tokenizer: decodes ids.
        prompt: what the user gave.
        dense, method: generated ids, without the prompt.
        gap: called with the place of the first difference; the dense model's logit gap there.
    """
    common = common_prefix(dense, method)
    identical = common == len(dense) == len(method)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (dense, method)]
    shared = len(tokenizer.decode(dense[:common], skip_special_tokens=True))
    while texts[0][:shared] != texts[1][:shared]:  # a character that is split over tokens decodes differently
        shared -= 1
    return Outputs(
        prompt=prompt,
        dense=texts[0],
        method=texts[1],
        tokens_dense=len(dense),
        tokens_method=len(method),
        common=common,
        common_text=min(shared, *map(len, texts)),
        identical=identical,
        gap=None if identical or gap is None or common >= len(dense) else gap(common),
    )


@torch.no_grad()
def logit_gap(model: Any, inputs: Mapping[str, Any], generated: list[int]) -> float:
    """Difference of the two largest logits of ``model`` after the prompt ``inputs`` and the ``generated`` ids."""
    inputs = dict(inputs)
    more = torch.tensor([generated], dtype=torch.long, device=inputs["input_ids"].device)
    inputs["input_ids"] = torch.cat((inputs["input_ids"], more), dim=1)
    if inputs.get("attention_mask") is not None:
        mask = inputs["attention_mask"]
        inputs["attention_mask"] = torch.cat((mask, mask.new_ones(1, len(generated))), dim=1)
    best = model(**inputs, logits_to_keep=1).logits[0, -1].float().topk(2).values
    return float(best[0] - best[1])
