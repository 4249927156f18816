"""Loading models, and knowing where their parts are.

``load_model`` is in ``zoo.models.loading``, short names in ``zoo.models.names``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from zoo.models.anatomy import Anatomy


@dataclass
class LoadedModel:
    """A transformers model with what is needed to feed it.

    Attributes:
        model: the transformers model, in ``eval`` mode.
        processor: tokenizer, image processor or multimodal processor; ``None`` for a bare model.
        ref: the reference it was loaded from (short name, hub id or folder).
        revision: commit or digest of the weights, when known.
    """

    model: Any
    processor: Any = None
    ref: str = "in memory"
    revision: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def anatomy(self) -> Anatomy:
        """Where its parts are (rebuilt on every call: surgery changes it)."""
        from zoo.models.anatomy import anatomy_of

        return anatomy_of(self.model)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, also when it is inside a processor; ``None`` when there is none."""
        return getattr(
            self.processor, "tokenizer", self.processor if hasattr(self.processor, "decode") else None
        )

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return next(self.model.parameters()).dtype


def __getattr__(name: str) -> Any:
    if name == "load_model":
        from zoo.models.loading import load_model

        return load_model
    raise AttributeError(name)
