"""EAGLE: a one-layer head predicts the target's next features, and its tokens form the tree that is verified.

Li et al., "EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty" (2401.15077): drafting features is
easier than drafting tokens, provided that the head is told which token was chosen. "EAGLE-2: Faster Inference of
Language Models with Dynamic Draft Trees" (2406.16858): the tree grows where the head is confident.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field

from zoo.engines.draft_heads import HeadText, TrainedHeads, final_hidden, how_to_train, output_of
from zoo.engines.rank_trees import RankTree, parse_paths
from zoo.engines.training import Group, Loss, Recipe, Task
from zoo.errors import BadInput
from zoo.families.decoding import BudgetedDecoder
from zoo.interface import register
from zoo.methods.decoding._eagle_drafter import EagleDrafter
from zoo.methods.decoding._eagle_head import EagleHead, agreement, head_loss
from zoo.methods.decoding._eagle_trees import DynamicTree, Growth, StaticTree
from zoo.training import Lesson, Setting, Trainable

if TYPE_CHECKING:
    from zoo.models import LoadedModel

PAPER_TREE = parse_paths(
    "0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 0000 0001 0002 00000 00001"
)
"""EAGLE-1's tree of 25 nodes."""


@register("eagle")
class Eagle(BudgetedDecoder, Trainable):
    """Drafts trees with a trained head; ``zoo train eagle`` makes one."""

    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=3e-5,
        betas=(0.9, 0.95),
        clip=0.5,
        clip_by="value",
        warmup=0.0025,
        schedule="linear",
        epochs=20,
        batch=4,
    )

    heads: str | None = Field(
        None, description="Folder with a trained head. Or give apply(..., heads=EagleHead)."
    )
    tree: Literal["dynamic", "static"] = Field(
        "dynamic",
        description="dynamic: EAGLE-2, grown where the head is confident; static: EAGLE-1's 25 nodes.",
    )
    nodes: int = Field(
        60, ge=2, le=512, description="Size of a dynamic tree, the last committed token included."
    )
    depth: int = Field(
        7, ge=0, le=32, description="Expansions of a dynamic tree: it is one deeper than that."
    )
    top_k: int = Field(10, ge=1, le=64, description="Nodes expanded per level, and successors of each.")
    noise: float = Field(
        0.2, ge=0, description="Training: noise on the features, at a length of 512 (more on shorter text)."
    )

    def drafter(
        self, loaded: LoadedModel, *, heads: EagleHead | None = None, **resources: Any
    ) -> EagleDrafter:
        """Read the head, unless it is given.

        Raises:
            BadInput: no head, or none that can be read.
            Refused: the head of another model.
        """
        if heads is None:
            if self.heads is None:
                raise BadInput(f"eagle needs a head trained for this very model: {how_to_train(self.slug)}")
            heads = EagleHead.open(self.heads, loaded)
        static = RankTree(PAPER_TREE)
        plant: Callable[[torch.Tensor], Growth] = partial(DynamicTree, width=self.top_k, nodes=self.nodes)
        if self.tree == "static":
            plant = partial(StaticTree, tree=static)
        depth = self.depth if self.tree == "dynamic" else max(static.depths) - 1
        embed = loaded.model.get_input_embeddings()
        return EagleDrafter(heads, embed, output_of(loaded.model), plant, depth)

    def prepare(
        self, loaded: LoadedModel, examples: Sequence[Any], heldout: Sequence[Any], setting: Setting
    ) -> Lesson:
        """A head to learn what the frozen model's features are.

        Raises:
            BadInput: the model has no tokenizer.
        """
        text = HeadText.of(loaded, self.slug, examples, heldout, setting.length)
        head = EagleHead.fresh(loaded, setting.seed)
        embed, output = loaded.model.get_input_embeddings(), output_of(loaded.model)

        def loss(batch: dict[str, torch.Tensor], step: int) -> Loss:
            return head_loss(head, final_hidden(loaded.model, batch), batch, embed, output, self.noise)

        def finish() -> TrainedHeads:
            head.facts = {"model": loaded.ref, "revision": loaded.revision}
            return TrainedHeads(head.eval())

        def measure() -> dict[str, float]:
            return {"held-out agreement with the model": agreement(head, loaded.model, text)}

        task = Task([Group(dict(head.named_parameters()))], text.learnt, text.collate, loss, head)
        return Lesson(task, finish, measure)
