"""Small modules that draft for one model, trained beside it: their files, and what they learn from.

A folder with heads holds ``heads.safetensors`` and ``heads.json``: which method they are for, the sizes from which the
module is built, and facts about their training.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from zoo.engines.language_modelling import TokenExample, collate, encode
from zoo.errors import BadInput, Refused, RunFailed
from zoo.models import LoadedModel

WEIGHTS, FACTS = "heads.safetensors", "heads.json"
MEASURED = 64
"""Held-out examples that heads are measured on, at most."""
_FORMAT = "efficiency-zoo draft heads 1"
H = TypeVar("H", bound="DraftHeads")
Output = Callable[[torch.Tensor], torch.Tensor]
"""From hidden states ``[..., hidden]`` to logits ``[..., vocabulary]``."""


class DraftHeads(nn.Module):
    """Base of the modules. They read the target's final hidden states (those that its output layer reads).

    Args:
        sizes: JSON values to build the module from; ``hidden`` and ``vocabulary`` are those of the target.
    """

    method: ClassVar[str]
    """Slug of the method that they are for."""

    def __init__(self, sizes: Mapping[str, Any]) -> None:
        super().__init__()
        self.sizes = dict(sizes)
        self.facts: dict[str, Any] = {}
        """About the training; kept with the weights."""

    @classmethod
    def open(cls: type[H], ref: str | Path, loaded: LoadedModel) -> H:
        """Read heads for ``loaded``, and put them where it is.

        Args:
            ref: a folder that ``write_heads`` made, or the output folder of the training.
            loaded: the target.

        Raises:
            BadInput: there are no such heads there.
            Refused: they were made for a model of another size.
        """
        folder = Path(ref).expanduser()
        if not (folder / FACTS).is_file() and (folder / "model" / FACTS).is_file():
            folder = folder / "model"
        try:
            stored = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            if stored["format"] != _FORMAT or stored["method"] != cls.method:
                raise BadInput(f"{folder} holds heads for {stored['method']}, not for {cls.method}")
            heads = cls(stored["sizes"])
            heads.facts = dict(stored["facts"])
            heads.load_state_dict(load_file(folder / WEIGHTS))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise BadInput(
                f"{ref} holds no heads that can be read ({reason}): {how_to_train(cls.method)}"
            ) from None
        needed = target_sizes(loaded)
        for name, value in needed.items():
            if heads.sizes[name] != value:
                raise Refused(
                    f"the heads in {ref} were trained for {heads.facts.get('model', 'another model')} ({name} size "
                    f"{heads.sizes[name]}), and {loaded.ref} has {value}: {how_to_train(cls.method)}"
                )
        return heads.to(loaded.device, loaded.dtype).eval()


def how_to_train(method: str) -> str:
    """The commands, as the end of an error message."""
    return f"run zoo train {method} --model MODEL --output DIR, then zoo run {method} --heads DIR"


def target_sizes(loaded: LoadedModel) -> dict[str, int]:
    """Width of the final hidden states and of the logits."""
    weight = output_layer(loaded.model).weight
    return {"hidden": weight.shape[1], "vocabulary": weight.shape[0]}


def output_layer(model: Any) -> nn.Linear:
    """The linear layer that turns final hidden states into logits."""
    layer: nn.Linear = model.get_output_embeddings()
    return layer


def output_of(model: Any) -> Output:
    """The output layer as a function that takes hidden states of any type."""
    layer = output_layer(model)
    return lambda hidden: layer(hidden.to(layer.weight.dtype))


@dataclass(frozen=True)
class TrainedHeads:
    """What a training of heads leaves; ``backbone`` is the target where that learnt too."""

    heads: DraftHeads
    backbone: LoadedModel | None = None

    def save(self, folder: str | Path) -> Path:
        """Write heads, and backbone and tokenizer beside them, to a new folder: all or nothing.

        Raises:
            RunFailed: the folder cannot be written.
        """
        folder = Path(folder)
        partial_folder = folder.with_name(f"{folder.name}.partial")
        heads = self.heads
        stored = {"format": _FORMAT, "method": heads.method, "sizes": heads.sizes, "facts": heads.facts}
        weights = {name: value.detach().cpu().contiguous() for name, value in heads.state_dict().items()}
        shutil.rmtree(partial_folder, ignore_errors=True)  # of a process that was killed
        try:
            partial_folder.mkdir(parents=True)
            if self.backbone is not None:
                self.backbone.model.save_pretrained(partial_folder)
                if self.backbone.tokenizer is not None:
                    self.backbone.tokenizer.save_pretrained(partial_folder)
            save_file(weights, partial_folder / WEIGHTS)
            (partial_folder / FACTS).write_text(f"{json.dumps(stored, indent=1)}\n", encoding="utf-8")
            partial_folder.replace(folder)
        except (OSError, SafetensorError) as error:
            raise RunFailed(f"{folder} cannot be written: {error}") from error
        finally:
            shutil.rmtree(partial_folder, ignore_errors=True)
        return folder


@dataclass(frozen=True)
class HeadText:
    """Text to train heads on and to measure them on, and how it is put into batches."""

    learnt: list[TokenExample]
    measured: list[TokenExample]
    padding: int
    device: torch.device

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        method: str,
        examples: Sequence[Any],
        heldout: Sequence[Any],
        length: int,
    ) -> HeadText:
        """Encode dialogues for ``loaded``.

        Raises:
            BadInput: the model has no tokenizer.
        """
        tokenizer = loaded.tokenizer
        if tokenizer is None:
            raise BadInput(f"{loaded.ref} has no tokenizer, so {method} cannot be trained on text for it")

        def encoded(dialogues: Sequence[Any]) -> list[TokenExample]:
            return list(chain.from_iterable(encode(tokenizer, item, length) for item in dialogues))

        measured = encoded(heldout[:MEASURED])[:MEASURED]
        return cls(encoded(examples), measured, tokenizer.pad_token_id or 0, loaded.device)

    def collate(self, examples: Sequence[TokenExample]) -> dict[str, torch.Tensor]:
        """One batch, see ``zoo.engines.language_modelling.collate``."""
        return collate(examples, self.padding, self.device)

    def batches(self, size: int = 4) -> list[dict[str, torch.Tensor]]:
        """The held-out examples."""
        return [
            self.collate(self.measured[first : first + size]) for first in range(0, len(self.measured), size)
        ]


@torch.no_grad()
def final_hidden(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Final hidden states ``[batch, tokens, hidden]`` of the frozen target, float32."""
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        use_cache=False,
        output_hidden_states=True,
        logits_to_keep=1,
    )
    hidden: torch.Tensor = output.hidden_states[-1].float()
    return hidden
