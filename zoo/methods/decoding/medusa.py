"""Medusa: extra heads on the last hidden state guess the tokens after the next one, and a tree of guesses is verified.

Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads" (2401.10774). Head ``k``
ranks tokens for the place ``k + 1`` behind the next one, whatever stands in between; so the candidates are all
combinations of ranks, of which a fixed sparse tree is verified in one pass. Heads are trained on a frozen model
(Medusa-1, whose output stays the model's own) or together with it (Medusa-2).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field

from zoo.engines.draft_heads import HeadText, Output, how_to_train, output_of
from zoo.engines.drafting import Draft, Drafter, Row, Verified
from zoo.engines.rank_trees import RankTree, likeliest_tree, parse_paths
from zoo.engines.sampling import typical_path
from zoo.engines.training import Recipe
from zoo.errors import BadInput
from zoo.families.decoding import BudgetedDecoder
from zoo.interface import refuse, register
from zoo.methods.decoding._medusa_heads import MedusaHeads
from zoo.methods.decoding._medusa_training import frozen_lesson, joint_lesson
from zoo.training import Lesson, Setting, Trainable

if TYPE_CHECKING:
    from zoo.models import LoadedModel

PAPER_TREE = parse_paths(
    "0 1 2 3 4 5 6 7 8 9 00 01 02 03 04 05 06 07 08 09 10 11 12 13 14 15 16 20 21 22 30 31 40 50 60 70 80 90 "
    "000 001 002 003 004 005 006 007 008 009 010 011 012 020 021 030 040 050 060 070 100 101 200 0000 0001"
)
"""The authors' tree of 63 nodes that the release falls back on (``mc_sim_7b_63``)."""


class MedusaDrafter(Drafter):
    """Fills one tree from the heads' guesses at the last verified place."""

    needs = frozenset({"hidden-states"})
    tree = True
    costly = True

    def __init__(self, heads: MedusaHeads, output: Output, tree: RankTree) -> None:
        self.heads = heads
        self.output = output
        self.shape = tree
        self.hidden: dict[int, torch.Tensor] = {}

    def propose(self, rows: Sequence[Row]) -> list[Draft]:
        """All samples go through the heads at once."""
        hidden = torch.stack([self.hidden[row.index] for row in rows])
        guesses = self.heads.guesses(hidden, self.output, self.shape.width).tolist()
        return [
            Draft(self.shape.fill_by_depth(each), self.shape.parents, kinds=self.shape.paths)
            for each in guesses
        ]

    def observe(self, row: Row, verified: Verified) -> None:
        """Remember the hidden state from which the last committed token was chosen."""
        assert verified.hidden_states is not None
        place = -1 if verified.prefill else verified.path[-1] + 1 if verified.path else 0
        self.hidden[row.index] = verified.hidden_states[-1][place]

    def stop(self) -> None:
        """Forget the samples."""
        self.hidden = {}


def accept_typically(draft: Draft, p: torch.Tensor, *, epsilon: float, alpha: float) -> tuple[list[int], int]:
    """Medusa's rule for sampling: see ``typical_path``; the token behind what was accepted is the likeliest one."""
    parents = draft.parents if draft.parents is not None else range(-1, len(draft.tokens) - 1)
    path = typical_path(draft.tokens, parents, p, epsilon, alpha)
    return path, int(p[path[-1] + 1 if path else 0].argmax())


@register("medusa")
class Medusa(BudgetedDecoder, Trainable):
    """Drafts a fixed tree with trained heads; ``zoo train medusa`` makes them."""

    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-3, warmup=0.1, epochs=1, batch=8, accumulate=16)

    heads: str | None = Field(
        None, description="Folder with trained heads. Or give apply(..., heads=MedusaHeads)."
    )
    tree: Literal["paper", "measured"] = Field(
        "paper",
        description="paper: the authors' 63 nodes, as far as there are heads; measured: the tree of `nodes` nodes that "
        "is best by the heads' accuracy on held-out text.",
    )
    nodes: int = Field(63, ge=1, le=512, description="Size of the measured tree.")
    acceptance: Literal["exact", "typical"] = Field(
        "exact",
        description="When sampling. exact: the model's distribution is kept; typical: tokens that are likely enough "
        "are accepted, which is faster and not exact. Greedy decoding is exact with both.",
    )
    epsilon: float = Field(
        0.09, gt=0, lt=1, description="Typical acceptance: a probability that always suffices."
    )
    alpha: float = Field(
        0.3, gt=0, description="Typical acceptance: factor of exp(-entropy), the other threshold."
    )
    train_heads: int = Field(5, ge=1, le=16, description="Training: heads.")
    train_layers: int = Field(
        1, ge=1, le=8, description="Training: residual layers per head (with the same weights)."
    )
    own_output: bool = Field(
        True, description="Training: each head has an output matrix of its own; else they use the model's."
    )
    decay: float = Field(
        0.8, gt=0, le=1, description="Training: loss weight of each head relative to the one before."
    )
    joint: bool = Field(
        False, description="Training: the model learns too (Medusa-2); give heads trained before as `heads`."
    )
    heads_weight: float = Field(0.2, gt=0, description="Joint training: weight of the heads' loss.")
    joint_rank: int = Field(32, ge=1, description="Joint training: rank of the model's LoRA adapters.")

    def drafter(
        self, loaded: LoadedModel, *, heads: MedusaHeads | None = None, **resources: Any
    ) -> MedusaDrafter:
        """Read the heads, unless they are given.

        Raises:
            BadInput: no heads, or none that can be read.
            Refused: heads of another model.
        """
        if heads is None:
            if self.heads is None:
                raise BadInput(f"medusa needs heads trained for this very model: {how_to_train(self.slug)}")
            heads = MedusaHeads.open(self.heads, loaded)
        if self.tree == "paper":
            shape = RankTree(PAPER_TREE).within(len(heads), heads.sizes["vocabulary"])
        elif "accuracies" in heads.facts:
            shape = likeliest_tree(heads.facts["accuracies"], self.nodes)
        else:
            raise BadInput("medusa knows no accuracies of these heads to measure a tree by: set tree=paper")
        drafter = MedusaDrafter(heads, output_of(loaded.model), shape)
        if self.acceptance == "typical":
            drafter.rule = partial(accept_typically, epsilon=self.epsilon, alpha=self.alpha)
        return drafter

    def prepare(
        self, loaded: LoadedModel, examples: Sequence[Any], heldout: Sequence[Any], setting: Setting
    ) -> Lesson:
        """Heads to learn beside the frozen model, or both.

        Raises:
            BadInput: no tokenizer; no heads to begin a joint training with.
            Refused: joint training of a model with more than a decoder.
            NeedsExtra: a joint training without peft.
        """
        text = HeadText.of(loaded, self.slug, examples, heldout, setting.length)
        if not self.joint:
            heads = MedusaHeads.fresh(loaded, self.train_heads, self.train_layers, self.own_output)
            return frozen_lesson(loaded, heads, text, self.decay)
        if loaded.anatomy.kind != "decoder":
            raise refuse(self, "a decoder LLM for joint training", loaded.anatomy.description)
        if self.heads is None:
            raise BadInput(
                "a joint training begins with trained heads: train them with joint=false, then set heads=DIR"
            )
        heads = MedusaHeads.open(self.heads, loaded).float()
        return joint_lesson(
            loaded,
            heads,
            text,
            decay=self.decay,
            heads_weight=self.heads_weight,
            rank=self.joint_rank,
            seed=setting.seed,
        )
