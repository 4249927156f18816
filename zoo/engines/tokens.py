"""Shortening the sequence of a vision-language model while it runs.

A method declares *stages* (before the LLM, or before a decoder layer) and returns a reduction of the visual tokens
of one sample. This engine does the rest with forward hooks: it cuts ``hidden_states``, positions and masks so that
every later layer and its KV cache are really shorter, pads samples that keep different numbers, and on decode steps
cuts the prefix columns of the mask to what each layer has in its cache. It works under plain ``model.generate``.

All state of an input lives in a ``Pass`` that is keyed by the input's cache, so two generations never mix, and
nothing stays on the modules after ``close``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from zoo.engines.blocks import BlockStage
from zoo.engines.images import Encoded, Watcher, pictures_of
from zoo.engines.probes import Seen, tap_attention
from zoo.engines.reductions import Reduction
from zoo.engines.segments import (
    Row,
    Segment,
    arrange,
    assemble,
    causal_mask,
    cut_2d,
    cut_cache,
    cut_columns,
    gather_last,
    gather_rows,
    locate,
    positions_of,
    reduced,
    trimmed,
    visible,
    weighed,
)
from zoo.engines.short_encoder import ShortEncoder
from zoo.engines.views import HiddenPlace, Picture, Positions, Select, Stage, View
from zoo.errors import BadInput, Refused
from zoo.models.anatomy import Anatomy, Decoder

__all__ = ["HiddenPlace", "Positions", "Select", "Stage", "TokenReducer", "View"]


@dataclass
class Pass:
    """One input, from its prefill to its last token."""

    length: int
    valid: torch.Tensor
    segments: list[Segment]
    given_positions: torch.Tensor | None = None
    """Position ids that the decoder was called with."""
    grid_positions: bool = False
    """Positions are places in image grids (M-RoPE): renumbered, they would lose their meaning, so they never are."""
    seen: dict[int, Seen] = field(default_factory=dict)
    hidden: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    encoded: dict[str, Encoded] = field(default_factory=dict)
    pictures: Callable[[], list[list[Picture]]] = list
    memory: list[dict[str, Any]] = field(default_factory=list)
    deep: list[torch.Tensor] = field(default_factory=list)
    """Visual features still to be added after layer 0, 1, ... (DeepStack), on the current sequence ``[B, L, D]``."""
    prefill: bool = True


class TokenReducer:
    """Installs the hooks for ``stages`` on a model; ``close`` removes them.

    Args:
        anatomy: of a vision-language model.
        stages: in order of depth.
        positions: ``keep`` the survivors' position ids (gaps stay) or ``renumber`` them.
        name: for error messages.
        encoder_stages: where patches leave inside the vision encoder; then a stage before the LLM must take away the
            tokens of those that have left (see ``View.encoder_slots``).
        encoder: the same as an encoder that is shortened already; closed with the reducer.

    Raises:
        Refused: the model, its encoder or its attention kernel cannot do what the stages ask for.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        stages: Iterable[Stage],
        positions: Positions,
        name: str,
        encoder_stages: Sequence[BlockStage] = (),
        encoder: ShortEncoder | None = None,
    ) -> None:
        if anatomy.vlm is None or anatomy.decoder is None or anatomy.image_token_id is None:
            raise Refused(f"{name} needs a vision-language model; this model is {anatomy.description}")
        self.name = name
        self.positions = positions
        self.anatomy = anatomy
        self.decoder: Decoder = anatomy.decoder
        # What enters layer 0 is what the decoder is called with: both names mean the same place.
        self.stages = [
            replace(stage, layer=-1) if stage.layer == 0 else stage
            for stage in sorted(stages, key=lambda stage: stage.layer)
        ]
        self._check_depth()
        self._check_kernel()
        self.visual_per_layer: torch.Tensor | None = None
        """Visual tokens seen by each decoder layer, ``[B, layers]``, of the latest input."""
        self.visual_total: torch.Tensor | None = None
        """Visual tokens of each sample before any reduction, ``[B]``."""
        self.kept: dict[int, list[torch.Tensor]] = {}
        """Original places of the surviving visual tokens, per stage layer and sample (latest input)."""
        self.arriving: dict[int, list[int]] = {}
        """Visual tokens that reached each stage, per stage layer and sample (latest input)."""
        self.renumbered = False
        """Whether position ids were renumbered (latest input)."""
        self.cached_per_layer: torch.Tensor | None = None
        """Visual tokens left in each layer's cache, ``[B, layers]``, of the latest input; ``None`` = those it saw."""
        self.watch: Callable[[View, Reduction], None] | None = None
        """Called with what each stage saw of a sample and what it decided; for those who draw it."""
        self.encoder = encoder
        """What shortens the vision encoder, if something does."""
        self._watcher: Watcher | None = None
        self._ids: torch.Tensor | None = None
        self._passes: weakref.WeakKeyDictionary[Any, Pass] = weakref.WeakKeyDictionary()
        self._current: Pass | None = None
        self._undo: list[Callable[[], None]] = []
        try:
            if encoder_stages:
                self.encoder = ShortEncoder(anatomy, encoder_stages, name)
            if self.encoder is not None:
                self._undo.append(self.encoder.close)
            self._install(anatomy.vlm)
        except BaseException:
            self.close()
            raise

    def _check_depth(self) -> None:
        depth = len(self.decoder.layers)
        floor = -1
        places = [stage.layer for stage in self.stages]
        for place in places:
            if places.count(place) > 1:
                where = "before the LLM" if place < 0 else f"before layer {place}"
                raise Refused(f"{self.name} has two stages {where}: make them one")
        for stage in self.stages:
            if not -1 <= stage.layer < depth:
                raise Refused(
                    f"{self.name} would prune before layer {stage.layer}; "
                    f"this model has {depth} layers (0..{depth - 1})"
                )
            for layer in (*stage.observes, *(layer for layer, _ in stage.observes_hidden)):
                if not max(floor, 0) <= layer < stage.layer:
                    raise Refused(
                        f"{self.name} needs the attention of layer {layer}, which does not lie between its stages "
                        f"at {floor} and {stage.layer}"
                    )
            floor = stage.layer

    def _check_kernel(self) -> None:
        kernel = str(self.decoder.config._attn_implementation)
        if any(stage.weigh for stage in self.stages) and not any(
            name in kernel for name in ("sdpa", "eager")
        ):
            raise Refused(
                f"{self.name} adds a bias to attention logits, which the '{kernel}' kernel cannot take: load the model "
                "with attn_implementation='sdpa', or turn the bias off"
            )

    # --- hooks ------------------------------------------------------------------------------------------------

    def _install(self, vlm: torch.nn.Module) -> None:
        def keep(handle: Any) -> None:
            self._undo.append(handle.remove)

        if self.stages:
            watches = [watch for stage in self.stages for watch in stage.observes_encoder]
            self._watcher = Watcher(self.anatomy, watches, self.name)
            self._undo.append(self._watcher.close)
        keep(vlm.register_forward_pre_hook(self._on_vlm, with_kwargs=True))
        inner = self.decoder.module
        keep(inner.register_forward_pre_hook(self._on_decoder, with_kwargs=True))
        keep(inner.register_forward_hook(self._after_decoder, with_kwargs=True, always_call=True))
        # Layers whose arguments differ from those that the decoder makes for all of them.
        own = [stage.layer for stage in self.stages if stage.layer >= 0 or stage.weigh]
        own += [stage.trims for stage in self.stages if stage.trims is not None]
        for number, layer in enumerate(self.decoder.layers):
            if own and number >= min(own):
                keep(layer.module.register_forward_pre_hook(self._on_layer(number), with_kwargs=True))
            if self.stages:
                keep(layer.module.register_forward_hook(self._after_layer(number)))
        for number in sorted({layer for stage in self.stages for layer in stage.observes}):
            self._undo.append(
                tap_attention(self.decoder.layers[number].attention.module, self._on_attention(number))
            )
        for number, place in sorted({entry for stage in self.stages for entry in stage.observes_hidden}):
            keep(self._watch_hidden(number, place))

    def _watch_hidden(self, number: int, place: HiddenPlace) -> Any:
        """A hook that notes one hidden state during prefill. Only our own hook has cut what enters a layer by now."""
        layer = self.decoder.layers[number]
        modules = {"attention_in": layer.attention.module, "mlp_in": layer.mlp.module}
        modules |= {"attention_out": modules["attention_in"], "mlp_out": modules["mlp_in"]}
        module = modules.get(place, layer.module)

        def note(value: Any) -> None:
            current = self._current
            if current is not None and current.prefill:
                current.hidden[number, place] = value[0] if isinstance(value, tuple) else value

        def before(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            note(args[0] if args else kwargs["hidden_states"])

        def after(_: torch.nn.Module, args: Any, output: Any) -> None:
            note(output)

        if place in ("input", "attention_in", "mlp_in"):
            return module.register_forward_pre_hook(before, with_kwargs=True)
        return module.register_forward_hook(after)

    def close(self) -> None:
        """Remove all hooks."""
        while self._undo:
            self._undo.pop()()
        self._ids = self._current = None

    def _on_vlm(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._ids = kwargs.get("input_ids", args[0] if args else None)

    def _on_attention(self, layer: int) -> Callable[[Seen], None]:
        def tap(seen: Seen) -> None:
            if self._current is not None and self._current.prefill:
                self._current.seen[layer] = seen

        return tap

    def _on_decoder(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            raise BadInput(f"{self.name}: the inner language model must be called with keyword arguments")
        kwargs = dict(kwargs)
        cache = kwargs.get("past_key_values")
        if cache is None and kwargs.get("use_cache", self.decoder.config.use_cache):
            # The model would make this cache itself; making it here lets the later steps find their pass.
            cache = kwargs["past_key_values"] = DynamicCache(config=self.decoder.config)
        if cache is not None and not isinstance(cache, DynamicCache):
            raise Refused(
                f"{self.name} makes layers of different lengths, which {type(cache).__name__} cannot hold; "
                "use the default dynamic cache"
            )
        if cache is None or cache.get_seq_length() == 0:
            self._current = self._begin(kwargs)
            if cache is not None:
                if self.stages:
                    _hold_whole(cache)
                self._passes[cache] = self._current
        else:
            known = self._passes.get(cache)
            if known is None:
                raise BadInput(
                    f"{self.name}: this cache was filled before the method was applied; start from the prompt"
                )
            self._current = known
            self._continue(known, cache, kwargs)
        return args, kwargs

    def _after_decoder(self, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        current, self._current, self._ids = self._current, None, None
        if self._watcher is not None:
            self._watcher.take()
        if current is not None:
            cache = kwargs.get("past_key_values")
            if current.prefill and output is not None and cache is not None:
                self._trim(current, cache)
            for segment in current.segments:
                segment.step.clear()
            current.seen.clear()
            current.hidden.clear()
            current.encoded.clear()
            current.memory.clear()
            current.pictures = list
            current.prefill = False

    def _on_layer(self, number: int) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
        stage = next((stage for stage in self.stages if stage.layer == number), None)

        def hook(
            module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            current = self._current
            if current is None:
                return args, kwargs
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs["hidden_states"]
            if stage is not None and current.prefill:
                hidden = self._shorten(current, stage, hidden)
            segment = current.segments[-1] if current.prefill else _segment_of(current, number)
            if segment.first >= 0 or segment.weight is not None:
                self._cut_arguments(current, segment, number, hidden, kwargs)
            if args:
                return (hidden, *args[1:]), kwargs
            kwargs["hidden_states"] = hidden
            return args, kwargs

        return hook

    def _after_layer(self, number: int) -> Callable[[torch.nn.Module, Any, Any], torch.Tensor | None]:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> torch.Tensor | None:
            current = self._current
            if current is None or not current.prefill or number >= len(current.deep):
                return None
            result: torch.Tensor = output + current.deep[number]
            return result

        return hook

    # --- prefill ----------------------------------------------------------------------------------------------

    def _begin(self, kwargs: dict[str, Any]) -> Pass:
        embeds = kwargs.get("inputs_embeds")
        if self._ids is None or embeds is None:
            raise BadInput(
                f"{self.name} finds visual tokens by their placeholder ids: pass input_ids, not inputs_embeds"
            )
        batch, length = embeds.shape[:2]
        ids = self._ids
        if ids.shape[1] != length:
            raise BadInput(
                f"{self.name} finds {ids.shape[1]} token ids for {length} embeddings: another method has shortened the "
                "prompt already; leave one out, or let the one in the encoder restore its patches (restore=true)"
            )
        visual = torch.zeros_like(ids, dtype=torch.bool)
        for number in self.anatomy.visual_token_ids.values():
            visual |= ids == number
        if not bool(visual.any()):
            raise BadInput(f"{self.name} prunes visual tokens, and this input has no image or video")
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise BadInput(
                f"{self.name} takes a 2-D attention mask [batch, length]; a {mask.dim()}-D one was given"
            )
        valid = torch.ones_like(visual) if mask is None else mask[:, :length].bool()
        everything = torch.arange(length, device=embeds.device).expand(batch, -1)
        start = Segment(-1, everything, valid, visual & valid, valid.new_zeros(batch, dtype=torch.long))
        current = Pass(length, valid, [start], memory=[{} for _ in range(batch)])
        positions = kwargs.get("position_ids")
        current.given_positions = positions
        current.grid_positions = positions is not None and positions.dim() == 3
        if self._watcher is not None:
            current.encoded = calls = self._watcher.take()
            pictures: list[list[Picture]] = []

            def look() -> list[list[Picture]]:
                if not pictures:
                    pictures.extend(pictures_of(calls, self.anatomy, ids, start.visual))
                return pictures

            current.pictures = look
        self.kept, self.arriving, self.renumbered, self.cached_per_layer = {}, {}, False, None
        self.visual_total = start.visual.sum(1)
        self.visual_per_layer = self.visual_total.unsqueeze(1).repeat(1, len(self.decoder.layers))
        self._take_deep_features(current, kwargs, visual)
        for stage in self.stages:
            if stage.layer == -1:
                kwargs["inputs_embeds"] = self._shorten(current, stage, embeds)
                self._cut_model_inputs(current, kwargs)
        return current

    def _take_deep_features(self, current: Pass, kwargs: dict[str, Any], visual: torch.Tensor) -> None:
        """DeepStack models add visual features after their first layers, at full length: do it on the short one."""
        features = kwargs.get("deepstack_visual_embeds")
        if features is None or not self.stages:
            return
        embeds = kwargs["inputs_embeds"]
        for level in features:
            dense = torch.zeros_like(embeds)
            dense[visual] = level.to(embeds.device, embeds.dtype)
            current.deep.append(dense)
        kwargs["deepstack_visual_embeds"] = kwargs["visual_pos_masks"] = None

    def _shorten(self, current: Pass, stage: Stage, hidden: torch.Tensor) -> torch.Tensor:
        """Run one stage: ask the method, build the shorter sequence, remember what went."""
        before = current.segments[-1]
        assert self.visual_total is not None
        assert self.visual_per_layer is not None
        rows: list[Row] = []
        positions = positions_of(before, current.given_positions)
        slots = None if self.encoder is None else self.encoder.slots
        for sample in range(hidden.shape[0]):
            places = before.visual[sample].nonzero().squeeze(-1)
            others = (before.valid[sample] & ~before.visual[sample]).nonzero().squeeze(-1)
            if not len(places):
                rows.append(Row(others, torch.zeros_like(others, dtype=torch.bool), None, None, places))
                continue
            original = before.columns[sample, places]
            view = View(
                tokens=hidden[sample, places],
                index=places,
                original=original,
                ordinal=(current.segments[0].visual[sample].long().cumsum(0) - 1)[original],
                text=hidden[sample, others],
                text_index=others,
                total=int(self.visual_total[sample]),
                layer=stage.layer,
                seed=stage.seed,
                memory=current.memory[sample],
                deep=tuple(features[sample] for features in current.deep),
                weight=None if before.weight is None else before.weight[sample],
                _positions=positions[..., sample, :],
                _slots=slots,
                _sample=sample,
                _seen=current.seen,
                _hidden=current.hidden,
                _pictures=partial(_of_sample, current.pictures, sample),
            )
            reduction = stage.reduce(view)
            if self.watch is not None:
                self.watch(view, reduction)
            rows.append(arrange(reduction, view))
        self.arriving[stage.layer] = before.visual.sum(1).tolist()
        self.kept[stage.layer] = [before.columns[b, row.place[row.visual]] for b, row in enumerate(rows)]
        counts = torch.tensor([len(kept) for kept in self.kept[stage.layer]], device=hidden.device)
        self.visual_per_layer[:, max(stage.layer, 0) :] = counts.unsqueeze(1)
        for layer in stage.observes:
            current.seen.pop(layer, None)
        for entry in stage.observes_hidden:
            current.hidden.pop(entry, None)
        if not any(later.observes_encoder for later in self.stages[self.stages.index(stage) + 1 :]):
            for call in current.encoded.values():
                call.release()
        if all(
            row.combine is None and torch.equal(row.place, before.valid[b].nonzero().squeeze(-1))
            for b, row in enumerate(rows)
        ):
            return hidden
        renumber = (stage.positions or self.positions) == "renumber" and not current.grid_positions
        self.renumbered |= renumber
        tokens = current.valid.sum(1)
        segment, index = assemble(stage.layer, before, tokens, rows, renumber=renumber, weigh=stage.weigh)
        current.segments.append(segment)
        current.deep = [reduced(features, rows, index, segment) for features in current.deep]
        return reduced(hidden, rows, index, segment)

    def _trim(self, current: Pass, cache: Any) -> None:
        """The prompt is read: cut the caches of layers in front of a stage that wants it to what the stage has left."""
        trimming = [stage for stage in self.stages if stage.trims is not None and stage.trims < stage.layer]
        if not trimming or len(current.segments) == 1:
            return
        segments = [whole := current.segments[0]]
        made: tuple[Segment, Segment] | None = None
        left = []
        for number in range(len(self.decoder.layers)):
            own = target = _segment_of(current, number)
            for stage in trimming:
                if stage.trims is not None and stage.trims <= number < stage.layer:
                    target = _segment_of(current, stage.layer)
            if target is not own:
                cut_cache(cache.layers[number], locate(target.columns, own.columns))
            if made is None or made[0] is not own or made[1] is not target:
                made = (own, target)
                if target is not whole:
                    segments.append(trimmed(own, target, number or -1))
            left.append(target.visual.sum(1))
        current.segments = segments
        self.cached_per_layer = torch.stack(left, dim=1)

    def _cut_model_inputs(self, current: Pass, kwargs: dict[str, Any]) -> None:
        """Mask and positions of the whole decoder, after a stage before the LLM."""
        segment = current.segments[-1]
        if segment is current.segments[0]:
            return
        # An explicit mask also keeps transformers from taking gaps in the position ids for packed sequences.
        given = kwargs.get("attention_mask")
        dtype = torch.long if given is None else given.dtype
        kwargs["attention_mask"] = segment.valid.to(dtype)
        given = current.given_positions
        if segment.renumbered is not None or given is None:
            kwargs["position_ids"] = positions_of(segment, None)
        else:  # M-RoPE: with the place in the text, where there is one
            kwargs["position_ids"] = gather_last(given, segment.columns)

    # --- decode -----------------------------------------------------------------------------------------------

    def _continue(self, current: Pass, cache: Any, kwargs: dict[str, Any]) -> None:
        """A later step: cut the prefix of the mask to what the first layers hold, and set the positions."""
        segment = _segment_of(current, -1)
        if segment is current.segments[0]:
            return
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2:
            kwargs["attention_mask"] = cut_2d(mask, segment, current.length)
        elif mask is not None:
            kwargs["attention_mask"] = cut_columns(mask, segment.columns, segment.valid, current.length)
        elif not bool(segment.valid.all()):
            fresh = kwargs["inputs_embeds"].shape[1] + cache.get_seq_length() - segment.columns.shape[1]
            kwargs["attention_mask"] = visible(segment, segment.valid.shape[1] + fresh).long()
        positions = kwargs.get("position_ids")
        if segment.renumbered is not None:
            if positions is not None:
                kwargs["position_ids"] = positions - segment.shift.view(-1, 1)
        elif positions is None:
            fresh = kwargs["inputs_embeds"].shape[1]
            start = cache.get_seq_length() - segment.columns.shape[1] + current.length
            kwargs["position_ids"] = torch.arange(
                start, start + fresh, device=segment.columns.device
            ).unsqueeze(0)

    def _cut_arguments(
        self, current: Pass, segment: Segment, layer: int, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> None:
        """Arguments that the decoder made once for all its layers, cut for the layers of ``segment``."""
        mask = kwargs.get("attention_mask")
        rotary = kwargs.get("position_embeddings")
        key = (id(mask), id(rotary))
        ready = segment.step.get(key)
        if ready is None:
            cache = kwargs.get("past_key_values")
            # All layers of a segment hold the same number of keys.
            keys = hidden.shape[1] + (0 if cache is None else cache.get_seq_length(layer))
            ready = {"attention_mask": mask}
            if segment.first >= 0:
                ready = self._cut(current, segment, keys, hidden, mask, rotary, kwargs.get("position_ids"))
            if segment.weight is not None:
                short = ready["attention_mask"]
                if short is None:
                    short = causal_mask(segment, hidden.shape[1], keys)
                ready["attention_mask"] = weighed(segment, short, hidden.dtype)
            segment.step[key] = ready
        kwargs.update({name: value for name, value in ready.items() if name in kwargs})

    def _cut(
        self,
        current: Pass,
        segment: Segment,
        keys: int,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        positions: torch.Tensor | None,
    ) -> dict[str, Any]:
        outer = _segment_of(current, -1)
        # Places of the segment's tokens among the tokens that the decoder's own arguments speak of.
        local = locate(segment.columns, outer.columns)
        if mask is None:
            mask = self._padding_mask(segment, keys, hidden)
        elif mask.dim() == 2:
            mask = cut_2d(mask, segment, outer.columns.shape[1], local)
        elif current.prefill and not segment.ordered:
            mask = causal_mask(segment, hidden.shape[1], keys, mask.dtype)
        else:
            if current.prefill:
                rows = local.unsqueeze(1).unsqueeze(-1).expand(-1, mask.shape[1], -1, mask.shape[3])
                mask = mask.expand(len(local), -1, -1, -1).gather(2, rows)
            mask = cut_columns(mask, local, segment.valid, outer.columns.shape[1])
        result: dict[str, Any] = {"attention_mask": mask}
        if current.prefill:
            positions = None if positions is None else gather_last(positions, local)
            if rotary is not None:
                cos, sin = rotary
                rotary = (gather_rows(cos, local), gather_rows(sin, local))
        if segment.inside and positions is not None and rotary is not None:
            later = positions - (segment.shift - outer.shift).view(-1, 1)
            positions = segment.renumbered if current.prefill else later
            assert self.decoder.rotary is not None
            rotary = self.decoder.rotary(hidden, position_ids=positions)
        return {**result, "position_ids": positions, "position_embeddings": rotary}

    def _padding_mask(self, segment: Segment, keys: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """``None`` was right for the full sequence; samples that keep different numbers need a mask."""
        if bool(segment.valid.all()):
            return None
        implementation = self.decoder.config._attn_implementation
        if "flash" in implementation:
            return visible(segment, keys).long()
        dtype = hidden.dtype if "eager" in implementation else torch.bool
        return causal_mask(segment, hidden.shape[1], keys, dtype)


def _of_sample(pictures: Callable[[], list[list[Picture]]], sample: int) -> list[Picture]:
    found = pictures()
    return found[sample] if found else []


def _segment_of(current: Pass, layer: int) -> Segment:
    return [segment for segment in current.segments if segment.first <= layer][-1]


def _hold_whole(cache: DynamicCache) -> None:
    """Let layers with a sliding window keep all keys, so that what leaves can be found; their mask slides as before."""
    cache.layers = [
        DynamicLayer() if slides else layer
        for layer, slides in zip(cache.layers, cache.is_sliding, strict=True)
    ]
