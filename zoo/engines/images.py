"""What a method may see of the pictures behind visual tokens, and of the encoder that read them.

A :class:`Watcher` stands at the model's own ``get_image_features`` and ``get_video_features`` (which ``generate`` calls
before the model runs, and ``forward`` otherwise): it notes what they were given, and, for the blocks that a stage asks
for, queries, keys and hidden states. From that an :class:`ImageView` answers questions about one picture: which
patches a token was made from, where it stands in the grid, how much attention its patches received.

Encoder layers are numbered like transformers' ``attentions`` and ``hidden_states``, negative numbers counting from the
end. Attention ``i`` is that of block ``i`` (0-based). Hidden state ``0`` is what enters the first block, ``i`` what
leaves block ``i - 1``. So with negative numbers the two belong together: hidden state ``-2`` (which LLaVA projects) is
what leaves block ``-2``, whose attention is attention ``-2``, and enters block ``-1``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from zoo.engines.probes import Seen, tap_attention
from zoo.errors import BadInput, Refused
from zoo.models.anatomy import Anatomy, Encoder
from zoo.models.packing import Box, Packed, Part, Placeholders


@dataclass(frozen=True)
class EncoderWatch:
    """A layer of the vision encoder that a stage looks at.

    Attributes:
        layer: see the module's text on numbering.
        attention: keep queries, keys and values of the block.
        hidden: keep the hidden state.
    """

    layer: int
    attention: bool = True
    hidden: bool = False


@dataclass
class Encoded:
    """One call of the encoder: what it was given, and what was watched.

    Attributes:
        kind: ``image`` or ``video``.
        given: arguments of ``get_image_features`` or ``get_video_features``, by name.
        seen: attention calls of a watched block, in order.
        hidden: watched hidden states, by non-negative number.
    """

    kind: str
    given: Mapping[str, Any]
    encoder: Encoder
    seen: dict[int, list[Seen]] = field(default_factory=dict)
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    _order: torch.Tensor | None = None

    def release(self) -> None:
        """Forget what was watched."""
        self.seen.clear()
        self.hidden.clear()

    def attention(self, layer: int, crop: int, size: int, start: int) -> Seen:
        """Attention of one crop, as if the encoder had run it alone (a batch of one).

        Args:
            layer: attention number; negative counts from the end.
            crop: number of the crop within this call.
            size: patches per crop.
            start: place of its first patch, for encoders that run all crops in one sequence.
        """
        number = layer % len(self.encoder.blocks)
        if number not in self.seen:
            raise BadInput(
                f"attention {layer} of the encoder is not watched: add it to the stage's observes_encoder"
            )
        calls = self.seen[number]
        if self.encoder.packed_order is None:
            return _one(calls[0], crop)
        places = self._places(start, size, calls[0].query.device)
        groups = torch.cat([torch.full((call.query.shape[2],), i) for i, call in enumerate(_split(calls))])
        query, key, value = (
            torch.cat([getattr(call, name) for call in calls], dim=2)[:, :, places]
            for name in ("query", "key", "value")
        )
        own = groups.to(places.device)[places]
        return Seen(
            query, key, value, None, calls[0].scaling, False, None if bool((own == own[0]).all()) else own
        )

    def state(self, layer: int, crop: int, size: int, start: int) -> torch.Tensor:
        """Hidden state of one crop, ``[N, D]``."""
        number = layer % (len(self.encoder.blocks) + 1)
        if number not in self.hidden:
            raise BadInput(
                f"hidden state {layer} of the encoder is not watched: add it to the stage's observes_encoder"
            )
        states = self.hidden[number]
        if self.encoder.packed_order is None:
            return states[crop]
        return states.reshape(-1, states.shape[-1])[self._places(start, size, states.device)]

    def _places(self, start: int, size: int, device: torch.device) -> torch.Tensor:
        """Where the patches of one crop stand in the sequence that the blocks see, ``[size]``."""
        if self._order is None:
            assert self.encoder.packed_order is not None
            grids = self.given["video_grid_thw" if self.kind == "video" else "image_grid_thw"]
            self._order = self.encoder.packed_order(grids).argsort()
        return self._order[start : start + size].to(device)


def _one(call: Seen, crop: int) -> Seen:
    mask = call.mask
    if mask is not None and mask.shape[0] > 1:
        mask = mask[crop : crop + 1]
    keep = slice(crop, crop + 1)
    return Seen(call.query[keep], call.key[keep], call.value[keep], mask, call.scaling, call.causal)


def _split(calls: list[Seen]) -> list[Seen]:
    """Calls of packed sequences, one per stretch that attends only to itself (flash kernels take all in one call)."""
    parts = []
    for call in calls:
        if call.stretches is None:
            parts.append(call)
            continue
        ends = call.stretches.tolist()
        for start, stop in pairwise(ends):
            keep = slice(start, stop)
            parts.append(
                Seen(
                    call.query[:, :, keep],
                    call.key[:, :, keep],
                    call.value[:, :, keep],
                    None,
                    call.scaling,
                    False,
                )
            )
    return parts


class Watcher:
    """Notes the encoder calls of a vision-language model; ``close`` takes it away.

    Args:
        anatomy: of a vision-language model.
        watches: layers to keep queries, keys or hidden states of.
        name: for error messages.
    """

    def __init__(self, anatomy: Anatomy, watches: Iterable[EncoderWatch], name: str) -> None:
        assert anatomy.vlm is not None
        self.anatomy = anatomy
        self.name = name
        self.calls: dict[str, Encoded] = {}
        """Latest call of each kind."""
        self._running: Encoded | None = None
        self._undo: list[Callable[[], None]] = []
        try:
            self._install(anatomy.vlm, tuple(watches))
        except BaseException:
            self.close()
            raise

    def _install(self, vlm: torch.nn.Module, watches: tuple[EncoderWatch, ...]) -> None:
        encoder = self.anatomy.encoder
        if encoder is None or self.anatomy.packer is None:
            if watches:
                raise Refused(
                    f"{self.name} looks into the vision encoder; {self.anatomy.description} has none it knows"
                )
            return
        for kind in self.anatomy.visual_token_ids:
            name = f"get_{kind}_features"
            earlier = vlm.__dict__.get(name)  # somebody else's, to be put back
            setattr(vlm, name, self._noting(kind, getattr(vlm, name), encoder))
            if earlier is None:
                self._undo.append(functools.partial(delattr, vlm, name))
            else:
                self._undo.append(functools.partial(setattr, vlm, name, earlier))
        depth = len(encoder.blocks)
        for watch in watches:
            floor, top = (-depth, depth) if watch.attention else (-depth - 1, depth + 1)
            if not floor <= watch.layer < top:
                raise Refused(
                    f"{self.name} looks at encoder layer {watch.layer}; this encoder has {depth} blocks "
                    f"({-depth} .. {depth - 1})"
                )
        for number in sorted({watch.layer % depth for watch in watches if watch.attention}):
            self._undo.append(
                tap_attention(encoder.blocks[number].attention.module, self._on_attention(number))
            )
        for number in sorted({watch.layer % (depth + 1) for watch in watches if watch.hidden}):
            module = encoder.blocks[max(number - 1, 0)].module
            hook = (
                module.register_forward_pre_hook(self._before_first, with_kwargs=True)
                if number == 0
                else module.register_forward_hook(self._after_block(number))
            )
            self._undo.append(hook.remove)

    def _noting(self, kind: str, original: Callable[..., Any], encoder: Encoder) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)  # ``generate`` reads the parameters' names
        def noted(*args: Any, **kwargs: Any) -> Any:
            if self._running is not None:  # Qwen3-VL's video function calls the one for images
                return original(*args, **kwargs)
            bound = signature.bind(*args, **kwargs).arguments
            bound = {**bound, **bound.pop("kwargs", {})}
            call = self._running = Encoded(kind, bound, encoder)
            try:
                output = original(*args, **kwargs)
            finally:
                self._running = None
            self.calls[kind] = call
            return output

        return noted

    def _on_attention(self, number: int) -> Callable[[Seen], None]:
        def tap(seen: Seen) -> None:
            if self._running is not None:
                self._running.seen.setdefault(number, []).append(seen)

        return tap

    def _before_first(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._running is not None:
            self._running.hidden[0] = args[0] if args else kwargs["hidden_states"]

    def _after_block(self, number: int) -> Callable[[torch.nn.Module, Any, Any], None]:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            if self._running is not None:
                self._running.hidden[number] = output[0] if isinstance(output, tuple) else output

        return hook

    def take(self) -> dict[str, Encoded]:
        """The calls noted so far; they are forgotten here."""
        calls, self.calls = self.calls, {}
        return calls

    def close(self) -> None:
        """Take everything away."""
        while self._undo:
            self._undo.pop()()
        self.calls = {}


@dataclass(frozen=True)
class ImageView:
    """One picture (or video) of a sample, and the visual tokens that are left of it.

    Attributes:
        tokens: which of the view's visual tokens come from it, ``[n]``.
        order: their numbers among all tokens that the picture had before any reduction, ``[n]``.
        packed: how all its tokens were made; the properties below select the rows that are left.
    """

    tokens: torch.Tensor
    order: torch.Tensor
    packed: Packed
    _encoded: Encoded
    _start: int
    """Place of its first patch in the encoder call."""

    @property
    def patches(self) -> torch.Tensor:
        """Patches of each token, ``[n, k]``: ``crop * patches_per_crop + patch``, no prefix tokens; -1 fills up."""
        return self._rows(self.packed.patches)

    @property
    def part(self) -> torch.Tensor:
        """Index into ``parts``, ``[n]``; -1 = newline, or a prefix token that the model kept."""
        return self._rows(self.packed.part)

    @property
    def coordinates(self) -> torch.Tensor:
        """Row and column (video: frame, row, column) in the grid of its part, ``[n, 2 or 3]``; newlines have -1."""
        return self._rows(self.packed.coordinates)

    @property
    def newline(self) -> torch.Tensor:
        """Tokens made from no patch, ``[n]`` bool."""
        return self.part < 0

    @property
    def crop(self) -> torch.Tensor:
        """Crop that each token (its first patch) comes from, ``[n]``; -1 = newline."""
        first = self.patches[:, 0]
        return torch.where(first < 0, -1, first.div(self.patches_per_crop, rounding_mode="floor"))

    @property
    def thumbnail(self) -> torch.Tensor:
        """Tokens of the thumbnail that stands beside tiles, ``[n]`` bool."""
        flags = torch.tensor([*(part.thumbnail for part in self.parts), False], device=self.part.device)
        return flags[self.part]

    @property
    def parts(self) -> tuple[Part, ...]:
        """The grids that its tokens form."""
        return self.packed.parts

    @property
    def grid(self) -> tuple[int, ...] | None:
        """``(rows, columns)``, or ``(frames, rows, columns)``, when the picture is one grid; ``None`` when it is tiled.

        A complete grid before any reduction; later ``coordinates`` tell which of its cells are left.
        """
        return self.parts[0].grid if len(self.parts) == 1 else None

    @property
    def crops(self) -> int:
        """Crops: sequences that the encoder ran."""
        return self.packed.crops

    @property
    def patches_per_crop(self) -> int:
        """``P``."""
        return len(self.packed.patch_coordinates)

    @property
    def patch_coordinates(self) -> torch.Tensor:
        """Row and column of each patch of a crop, in the encoder's order, ``[P, 2]``."""
        return self.packed.patch_coordinates

    @property
    def boxes(self) -> tuple[Box, ...] | None:
        """What each crop shows, in fractions of the picture; ``None`` when the model is not told."""
        return self.packed.boxes

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the picture before preprocessing, when the model is told."""
        return self.packed.size

    @property
    def video(self) -> bool:
        """True for videos."""
        return self.packed.video

    @property
    def prefix(self) -> int:
        """Tokens in front of the patches in the encoder: patch ``p`` stands at ``prefix + p`` in what ``encoder_*``
        return.
        """
        return self._encoded.encoder.prefix

    def encoder_rows(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """Attention that queries ``rows [R]`` of every crop pay, ``[crops, H, R, N]`` float32, ``N = prefix + P``."""
        return torch.stack([self._attention(layer, crop).rows(0, rows) for crop in range(self.crops)])

    def encoder_received(self, layer: int) -> torch.Tensor:
        """Attention that each token of a crop receives, mean over all its queries, ``[crops, H, N]`` float32.

        Computed in chunks of queries, so that no full map exists.
        """
        crops = [self._attention(layer, crop) for crop in range(self.crops)]
        return torch.stack([crop.received(0) / crop.query.shape[2] for crop in crops])

    def encoder_queries(self, layer: int) -> torch.Tensor:
        """Queries ``[crops, H, N, d]``."""
        return torch.cat([self._attention(layer, crop).query for crop in range(self.crops)])

    def encoder_keys(self, layer: int) -> torch.Tensor:
        """Keys ``[crops, H, N, d]``."""
        return torch.cat([self._attention(layer, crop).key for crop in range(self.crops)])

    def encoder_values(self, layer: int) -> torch.Tensor:
        """Values ``[crops, H, N, d]``."""
        return torch.cat([self._attention(layer, crop).value for crop in range(self.crops)])

    def encoder_hidden(self, layer: int) -> torch.Tensor:
        """Hidden state ``[crops, N, D]``."""
        return torch.stack([self._encoded.state(layer, *self._place(crop)) for crop in range(self.crops)])

    def on_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """Values of patches, ``[crops, P]`` or ``[crops, P, D]``, as means over each token's patches, ``[n, ...]``.

        Newlines get 0.
        """
        flat = values.flatten(0, 1)
        patches = self.patches.to(flat.device)
        there = patches >= 0
        shape = (*there.shape, *[1] * (flat.dim() - 1))
        summed = (flat[patches.clamp(min=0)] * there.view(shape)).sum(1)
        return summed / there.sum(1).clamp(min=1).view(-1, *[1] * (flat.dim() - 1))

    def cls_attention(self, layer: int) -> torch.Tensor:
        """Attention of ``[CLS]`` to the patches of each token, mean over heads and patches, ``[n]``; newlines get 0.

        Raises:
            Refused: the encoder has no ``[CLS]``.
        """
        if not self._encoded.encoder.has_cls:
            raise Refused("this model's vision encoder has no [CLS] token whose attention could be read")
        first = torch.zeros(1, dtype=torch.long, device=self.tokens.device)
        return self.on_tokens(self.encoder_rows(layer, first)[:, :, 0, self.prefix :].mean(1))

    def mean_attention(self, layer: int) -> torch.Tensor:
        """Attention that the patches of each token receive, mean over heads, queries and patches, ``[n]``."""
        return self.on_tokens(self.encoder_received(layer)[:, :, self.prefix :].mean(1))

    def patch_pixels(self) -> torch.Tensor:
        """Preprocessed (normalised) pixels of every patch, ``[crops, P, C, p, p]``; ``[crops, P, C, t, p, p]`` where
        a patch spans ``t`` frames (Qwen-VL).
        """
        encoder, video = self._encoded.encoder, self.video
        pixels = self._encoded.given[
            "pixel_values_videos"
            if video and "pixel_values_videos" in self._encoded.given
            else "pixel_values"
        ]
        side = encoder.patch_size
        if encoder.packed_order is not None:
            count = self.crops * self.patches_per_crop
            own = pixels[self._start : self._start + count]
            return own.view(self.crops, self.patches_per_crop, 3, -1, side, side)
        crops = _crop_list(pixels, self._encoded)[
            self.packed.first_crop : self.packed.first_crop + self.crops
        ]
        folded = crops.unfold(2, side, side).unfold(3, side, side)
        return folded.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)

    def _rows(self, table: torch.Tensor) -> torch.Tensor:
        return table.to(self.order.device)[self.order]

    def _place(self, crop: int) -> tuple[int, int, int]:
        return (
            self.packed.first_crop + crop,
            self.patches_per_crop,
            self._start + crop * self.patches_per_crop,
        )

    def _attention(self, layer: int, crop: int) -> Seen:
        return self._encoded.attention(layer, *self._place(crop))


def _crop_list(pixels: torch.Tensor, call: Encoded) -> torch.Tensor:
    """Pixels of all crops that were encoded, ``[crops, C, H, W]``, without those that fill a batch up."""
    if pixels.dim() == 4:
        return pixels
    flat = pixels.flatten(0, 1)
    return flat if call.kind == "video" else flat[(flat != 0).flatten(1).any(1)]


def pictures_of(
    calls: Mapping[str, Encoded], anatomy: Anatomy, ids: torch.Tensor, visual: torch.Tensor
) -> list[list[tuple[Packed, Encoded, int, torch.Tensor]]]:
    """Which picture stands where in a batch of prompts.

    Args:
        calls: by kind.
        anatomy: of the model.
        ids: token ids ``[B, L]``.
        visual: placeholders of visual tokens ``[B, L]``.

    Returns:
        For each sample its pictures in the order of the prompt: how it was packed, the encoder call, the place of
        its first patch there, and the places of its tokens in the prompt ``[n]``.

    Raises:
        BadInput: the features did not come from the model's own encoder.
    """
    found: list[list[tuple[Packed, Encoded, int, torch.Tensor]]] = [[] for _ in ids]
    for kind, number in anatomy.visual_token_ids.items():
        mask = visual & (ids == number)
        if not bool(mask.any()):
            continue
        if kind not in calls or anatomy.packer is None:
            raise BadInput(
                f"the method looks at the {kind}s behind the tokens: pass pixels, not encoded features"
            )
        packed = anatomy.packer(anatomy.vlm, kind, calls[kind].given, Placeholders(ids, mask))
        if sum(entry.length for entry in packed) != int(mask.sum()):
            raise BadInput(
                f"the prompt has {int(mask.sum())} {kind} placeholders, but its {kind}s give "
                f"{sum(entry.length for entry in packed)} tokens"
            )
        queue, start = iter(packed), 0
        for sample, places in enumerate(row.nonzero().squeeze(-1) for row in mask):
            used = 0
            while used < len(places):
                entry = next(queue)
                found[sample].append((entry, calls[kind], start, places[used : used + entry.length]))
                used += entry.length
                start += entry.crops * len(entry.patch_coordinates)
    return [sorted(pictures, key=lambda picture: int(picture[3][0])) for pictures in found]
