"""``zoo new``: the files of a method, as a working example of its family.

The module does something simple and real (a baseline), so that it runs, and can be measured, before the first line
of the new idea is written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timezone
from difflib import get_close_matches
from pathlib import Path
from string import Template

from zoo.errors import BadInput, RunFailed

_SLUG = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Scaffold:
    """What was written, and what to do now."""

    paths: tuple[Path, ...]
    next_steps: str


@dataclass(frozen=True)
class _Example:
    """One family's example: a summary and facets for the card, the module, and the tiny model of its test."""

    summary: str
    facets: dict[str, str]
    properties: dict[str, bool]
    module: str
    model: str
    check: str


def scaffold(slug: str, family: str, into: Path | None = None) -> Scaffold:
    """Write card, module and test of a new method.

    Args:
        slug: its name, in lower case with dashes.
        family: ``weights``, ``decoding``, ``visual-tokens`` or ``encoder-tokens``.
        into: a checkout of the zoo; ``None`` = the one that runs. A card that is there already is kept.

    Raises:
        BadInput: a name that is taken or malformed, or no checkout. Nothing has been written.
        RunFailed: the files could not be written; those that were are removed again.
    """
    from taxonomy.card import CARDS
    from zoo.interface import implemented

    if not _SLUG.fullmatch(slug):
        raise BadInput(
            f"'{slug}' cannot be a method's name; use lower-case words joined by dashes, as in my-method"
        )
    if slug in implemented():
        raise BadInput(f"there is already a method called '{slug}' (zoo show {slug}); choose another name")
    root = into or Path(__file__).resolve().parents[2]
    cards, methods = root / "taxonomy" / "cards", root / "zoo" / "methods" / family.replace("-", "_")
    if not cards.is_dir() or not methods.is_dir() or not (root / "pyproject.toml").is_file():
        raise BadInput(f"{root} is not a checkout of the zoo; name one with --into DIR")

    example = _EXAMPLES[family]
    stem = slug.replace("-", "_")
    words = {
        "slug": slug,
        "name": " ".join(word.capitalize() for word in slug.split("-")),
        "cls": "".join(word.capitalize() for word in slug.split("-")),
        "stem": stem,
        "family": family,
        "folder": family.replace("-", "_"),
        "model": example.model,
        "check": Template(example.check).substitute(slug=slug),
        "summary": example.summary,
        "year": str(datetime.now(timezone.utc).year),
        "facets": "\n".join(f'{facet} = ["{term}"]' for facet, term in example.facets.items()),
        "properties": "\n".join(
            f"{name} = {str(value).lower()}" for name, value in example.properties.items()
        ),
    }
    card = cards / f"{slug}.toml"
    files = {
        card: _CARD,
        methods / f"{stem}.py": example.module,
        root / "tests" / "methods" / f"test_{stem}.py": _TEST,
    }
    has_card = card.is_file()
    if has_card:
        del files[card]
    for path in files:
        if path.exists():
            raise BadInput(f"{path} is there already; choose another name")
    _write({path: Template(text).substitute(words) for path, text in files.items()})
    near = [
        name
        for name in get_close_matches(slug, (path.stem for path in CARDS.glob("*.toml")), n=3)
        if name != slug
    ]
    return Scaffold(tuple(files), _next_steps(words, has_card, near))


def _write(files: dict[Path, str]) -> None:
    written: list[Path] = []
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            written.append(path)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        for path in written:
            path.unlink(missing_ok=True)
        reason = (error.strerror or str(error)).lower()
        raise RunFailed(f"could not write {written[-1] if written else 'the files'}: {reason}") from None


def _next_steps(words: dict[str, str], has_card: bool, near: list[str]) -> str:
    steps = [
        f"Try it:         zoo run {words['slug']} --model {words['model']}",
        f"Test it:        python -m pytest tests/methods/test_{words['stem']}.py tests/test_card_contracts.py",
        f"Write the idea: zoo/methods/{words['folder']}/{words['stem']}.py",
        f"Say what it is: taxonomy/cards/{words['slug']}.toml"
        + (" (it was there already)" if has_card else "")
        + ", then: zoo catalog build",
    ]
    if near:
        steps.append(f"Cards with similar names: {', '.join(near)}")
    return "\n".join(steps)


_CARD = '''\
slug = "$slug"
name = "$name"
title = "$name"
kind = "baseline"
summary = """
$summary"""
year = $year

[facets]
$facets

[properties]
$properties

[fidelity]
basis = "paper-text"
'''

_TEST = '''\
"""$name on a tiny random model. The contract tests check what its card declares."""

from __future__ import annotations

import torch

import zoo


def test_runs() -> None:
    loaded = zoo.load_model("$model")
    $check
'''

_WEIGHTS = '''\
"""$name: remove the FFN channels whose outgoing weights are smallest.

Magnitude pruning, as an example to start from: a channel scores the norm of its column in the down projection, and
the same share leaves every layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from zoo.engines.statistics import Watch
from zoo.engines.surgery import LayerCut
from zoo.errors import BadParameter
from zoo.families.weights import WeightPruner
from zoo.interface import register
from zoo.models.anatomy import Decoder, DecoderLayer


@register("$slug")
class $cls(WeightPruner):
    """Keeps the channels with the largest outgoing weights."""

    def observe(self, layer: DecoderLayer) -> dict[str, Watch]:
        """Nothing: the weights alone decide. A ``Watch`` on ``layer.mlp.down`` would see that layer's inputs."""
        return {}

    def decide(self, decoder: Decoder, seen: Sequence[Mapping[str, Any]]) -> list[LayerCut]:
        """Which channels of each layer stay."""
        share = self.channel_share(decoder)
        return [LayerCut(channels=self.kept(self.scores(layer), share)) for layer in decoder.layers]

    def scores(self, layer: DecoderLayer) -> torch.Tensor:
        """Importance of each channel, ``[channels]``."""
        return layer.mlp.down.weight.float().norm(dim=0)

    def kept(self, scores: torch.Tensor, share: float) -> torch.Tensor:
        """Mask of the channels that stay, ``[channels]``: all but the ``share`` with the lowest scores."""
        count = max(1, round(len(scores) * (1 - share)))
        mask = torch.zeros_like(scores, dtype=torch.bool)
        mask[scores.topk(count).indices] = True
        return mask

    def channel_share(self, decoder: Decoder) -> float:
        """``sparsity`` counts all weights of the decoder layers; only their FFN part can leave here."""
        total = decoder.prunable_parameters()
        ffn = sum(part.weight.numel() for x in decoder.layers for part in (*x.mlp.inputs, x.mlp.down))
        if self.sparsity * total >= ffn:
            raise BadParameter(f"{self.slug} cuts FFN channels only: sparsity must be < {ffn / total:.3f}")
        return self.sparsity * total / ffn
'''

_DECODING = '''\
"""$name: what followed this token last time will follow it again.

A bigram memory, as an example to start from: each token of prompt and output remembers its latest successor, and the
draft follows these links.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from zoo.engines.decoding import Context, Draft, Drafter, Row
from zoo.families.decoding import Decoder
from zoo.interface import register
from zoo.models import LoadedModel


class BigramDrafter(Drafter):
    """Latest successor of every token, per sample."""

    def __init__(self, draft_tokens: int) -> None:
        self.draft_tokens = draft_tokens
        self.after: dict[int, dict[int, int]] = {}
        self.read: dict[int, int] = {}

    def start(self, context: Context, rows: Sequence[Row]) -> None:
        """A new generation: forget the last one."""
        self.after = {row.index: {} for row in rows}
        self.read = {row.index: 0 for row in rows}

    def propose_row(self, row: Row) -> Draft:
        """Take in what is new, then follow the links from the last token."""
        after, begin = self.after[row.index], self.read[row.index]
        after.update(zip(row.tokens[begin:-1], row.tokens[begin + 1 :], strict=True))
        self.read[row.index] = len(row.tokens) - 1
        draft: list[int] = []
        token = row.tokens[-1]
        while len(draft) < min(self.draft_tokens, row.limit) and token in after:
            token = after[token]
            draft.append(token)
        return Draft(draft)


@register("$slug")
class $cls(Decoder):
    """Drafts by repeating the latest successors. The engine verifies, so the output stays the model's own."""

    draft_tokens: int = Field(4, ge=1, le=256, description="Tokens drafted per step, at most.")

    def drafter(self, loaded: LoadedModel, **resources: Any) -> BigramDrafter:
        """It needs nothing of the model."""
        return BigramDrafter(self.draft_tokens)
'''

_VISUAL = '''\
"""$name: keep visual tokens at even distances.

Uniform thinning before the LLM, as an example to start from: neither the picture nor the question is looked at.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from zoo.engines.reductions import Keep
from zoo.engines.tokens import Positions, Stage, View
from zoo.families.visual_tokens import KeepsShare, VisualTokenReducer, keep
from zoo.interface import register
from zoo.models.anatomy import Anatomy


@register("$slug")
class $cls(KeepsShare, VisualTokenReducer):
    """Keeps every n-th visual token."""

    positions: ClassVar[Positions] = "keep"

    keep_ratio: float = Field(0.25, gt=0, le=1, description="Fraction of the visual tokens that stays.")

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage, before the first decoder layer. ``Stage(2, ...)`` would stand in front of layer 2."""
        return [] if self.keeps_all else [Stage(-1, self.select)]

    def select(self, view: View) -> Keep:
        """The kept tokens of one sample; ``view.tokens`` are their embeddings ``[N, D]``."""
        tokens, count = len(view.tokens), self.count(len(view.tokens))
        return keep((torch.arange(count, device=view.tokens.device) * tokens) // count)
'''

_ENCODER = '''\
"""$name: in one block, keep patches at even distances.

Uniform thinning of an encoder, as an example to start from: [CLS] and other prefix tokens stay, every n-th patch
stays.
"""

from __future__ import annotations

import torch
from pydantic import Field

from zoo.engines.blocks import BlockStage, BlockView
from zoo.engines.reductions import Keep
from zoo.errors import Refused
from zoo.families.encoder_tokens import EncoderTokenReducer
from zoo.interface import register
from zoo.models.anatomy import Encoder


@register("$slug")
class $cls(EncoderTokenReducer):
    """Keeps every n-th patch from one block on."""

    keep_ratio: float = Field(0.5, gt=0, le=1, description="Fraction of the patches that stays.")
    layer: int = Field(2, ge=0, description="Block, counted from 0, between whose halves patches leave.")

    def stages(self, encoder: Encoder) -> list[BlockStage]:
        """One stage, between attention and MLP."""
        if self.layer >= len(encoder.blocks):
            raise Refused(f"{self.slug}: this model has {len(encoder.blocks)} blocks; choose a smaller layer")
        return [] if self.keep_ratio == 1 else [BlockStage(self.layer, self.reduce)]

    def reduce(self, view: BlockView) -> Keep:
        """The tokens that stay, for the whole batch ``[B, N, D]`` alike."""
        batch, tokens = view.tokens.shape[:2]
        patches = tokens - view.prefix
        count = max(1, round(self.keep_ratio * patches))
        prefix = torch.arange(view.prefix, device=view.tokens.device)
        kept = (torch.arange(count, device=view.tokens.device) * patches) // count + view.prefix
        return Keep(torch.cat((prefix, kept)).expand(batch, -1))
'''

_EXAMPLES = {
    "weights": _Example(
        summary="Removes the FFN channels with the smallest outgoing weights, the same share in every layer. \\\n"
        "A baseline to start a new method from.",
        facets={
            "family": "weight-pruning", "target": "channels", "where": "ffn", "signal": "weight-magnitude",
            "operation": "drop", "budget": "fixed-ratio", "when": "offline", "training": "none",
            "modality": "text", "architecture": "decoder-llm",
        },
        properties={"needs_attention_maps": False, "lossless": False, "deterministic": True, "shrinks_weights": True},
        module=_WEIGHTS,
        model="tiny-llama",
        check='windows = torch.randint(4, 250, (4, 32), generator=torch.Generator().manual_seed(0))\n'
        '    applied = zoo.method("$slug").apply(loaded, calibration=windows)\n'
        "    assert applied.report.kept < applied.report.total\n"
        "    assert applied.model(input_ids=windows).logits.isfinite().all()",
    ),
    "decoding": _Example(
        summary="Drafts by following the latest successor of each token of prompt and output, and lets the model \\\n"
        "verify the draft. A baseline to start a new method from.",
        facets={
            "family": "decoding", "target": "decoding-steps", "where": "decode-loop", "signal": "ngram-match",
            "operation": "draft-and-verify", "budget": "fixed-count", "when": "decode", "training": "none",
            "modality": "text", "architecture": "decoder-llm",
        },
        properties={"needs_attention_maps": False, "lossless": True, "deterministic": True, "batchable": True},
        module=_DECODING,
        model="tiny-llama",
        check='inputs = loaded.tokenizer("one two one two one two", return_tensors="pt")\n'
        "    plain = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=16)\n"
        '    with zoo.method("$slug").apply(loaded) as applied:\n'
        "        assert torch.equal(applied.generate(**inputs, do_sample=False, max_new_tokens=16), plain)\n"
        "        assert applied.report.decoding is not None",
    ),
    "visual-tokens": _Example(
        summary="Keeps visual tokens at even distances and drops the others before the first decoder layer. \\\n"
        "A baseline to start a new method from.",
        facets={
            "family": "visual-token-pruning", "target": "visual-tokens", "where": "before-llm", "signal": "position",
            "operation": "drop", "budget": "fixed-ratio", "when": "prefill", "training": "none",
            "modality": "image-text", "architecture": "vlm",
        },
        properties={
            "query_aware": False, "needs_attention_maps": False, "lossless": False, "deterministic": True,
            "batchable": True, "shrinks_sequence": True, "shrinks_cache": True, "keeps_positions": True,
        },
        module=_VISUAL,
        model="tiny-llava",
        check='from PIL import Image\n\n'
        '    picture = Image.linear_gradient("L").convert("RGB")\n'
        '    inputs = loaded.processor(text="<image>\\nWhat is it?", images=picture, return_tensors="pt")\n'
        '    with torch.no_grad(), zoo.method("$slug").apply(loaded) as applied:\n'
        "        assert applied(**inputs).logits.isfinite().all()\n"
        "        assert applied.report.kept < applied.report.total",
    ),
    "encoder-tokens": _Example(
        summary="From one block on, keeps patches at even distances and drops the others; prefix tokens stay. \\\n"
        "A baseline to start a new method from.",
        facets={
            "family": "vit-token-reduction", "target": "visual-tokens", "where": "inside-encoder", "signal": "position",
            "operation": "drop", "budget": "fixed-ratio", "when": "prefill", "training": "none",
            "modality": "image", "architecture": "vit",
        },
        properties={
            "query_aware": False, "needs_attention_maps": False, "lossless": False, "deterministic": True,
            "batchable": True, "shrinks_sequence": True,
        },
        module=_ENCODER,
        model="tiny-vit",
        check='pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))\n'
        '    with torch.no_grad(), zoo.method("$slug").apply(loaded) as applied:\n'
        "        assert applied(pixel_values=pixels).logits.isfinite().all()\n"
        "        assert applied.report.kept < applied.report.total",
    ),
}  # fmt: skip
