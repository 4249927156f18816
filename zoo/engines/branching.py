"""Running a prompt once, then again from some decoder layer on with fewer of its tokens.

Methods that choose a layer by trial (what if these tokens left here?) ask the same question at every layer. The layers
before it are the same in all trials: :class:`Branches` notes what enters each layer during one pass over the prompt,
and continues from there with any subset of the tokens, several subsets at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from zoo.engines.images import Watcher, pictures_of
from zoo.engines.views import Picture
from zoo.errors import BadInput, Refused
from zoo.models import LoadedModel
from zoo.models.anatomy import Decoder


@dataclass(frozen=True)
class _Call:
    """What one decoder layer was called with: hidden states ``[1, L, D]`` and keyword arguments."""

    hidden: torch.Tensor
    arguments: Mapping[str, Any]

    def arguments_at(self, kept: torch.Tensor) -> dict[str, Any]:
        """The arguments for the tokens ``kept [W, K]`` alone, without a cache."""
        cut = dict(self.arguments)
        # Positions reach attention through the rotary embedding; gaps in the ids would look like packed sequences.
        cut |= {name: None for name in ("past_key_values", "position_ids") if name in cut}
        if "use_cache" in cut:
            cut["use_cache"] = False
        if cut.get("position_embeddings") is not None:
            cut["position_embeddings"] = tuple(part[0, kept] for part in cut["position_embeddings"])
        mask = cut.get("attention_mask")
        if mask is not None:
            # A 2-D mask could only hide padding, and there is none.
            square = (
                mask[0, 0, kept.unsqueeze(2), kept.unsqueeze(1)].unsqueeze(1) if mask.dim() == 4 else None
            )
            cut["attention_mask"] = square
        return cut


class Branches:
    """One prompt, noted in front of every decoder layer.

    Attributes:
        visual: places of the visual tokens ``[N]``.
        text: places of the other tokens ``[T]``.
        logits: next-token logits of the whole prompt, ``[V]`` float32.
        pictures: how each picture was packed, with the places of its tokens; see ``images.pictures_of``.

    Args:
        loaded: a vision-language model.
        inputs: of one sample, as its processor makes them.
        name: of the method that asks, for error messages.

    Raises:
        Refused: the model has no visual tokens.
        BadInput: more than one sample, padding, or no picture.
    """

    def __init__(self, loaded: LoadedModel, inputs: Mapping[str, Any], name: str) -> None:
        anatomy = loaded.anatomy
        if anatomy.vlm is None or anatomy.decoder is None or anatomy.decoder.head is None:
            raise Refused(f"{name} needs a vision-language model; this model is {anatomy.description}")
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if len(ids) != 1 or (mask is not None and not bool(mask.all())):
            raise BadInput(
                f"{name} looks at one sample at a time, without padding; {len(ids)} rows were given "
                "(call the processor once per sample)"
            )
        visual = torch.zeros_like(ids, dtype=torch.bool)
        for number in anatomy.visual_token_ids.values():
            visual |= ids == number
        if not bool(visual.any()):
            raise BadInput(f"{name} withdraws visual tokens, and this input has no image or video")
        self.visual = visual[0].nonzero().squeeze(-1)
        self.text = (~visual[0]).nonzero().squeeze(-1)
        self._decoder: Decoder = anatomy.decoder
        self._head = anatomy.decoder.head
        self._calls: list[_Call] = []
        self._added: dict[int, torch.Tensor] = {}
        watcher = Watcher(anatomy, (), name)
        try:
            self.logits = self._run(loaded.model, inputs)
            calls = watcher.take()
        finally:
            watcher.close()
        self.pictures: list[Picture] = pictures_of(calls, anatomy, ids, visual)[0] if calls else []

    @torch.no_grad()
    def _run(self, model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        latest: torch.Tensor | None = None

        def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if latest is not None and hidden is not latest:
                # The decoder itself adds something between its layers (DeepStack's visual features).
                self._added[len(self._calls) - 1] = hidden - latest
            arguments = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            self._calls.append(_Call(hidden, arguments))

        def after(module: torch.nn.Module, args: Any, output: Any) -> None:
            nonlocal latest
            latest = _hidden(output)

        hooks: list[Any] = []
        try:
            for layer in self._decoder.layers:
                hooks.append(layer.module.register_forward_pre_hook(before, with_kwargs=True))
                hooks.append(layer.module.register_forward_hook(after))
            logits: torch.Tensor = model(**{**inputs, "use_cache": False}).logits
        finally:
            for hook in hooks:
                hook.remove()
        return logits[0, -1].float()

    @property
    def depth(self) -> int:
        """Decoder layers."""
        return len(self._calls)

    @torch.no_grad()
    def logits_from(self, layer: int, kept: torch.Tensor) -> torch.Tensor:
        """Next-token logits when layers from ``layer`` on see only some tokens.

        Survivors keep their position ids; layers before ``layer`` saw the whole prompt.

        Args:
            layer: first layer (0-based) that runs short.
            kept: places that stay, each row ascending and ending at the last token, ``[W, K]``.

        Returns:
            ``[W, V]`` float32.
        """
        hidden = self._calls[layer].hidden[0, kept]
        for number in range(layer, self.depth):
            module = self._decoder.layers[number].module
            hidden = _hidden(module(hidden, **self._calls[number].arguments_at(kept)))
            if number in self._added:
                hidden = hidden + self._added[number][0, kept]
        logits: torch.Tensor = self._head(self._decoder.norm(hidden[:, -1]))
        return logits.float()


def _hidden(output: Any) -> torch.Tensor:
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
