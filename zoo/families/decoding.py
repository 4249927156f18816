"""Base of accelerated decoders: a method names its drafter, the loop of ``zoo.engines.decoding`` does the rest."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from zoo.errors import BadInput, Refused
from zoo.interface import Applied, Method, Phase, refuse
from zoo.report import Report

if TYPE_CHECKING:
    from zoo.engines.decoding import Step
    from zoo.engines.drafting import Drafter
    from zoo.engines.verification_cost import VerificationCost
    from zoo.models import LoadedModel


class Decoder(Method):
    """Several tokens per forward pass of the model, the output being the model's own.

    ``apply`` takes the resources ``on_step`` (called with every ``zoo.engines.decoding.Step``),
    ``synchronise`` (exact time split on an accelerator) and whatever the method's drafter needs.
    """

    phase: ClassVar[Phase] = "decoding"

    def check(self, loaded: LoadedModel) -> None:
        """Refuse models that do not generate text from a causal decoder."""
        config = loaded.model.config
        if getattr(config, "is_encoder_decoder", False):
            raise refuse(self, "a decoder-only model", f"an encoder and a decoder ({config.model_type})")
        if not getattr(config, "is_causal", True):
            raise refuse(
                self, "a causal decoder", "attention that looks both ways (zoo show window-diffusion)"
            )
        if not getattr(loaded.model, "can_generate", lambda: False)():
            raise refuse(self, "a model with a language-model head", f"none ({type(loaded.model).__name__})")

    @abstractmethod
    def drafter(self, loaded: LoadedModel, **resources: Any) -> Drafter:
        """The drafter for this model; it lives until the method is taken off."""

    def apply(
        self,
        loaded: LoadedModel,
        *,
        on_step: Callable[[Step], None] | None = None,
        synchronise: bool = False,
        **resources: Any,
    ) -> AppliedDecoder:
        """Wrap generation. The model itself is not touched."""
        self.check(loaded)
        return AppliedDecoder(self, loaded, self.drafter(loaded, **resources), on_step, synchronise)


class BudgetedDecoder(Decoder):
    """A decoder that can keep its drafts to what pays.

    With ``budget = auto`` each draft is cut to the nodes that pay by the measured cost of verifying them and the
    acceptance so far, down to none. Drafting that takes passes through a model has to pay, too; since it is timed, a
    seed then no longer fixes which of the equally distributed outputs is sampled. ``apply`` takes the resource ``cost``
    (a ``VerificationCost``) in place of the curve that is measured and kept.
    """

    budget: Literal["fixed", "auto"] = Field(
        "fixed",
        description="fixed: the whole draft is verified, as in the paper; auto: as much of it as pays on this model "
        "and device, down to nothing, by a verification-cost curve that is measured once.",
    )

    def apply(
        self,
        loaded: LoadedModel,
        *,
        on_step: Callable[[Step], None] | None = None,
        synchronise: bool = False,
        cost: VerificationCost | None = None,
        **resources: Any,
    ) -> AppliedDecoder:
        """Wrap generation. The model itself is not touched."""
        self.check(loaded)
        drafter = self.drafter(loaded, **resources)
        if self.budget == "auto":
            from zoo.engines.draft_budget import Thrifty
            from zoo.engines.verification_cost import verification_cost

            drafter = Thrifty(drafter, cost or verification_cost(loaded.model))
        return AppliedDecoder(self, loaded, drafter, on_step, synchronise)


class AppliedDecoder(Applied):
    """A decoder at work: ``generate`` takes what ``model.generate`` takes."""

    def __init__(
        self,
        method: Decoder,
        loaded: LoadedModel,
        drafter: Drafter,
        on_step: Callable[[Step], None] | None = None,
        synchronise: bool = False,
    ) -> None:
        super().__init__(method, loaded, drafter.close)
        self.drafter = drafter
        self.on_step = on_step
        self.synchronise = synchronise
        self.trace: list[Step] = []
        """What the latest generation committed step by step, the first token (from the prompt's own pass) included."""
        self._report: Report | None = None

    def generate(self, **inputs: Any) -> Any:
        """As ``model.generate``: token ids ``[batch, length]``, prompt included.

        Greedy decoding gives the very tokens of ``model.generate`` (up to ties of the arithmetic), sampling
        the same distribution. ``stop_strings`` use the loaded tokenizer when none is given.

        Raises:
            Refused: beam search and other settings that cannot be honoured exactly.
            BadInput: ``stop_strings`` without a tokenizer.
        """
        from zoo.engines.decoding import Speculation

        name = self.method.name
        for foreign in ("assistant_model", "custom_generate", "negative_prompt_ids"):
            if inputs.get(foreign) is not None:
                raise Refused(f"{name} is itself the way of decoding; leave out {foreign}")
        run = Speculation(
            self.drafter,
            name,
            streamer=inputs.pop("streamer", None),
            on_step=self.on_step,
            synchronise=self.synchronise,
        )
        self._stop_strings(inputs)
        try:
            return self.model.generate(**inputs, custom_generate=run)
        finally:
            self.trace = run.trace
            tokens = sum(len(step.tokens) for step in run.trace)
            self._report = Report(
                method=name,
                parameters=self.method.parameters(),
                unit="forward passes per token",
                kept=run.stats.steps + bool(tokens),
                total=tokens,
                facts={
                    "tokens generated": tokens,
                    "tokens per step": run.stats.tokens_per_step,
                    "draft tokens accepted": sum(run.stats.accepted),
                    "draft tokens verified": sum(run.stats.drafted),
                },
                decoding=run.stats,
            )

    @property
    def report(self) -> Report:
        """Counters of the latest ``generate``; ``kept / total`` is forward passes of the model per token."""
        if self._report is None:
            raise BadInput(f"{self.method.name} has nothing to report yet: call generate first")
        return self._report

    def _stop_strings(self, inputs: dict[str, Any]) -> None:
        """Turn ``stop_strings`` into a stopping criterion: transformers keeps no tokenizer for custom loops."""
        from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

        tokenizer = inputs.pop("tokenizer", None) or self.loaded.tokenizer
        strings = inputs.pop("stop_strings", None)
        config = inputs.get("generation_config")
        if strings is None and config is not None and config.stop_strings is not None:
            strings = config.stop_strings
            inputs["generation_config"] = config = type(config).from_dict(config.to_dict())
            config.stop_strings = None
        if self.model.generation_config.stop_strings is not None:
            raise Refused(
                f"{self.method.name}: the model's own generation_config has stop_strings; set them to None there and "
                "give them to generate"
            )
        if strings is None:
            return
        if tokenizer is None:
            raise BadInput(f"{self.method.name}: stop_strings need a tokenizer; give tokenizer=...")
        given = inputs.pop("stopping_criteria", None) or []
        inputs["stopping_criteria"] = StoppingCriteriaList(
            [*given, StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)]
        )
