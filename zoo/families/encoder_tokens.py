"""Family base of methods that shorten the sequence inside a vision encoder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from zoo.engines.blocks import BlockReducer, BlockStage, BlockView
from zoo.engines.scan_tokens import ScanReducer
from zoo.engines.short_encoder import ShortEncoder
from zoo.engines.tokens import TokenReducer
from zoo.errors import Refused
from zoo.families.encoder_tokens_in_vlm import AppliedTower, check_short_tower
from zoo.families.visual_tokens import AppliedTokens
from zoo.interface import Applied, Method, refuse
from zoo.models import LoadedModel
from zoo.models.anatomy import Anatomy, Encoder
from zoo.report import Bar, Report

if TYPE_CHECKING:
    from zoo.families.scan_tokens import ScanTokenReducer


class EncoderTokenReducer(Method):
    """A method that declares stages; see ``zoo.engines.blocks``.

    Prefix tokens ([CLS], distillation token, registers) are the method's to protect: a view says how many there are.
    """

    phase = "encoder-tokens"
    counts_sizes: ClassVar[bool] = False
    """The method reads ``view.sizes``: how many original tokens each token stands for."""

    whole_patches: ClassVar[bool] = True
    """A patch is in one token or in none; never shared out among several."""

    restore: bool = Field(
        False,
        description="After the last block every position gets the value of the token that holds it: the output has "
        "its full length again, for dense heads, mean pooling and projectors that fold patches together.",
    )

    @abstractmethod
    def stages(self, encoder: Encoder) -> list[BlockStage]:
        """Where tokens leave, and by which rule. An empty list leaves the model as it is."""

    def key_bias(self, view: BlockView) -> torch.Tensor | None:
        """Bias on the attention logits of each key, ``[B, N]``; ``None`` for none. Not asked unless overridden."""
        return None

    def biases(self, encoder: Encoder) -> bool:
        """True when ``key_bias`` may return something on this encoder."""
        return type(self).key_bias is not EncoderTokenReducer.key_bias

    def attend(self, view: BlockView) -> torch.Tensor:
        """What stands for the attention kernel of each block, ``[B, N, H, d]``, from ``view.seen``.

        Not asked unless overridden: the model's own kernel runs.
        """
        raise NotImplementedError

    def facts(self, reducer: BlockReducer) -> dict[str, float | int | str]:
        """Figures of the latest input for the report: the paper's own budget, the variant that ran."""
        return {}

    def check(self, loaded: LoadedModel) -> None:
        """Refuse models without an encoder, and vision-language models that need every patch unless it is restored."""
        anatomy = loaded.anatomy
        if anatomy.encoder is None:
            raise refuse(self, "a vision encoder", f"the architecture {anatomy.description}")
        if anatomy.encoder.packed_order is not None:
            raise refuse(
                self, "an encoder with one sequence per picture", "one that packs all pictures into one"
            )
        if anatomy.kind == "vlm":
            _read_block(self, anatomy)
            if not self.restore:
                check_short_tower(self, anatomy, whole_patches=self.whole_patches)

    def apply(self, loaded: LoadedModel, **resources: Any) -> AppliedEncoder | AppliedTokens:
        """Hook ``loaded``; every input that follows is shortened until ``close``.

        In a vision-language model whose patches are not restored, the language model runs on fewer visual tokens too.

        Raises:
            Refused: the model lacks what the method needs, or another method is at work in its encoder.
        """
        self.check(loaded)
        anatomy = loaded.anatomy
        encoder = anatomy.encoder
        assert encoder is not None
        stages = self.stages(encoder)
        last = _read_block(self, anatomy) if anatomy.kind == "vlm" else len(encoder.blocks) - 1
        stages = [stage for stage in stages if stage.block <= last]
        bias = self.key_bias if stages and self.biases(encoder) else None
        own = stages and type(self).attend is not EncoderTokenReducer.attend
        attend = self.attend if own else None
        if anatomy.kind == "vlm" and not self.restore:
            if not stages:  # nothing leaves: nothing is touched
                return AppliedTokens(self, loaded, TokenReducer(anatomy, [], "keep", self.slug))
            tower = ShortEncoder(anatomy, stages, self.slug, bias, self.counts_sizes, attend)
            return AppliedTower(self, loaded, tower, self.facts)
        restore = last if self.restore else None
        return AppliedEncoder(
            self, loaded, BlockReducer(encoder, stages, self.slug, bias, self.counts_sizes, restore, attend)
        )


def require_blocks(method: Method, loaded: LoadedModel, blocks: Sequence[int]) -> None:
    """Refuse encoders that lack one of the ``blocks`` in which ``method`` reduces."""
    encoder = loaded.anatomy.encoder
    assert encoder is not None
    depth = len(encoder.blocks)
    if any(not 0 <= block < depth for block in blocks):
        raise Refused(
            f"{method.slug} reduces in blocks {', '.join(map(str, blocks))}, but this model has only {depth} blocks: "
            f"choose layers between 0 and {depth - 1}"
        )


def _read_block(method: EncoderTokenReducer, anatomy: Anatomy) -> int:
    """The block whose output the projector of a vision-language model reads."""
    layer = anatomy.feature_layer
    assert anatomy.encoder is not None
    depth = len(anatomy.encoder.blocks)
    if isinstance(layer, int):
        block = (layer if layer >= 0 else depth + 1 + layer) - 1
        if 0 <= block < depth:
            return block
    raise refuse(method, "a projector that reads the output of one encoder block", f"feature layers {layer}")


class AppliedEncoder(Applied):
    """An encoder method at work: call it like the model. ``report``, ``sources`` and ``unmerge`` speak of the latest
    input that ran to its end, also after ``close``.
    """

    def __init__(
        self,
        method: EncoderTokenReducer | ScanTokenReducer,
        loaded: LoadedModel,
        reducer: BlockReducer | ScanReducer,
    ) -> None:
        super().__init__(method, loaded, reducer.close)
        self.reducer = reducer
        self._facts: Callable[[Any], dict[str, float | int | str]] = method.facts

    @property
    def tokens_per_block(self) -> list[int]:
        """Tokens that reached the attention of each block, prefix included."""
        return self.reducer.tokens[:-1]

    @property
    def sources(self) -> torch.Tensor:
        """How much of each input token is in each output token, ``[B, N_out, N_in]`` (prefix included, float32).

        Drops and merges give 0 and 1. Drawn as a picture: output token k is the mean of the patches of row k.
        """
        return self.reducer.sources

    def unmerge(self, x: torch.Tensor) -> torch.Tensor:
        """Bring features of the output tokens back to all positions: ``[B, N_out, D]`` -> ``[B, N_in, D]``.

        Every position gets the value of the token that holds it; dropped ones get zeros.

        Raises:
            BadInput: ``x`` does not have one row per output token, or nothing has run yet.
        """
        return self.reducer.unmerge(x)

    @property
    def report(self) -> Report:
        """Tokens that reached the attention of each block (prefix included) for the latest input.

        Raises:
            BadInput: nothing has run yet.
        """
        tokens, total = self.tokens_per_block, self.reducer.entered
        return Report(
            method=self.method.name,
            parameters=self.method.parameters(),
            unit="tokens (mean over blocks)",
            kept=sum(tokens) / len(tokens),
            total=total,
            bars={
                "tokens per block": [
                    Bar(label=str(block), kept=kept, total=total) for block, kept in enumerate(tokens)
                ]
            },
            facts={"tokens left at the end": self.reducer.left, **self._facts(self.reducer)},
        )
