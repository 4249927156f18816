"""What a visual-token method declares and sees: stages, and the view of one sample at a stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch

from zoo.engines.images import Encoded, EncoderWatch, ImageView
from zoo.engines.probes import Seen
from zoo.engines.reductions import Reduction
from zoo.errors import BadInput
from zoo.models.packing import Packed

Positions = Literal["keep", "renumber"]
Picture = tuple[Packed, Encoded, int, torch.Tensor]
"""How a picture was packed, its encoder call, the place of its first patch there, its places in the prompt ``[n]``."""
HiddenPlace = Literal["input", "attention_in", "attention_out", "mlp_in", "mlp_out", "output"]
"""Where a hidden state of a decoder layer is taken: what enters and leaves the layer, its attention module (after the
norm; before the residual sum) and its MLP (likewise). Deep-stacked visual features count as part of the output."""


@dataclass(frozen=True)
class View:
    """What a method may look at: the visual tokens of one sample, and its surroundings.

    Attributes:
        tokens: visual tokens at this stage, ``[N, D]``: projected embeddings before the LLM, hidden states inside.
        index: their places in the current (already shortened) sequence, ``[N]``.
        original: their places in the sequence before any reduction, ``[N]``.
        ordinal: their numbers among the sample's visual tokens before any reduction, ``[N]``.
        text: the other (non-padding) tokens at this stage, ``[T, D]``.
        text_index: their places in the current sequence, ``[T]``.
        total: visual tokens of this sample before any stage.
        layer: decoder layer in front of which the stage stands; -1 before the LLM.
        seed: of ``generator``.
        memory: the method's own notes on this sample, carried from stage to stage of one input. Keep vectors over
            all ``total`` tokens and read them at ``ordinal``.
        deep: visual features that will be added behind layers 0, 1, ... (DeepStack), on the current sequence, each
            ``[L, D]``; empty for most models.
        weight: how many tokens each key of the current sequence counts for, ``[L]`` float32; ``None`` = one.
    """

    tokens: torch.Tensor
    index: torch.Tensor
    original: torch.Tensor
    text: torch.Tensor
    text_index: torch.Tensor
    total: int
    layer: int
    ordinal: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    seed: int = 0
    memory: dict[str, Any] = field(default_factory=dict)
    deep: tuple[torch.Tensor, ...] = ()
    weight: torch.Tensor | None = None
    _positions: torch.Tensor | None = None
    _slots: torch.Tensor | None = None
    _sample: int = 0
    _seen: dict[int, Seen] = field(default_factory=dict, repr=False)
    _hidden: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict, repr=False)
    _pictures: Callable[[], list[Picture]] = field(default=list, repr=False)

    # --- the decoder: layers named in ``observes`` and ``observes_hidden`` of the stage -----------------------

    def attention(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """Attention that queries ``rows [R]`` (places in the current sequence) of ``layer`` pay to all keys.

        Returns:
            ``[H, R, L]`` in float32, from the kernel's own queries and keys; the layer must be observed by the stage.
        """
        return self._seen[layer].rows(self._sample, rows)

    def received(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """Attention that each key receives from queries ``rows [R]``, summed, ``[H, L]`` float32; in chunks of rows."""
        return self._seen[layer].received(self._sample, rows)

    def queries(self, layer: int) -> torch.Tensor:
        """Queries of ``layer`` after norm and rotary embedding, ``[H, L, d]``."""
        return self._seen[layer].query[self._sample]

    def keys(self, layer: int) -> torch.Tensor:
        """Keys of ``layer`` after norm and rotary embedding, ``[H_kv, L, d]``."""
        return self._seen[layer].key[self._sample]

    def values(self, layer: int) -> torch.Tensor:
        """Values of ``layer``, ``[H_kv, L, d]``."""
        return self._seen[layer].value[self._sample]

    def hidden(self, layer: int, place: HiddenPlace = "input") -> torch.Tensor:
        """Hidden state of ``layer`` on the current sequence (padding included), ``[L, D]``."""
        return self._hidden[layer, place][self._sample]

    # --- the prompt -------------------------------------------------------------------------------------------

    @property
    def sample(self) -> int:
        """Its row of the batch."""
        return self._sample

    @property
    def last(self) -> torch.Tensor:
        """Place of the last non-padding token, ``[1]``."""
        return torch.cat((self.index, self.text_index)).max().reshape(1)

    @property
    def system(self) -> torch.Tensor:
        """Places of the text before the first visual token, ``[T1]``."""
        return self.text_index[self.text_index < self.index.min()]

    @property
    def question(self) -> torch.Tensor:
        """Places of the text after the last visual token, ``[T2]``."""
        return self.text_index[self.text_index > self.index.max()]

    @property
    def positions(self) -> torch.Tensor:
        """Position ids in front of this stage, of the current sequence (padding included), ``[L]``.

        Models whose positions are places in image grids (M-RoPE) have ``[3, L]``: time, row and column.
        """
        if self._positions is None:
            return torch.arange(int(self.last) + 1, device=self.index.device)
        return self._positions

    @cached_property
    def generator(self) -> torch.Generator:
        """Random numbers (on the CPU) from the method's seed; the same for every sample, whatever its batch."""
        return torch.Generator().manual_seed(self.seed + self.layer + 1)

    # --- pictures and the vision encoder ----------------------------------------------------------------------

    @cached_property
    def images(self) -> tuple[ImageView, ...]:
        """The sample's pictures and videos in the order of the prompt; those without surviving tokens included.

        Raises:
            BadInput: encoded features were passed instead of pixels.
        """
        views = []
        for packed, encoded, start, places in self._pictures():
            among = torch.full((int(places.max()) + 2,), -1, device=places.device)
            among[places] = torch.arange(len(places), device=places.device)
            order = among[self.original.clamp(max=len(among) - 1)]
            tokens = (order >= 0).nonzero().squeeze(-1)
            views.append(ImageView(tokens, order[tokens], packed, encoded, start))
        return tuple(views)

    def encoder_rows(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """``ImageView.encoder_rows`` of all crops of the sample, ``[crops, H, R, N]`` float32."""
        return self._crops(lambda image: image.encoder_rows(layer, rows))

    def encoder_received(self, layer: int) -> torch.Tensor:
        """``ImageView.encoder_received`` of all crops of the sample (mean over queries), ``[crops, H, N]`` float32."""
        return self._crops(lambda image: image.encoder_received(layer))

    def encoder_queries(self, layer: int) -> torch.Tensor:
        """Encoder queries of all crops of the sample, ``[crops, H, N, d]``."""
        return self._crops(lambda image: image.encoder_queries(layer))

    def encoder_keys(self, layer: int) -> torch.Tensor:
        """Encoder keys of all crops of the sample, ``[crops, H, N, d]``."""
        return self._crops(lambda image: image.encoder_keys(layer))

    def encoder_values(self, layer: int) -> torch.Tensor:
        """Encoder values of all crops of the sample, ``[crops, H, N, d]``."""
        return self._crops(lambda image: image.encoder_values(layer))

    def encoder_hidden(self, layer: int) -> torch.Tensor:
        """Encoder hidden states of all crops of the sample, ``[crops, N, D]``."""
        return self._crops(lambda image: image.encoder_hidden(layer))

    def cls_attention(self, layer: int) -> torch.Tensor:
        """Attention of ``[CLS]`` to the patches of each visual token, mean over heads and patches, ``[N]``.

        Newline tokens get 0. What stands in for ``[CLS]`` in other encoders (often ``mean_attention``) is the
        method's choice.

        Raises:
            Refused: the encoder has no ``[CLS]``.
        """
        return self._on_tokens(lambda image: image.cls_attention(layer))

    def mean_attention(self, layer: int) -> torch.Tensor:
        """Attention received by the patches of each visual token, mean over heads, queries and patches, ``[N]``."""
        return self._on_tokens(lambda image: image.mean_attention(layer))

    def encoder_slots(self, image: ImageView) -> torch.Tensor:
        """Which token of its crop each patch of a picture is in, when the encoder was shortened.

        Returns:
            ``[crops, P]``; tokens count from 0 without [CLS] and other prefix tokens, -1 = the patch has left.

        Raises:
            ValueError: the encoder was not shortened.
        """
        if self._slots is None:
            raise ValueError("the encoder runs at full length: the reducer was given no encoder stages")
        return self._slots[image.packed.first_crop :][: image.crops].to(self.index.device)

    def _crops(self, part: Callable[[ImageView], torch.Tensor]) -> torch.Tensor:
        found = [part(image) for image in self.images]
        if len({one.shape[1:] for one in found}) > 1:
            raise BadInput(
                "the pictures of this sample have different numbers of patches: ask each of view.images"
            )
        return torch.cat(found)

    def _on_tokens(self, part: Callable[[ImageView], torch.Tensor]) -> torch.Tensor:
        result = torch.zeros(len(self.tokens), device=self.tokens.device)
        for image in self.images:
            result[image.tokens] = part(image).to(result)
        return result


Select = Callable[[View], Reduction]


@dataclass(frozen=True)
class Stage:
    """Where tokens leave: in front of decoder layer ``layer`` (-1 = before the LLM).

    Attributes:
        reduce: called once per sample; returns a reduction of ``view.tokens`` with a batch of one.
        observes: decoder layers whose attention ``reduce`` will ask for; each must lie before ``layer``, and after
            any earlier stage.
        observes_hidden: hidden states of decoder layers it will ask for, ``(layer, place)``; likewise.
        observes_encoder: layers of the vision encoder it will ask for.
        positions: what happens to the survivors' position ids, when it is not what the reducer does elsewhere.
        seed: of the view's ``generator``.
        trims: first layer whose cache, once the prompt is read, loses what this stage removed; ``None`` = the caches
            of the layers in front of the stage stay whole.
        weigh: from this stage on a key counts for all tokens that were merged into it: the logarithm of their number
            is added to its attention logits (proportional attention), also while decoding.
    """

    layer: int
    reduce: Select
    observes: tuple[int, ...] = ()
    observes_hidden: tuple[tuple[int, HiddenPlace], ...] = ()
    observes_encoder: tuple[EncoderWatch, ...] = ()
    positions: Positions | None = None
    seed: int = 0
    trims: int | None = None
    weigh: bool = False
