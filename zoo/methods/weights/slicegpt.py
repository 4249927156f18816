"""SliceGPT: rotate the residual stream into its principal components, and cut the last of them from every matrix.

Ashkboos et al.: SliceGPT: Compress Large Language Models by Deleting Rows and Columns, ICLR 2024 (arXiv 2401.15024).
The stream is rotated anew in front of every attention and every feed-forward block, by the eigenvectors of ``X^T X``
over its calibration activations there; matrices on the shortcuts lead from one rotation to the next (section 3.2). They
are weights too: slicing less than about a tenth of the channels saves nothing.

The authors' code first subtracts the mean from each embedding vector. That changes nothing in models with LayerNorm,
but does where norms are RMS norms, as in all models here: ``centre_embeddings`` is for comparisons with that code.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from zoo.engines.slicing import check_sliceable
from zoo.engines.training import Recipe
from zoo.errors import BadParameter
from zoo.families.recovery import LoraRecovery
from zoo.families.weights import Facts, Work
from zoo.interface import refuse, register
from zoo.methods.weights._slicegpt_rotation import centre_embeddings, rotate_and_slice
from zoo.models import LoadedModel
from zoo.models.anatomy import Decoder, DecoderLayer


@register("slicegpt")
class SliceGPT(LoraRecovery):
    """Rotation and slicing of the residual stream."""

    recipe: ClassVar[Recipe] = Recipe(learning_rate=2e-4, epochs=1, batch=4)

    sparsity: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="Fraction of decoder-layer weights to remove, the matrices on the shortcuts counted.",
    )
    slicing: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="The published ratio: fraction of the hidden size to cut; in place of sparsity.",
    )
    round_to: int = Field(8, ge=1, description="The new hidden size is a multiple of this, rounded down.")
    orientation: Literal["random", "pca"] = Field(
        "random",
        description="Mix the channels that stay by a random rotation, so that all are alike, or leave them in the "
        "order of their variance. The function is the same.",
    )
    slice_head: bool = Field(False, description="Cut the input of the LM head, too.")
    centre_embeddings: bool = Field(
        False, description="Subtract the mean of each embedding vector, as the released code does."
    )

    @model_validator(mode="after")
    def _one_budget(self) -> SliceGPT:
        if self.slicing is not None and "sparsity" in self.model_fields_set:
            raise ValueError("give sparsity (of the weights) or slicing (of the hidden size), not both")
        return self

    @property
    def removes_nothing(self) -> bool:
        """True when the budget is zero."""
        return (self.sparsity if self.slicing is None else self.slicing) == 0

    def check(self, loaded: LoadedModel) -> None:
        """A decoder on its own, whose blocks add to the residual stream without another norm.

        Raises:
            Refused: it is something else.
        """
        super().check(loaded)
        decoder = loaded.anatomy.decoder
        assert decoder is not None
        if loaded.anatomy.kind != "decoder" or decoder.head is None:
            raise refuse(self, "a decoder LLM on its own, with an LM head", loaded.anatomy.description)
        if any(layer.attention_norm is not None for layer in decoder.layers):
            raise refuse(
                self, "blocks that add to the residual stream as they are", "norms behind its blocks"
            )

    def weights_at(self, decoder: Decoder, width: int) -> int:
        """Weights of the decoder's layers once the residual stream has ``width`` channels, shortcuts included."""
        full = decoder.hidden_size
        last = full if not self.slice_head else width
        down = decoder.layers[-1].by_input.get("down", ())
        whole = sum(part.weight.numel() for part in down)
        total = (decoder.prunable_parameters() - whole) * width // full + whole * last // full
        return total + width * (width * (2 * len(decoder.layers) - 1) + last)

    def width(self, decoder: Decoder) -> int:
        """The new hidden size.

        Raises:
            BadParameter: nothing would be left.
        """
        full, step = decoder.hidden_size, self.round_to
        if self.slicing is not None:
            width = int((1 - self.slicing) * full) // step * step
        else:
            allowed = (1 - self.sparsity) * decoder.prunable_parameters()
            fitting = (
                w for w in range(full // step * step, 0, -step) if self.weights_at(decoder, w) <= allowed
            )
            width = next(fitting, 0)
        if not width:
            raise BadParameter(
                f"{self.slug}: so small a budget leaves none of {full} channels in steps of {step}; remove less"
            )
        return width

    def slice_to(
        self,
        width: int,
        decoder: Decoder,
        head: Any,
        windows: torch.Tensor,
        generator: torch.Generator,
        **options: Any,
    ) -> None:
        """Give the residual stream of ``decoder`` ``width`` channels; see ``rotate_and_slice`` for all arguments."""
        if self.centre_embeddings:
            centre_embeddings(decoder)
        rotate_and_slice(
            decoder,
            head,
            windows,
            width,
            head_width=width if self.slice_head else decoder.hidden_size,
            mixing=generator if self.orientation == "random" else None,
            **options,
        )

    def transform(self, work: Work) -> Facts:
        """Choose the width, rotate, slice."""
        decoder = work.decoder
        check_sliceable(decoder)
        full, width = decoder.hidden_size, self.width(decoder)
        self.slice_to(
            width,
            decoder,
            work.model,
            work.windows,
            work.generator(),
            batch=work.batch,
            device=work.device,
            progress=work.progress,
        )
        return {
            "hidden size": width,
            "hidden size of the dense model": full,
            "sliced": round(1 - width / full, 4),
        }

    def widths(self, layer: DecoderLayer) -> dict[str, int]:
        """One bar per layer: the channels that it reads."""
        parts = next(iter(layer.by_input.values()))
        return {"residual channels": parts[0].linear.in_features}
