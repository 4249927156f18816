"""Where in the model a method acts, drawn as SVG from the facets ``where``, ``target``, ``operation`` and ``when``.

The data flows downwards: input, encoder, projector, the layers of the language model with their KV cache, LM head,
and back through the decode loop. Parts that the card's architectures do not have are left out. Places where the
method acts are filled and numbered; the things that it removes (tokens, cache entries, heads, channels, layers) are
drawn hollow behind the place where they leave. The drawing shows kinds, not amounts.

All colours come from the style sheet (classes only), so the same picture serves light, dark and print.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import lru_cache
from html import escape

WIDTH = 360
_LEFT, _RIGHT = 64, 244
_MIDDLE = (_LEFT + _RIGHT) // 2

_TOKENS = {"tokens", "visual-tokens", "text-tokens", "frames", "latent-tokens"}
_CACHE = {"kv-entries", "kv-channels", "key-reads"}
_REMOVING = {"drop", "merge", "recycle", "transform"}

_DEPTH = {"input": 0, "inside-encoder": 1, "after-encoder": 2, "before-llm": 3, "inside-llm": 4}
"""How far down the pipeline a sequence is shortened."""

TIMES = (
    ("training", "training"),
    ("offline", "offline"),
    ("prefill", "prefill"),
    ("decode", "decode"),
    ("denoise", "denoise"),
    ("evaluation", "evaluation"),
)


@dataclass
class _Drawing:
    """Shapes collected from top to bottom; ``y`` is where the next one goes."""

    where: Sequence[str]
    target: AbstractSet[str]
    thins_cache: bool = False
    shapes: list[str] = field(default_factory=list)
    numbered: dict[str, int] = field(default_factory=dict)
    y: float = 8

    def on(self, *places: str) -> bool:
        return any(place in self.where for place in places)

    def rect(self, x: float, y: float, width: float, height: float, kind: str, radius: float = 4) -> None:
        self.shapes.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"/>'
        )

    def text(self, x: float, y: float, words: str, kind: str = "d-text", anchor: str = "middle") -> None:
        self.shapes.append(
            f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    def path(self, d: str, kind: str) -> None:
        self.shapes.append(f'<path class="{kind}" d="{d}"/>')

    def badge(self, place: str, x: float, y: float) -> None:
        """The number of ``place``, if the method acts there and has no number yet."""
        if place in self.where and place not in self.numbered:
            self.numbered[place] = number = self.where.index(place) + 1
            self.shapes.append(f'<circle class="d-badge" cx="{x:g}" cy="{y:g}" r="9"/>')
            self.text(x, y + 3.6, str(number), "d-number")

    def box(self, label: str, height: float, *places: str) -> None:
        """A station of the main column."""
        hot = self.on(*places)
        self.rect(_LEFT, self.y, _RIGHT - _LEFT, height, "d-box d-hot" if hot else "d-box")
        self.text(_MIDDLE, self.y + height / 2 + 4, label)
        for offset, place in enumerate(p for p in places if p in self.where):
            self.badge(place, _RIGHT + 20 * offset, self.y)
        self.y += height

    def arrow(self, length: float = 22) -> None:
        """A plain connection to the next station."""
        self.path(f"M{_MIDDLE} {self.y:g}v{length - 4:g}m-4 -4l4 4l4 -4", "d-line")
        self.y += length

    def row(
        self, x: float, y: float, count: int, gone: Collection[int], size: float = 7, gap: float = 3
    ) -> None:
        """``count`` little squares; those in ``gone`` are hollow."""
        for index in range(count):
            self.rect(x + index * (size + gap), y, size, size, "d-gone" if index in gone else "d-unit", 1.5)

    def sequence(self, shortened: bool) -> None:
        """A connection drawn as the tokens that travel along it."""
        self.path(f"M{_MIDDLE} {self.y:g}v5", "d-line")
        self.row(_MIDDLE - 58.5, self.y + 7, 12, (1, 2, 4, 6, 7, 9, 10) if shortened else ())
        self.path(f"M{_MIDDLE} {self.y + 16:g}v8m-4 -4l4 4l4 -4", "d-line")
        self.y += 26


def pipeline(
    where: Mapping[str, str],
    target: Mapping[str, str],
    operation: Mapping[str, str],
    when: Mapping[str, str],
    architecture: Collection[str],
    *,
    name: str,
    shortens: bool = True,
    thins_cache: bool = False,
) -> str:
    """The diagram of one card as an ``<svg>`` element, everything escaped.

    Args:
        where, target, operation, when: the card's terms, id to label, in the card's order. The n-th term of
            ``where`` carries the number n in the drawing.
        architecture: ids of the card's architectures; they choose the parts that are drawn.
        name: the method's name, for the title that screen readers say.
        shortens: false when the card says that the sequence keeps its length.
        thins_cache: true when it says that fewer key-value pairs are stored.
    """
    texts = [tuple(terms.items()) for terms in (where, target, operation, when)]
    height, told, shapes = _drawn(*texts, frozenset(architecture), shortens, thins_cache)
    return (
        f'<svg class="diagram" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-labelledby="dg-title dg-desc">'
        f'<title id="dg-title">Where {escape(name)} acts in the model</title><desc id="dg-desc">{told}</desc>'
        f"{shapes}</svg>"
    )


_Terms = tuple[tuple[str, str], ...]
"""Ids and labels."""


@lru_cache(maxsize=4096)
def _drawn(
    where: _Terms,
    target: _Terms,
    operation: _Terms,
    when: _Terms,
    architecture: frozenset[str],
    shortens: bool,
    thins_cache: bool,
) -> tuple[float, str, str]:
    """Height, description and shapes: methods that act alike share them."""
    drawing = _Drawing(where=list(dict(where)), target=set(dict(target)), thins_cache=thins_cache)
    shape = _shape(drawing, architecture)
    cut = _cut_depth(drawing, dict(operation), shortens)
    moves_tokens = bool(_TOKENS & drawing.target)

    def connect(depth: int) -> None:
        if moves_tokens:
            drawing.sequence(shortened=cut is not None and cut <= depth)
        else:
            drawing.arrow()

    start = drawing.y
    drawing.box(
        {"denoiser": "Noise, prompt"}.get(shape, "Input: image, text" if shape == "vlm" else "Input"),
        30,
        "input",
    )
    connect(0)
    if shape == "vlm":
        drawing.box("Vision encoder", 44, "inside-encoder")
        connect(1)
        drawing.box("Projector", 26, "after-encoder")
        if drawing.on("before-llm"):
            _gate(drawing, "before-llm")
        connect(3)
    _stack(drawing, shape, cut)
    if shape in ("vlm", "llm"):
        drawing.arrow()
        drawing.box("LM head", 26, "lm-head")
        drawing.arrow(18)
        drawing.text(_MIDDLE, drawing.y + 10, "next token", "d-small")
        _loop(drawing, start, "decode-loop" if not drawing.on("denoising-loop") else "denoising-loop")
    else:
        drawing.arrow()
        drawing.text(_MIDDLE, drawing.y + 9, "output", "d-small")
        if shape == "denoiser":
            _loop(drawing, start, "denoising-loop")
    drawing.y += 26
    _around(drawing)
    _times(drawing, dict(when))
    return drawing.y, escape(_told(where, target, operation, when)), "".join(drawing.shapes)


def _shape(drawing: _Drawing, architecture: Collection[str]) -> str:
    """Which pipeline is drawn: ``vlm``, ``llm``, ``encoder`` or ``denoiser``."""
    if "vlm" in architecture or drawing.on("after-encoder", "before-llm"):
        return "vlm"
    decoders = {"decoder-llm", "encoder-decoder", "diffusion-lm"}
    if decoders & set(architecture) or drawing.on("lm-head", "decode-loop"):
        return "vlm" if drawing.on("inside-encoder") else "llm"
    if drawing.on("inside-encoder") and drawing.on("inside-llm"):
        return "vlm"
    return "denoiser" if "diffusion" in architecture or drawing.on("denoising-loop") else "encoder"


def _cut_depth(drawing: _Drawing, operation: Collection[str], shortens: bool) -> int | None:
    """The first place at which tokens leave the sequence, as a depth in the pipeline."""
    if not shortens or not _TOKENS & drawing.target or not _REMOVING & set(operation):
        return None
    depths = [_DEPTH.get(place, 4) for place in drawing.where if place not in ("training-loop", "outside")]
    return min(depths, default=None)


def _gate(drawing: _Drawing, place: str) -> None:
    """A filled bar across the stream: something is taken out between two stations."""
    drawing.path(f"M{_MIDDLE} {drawing.y:g}v10", "d-line")
    drawing.rect(_LEFT + 20, drawing.y + 10, _RIGHT - _LEFT - 40, 8, "d-box d-hot", 4)
    drawing.badge(place, _RIGHT - 20, drawing.y + 14)
    drawing.y += 18


def _stack(drawing: _Drawing, shape: str, cut: int | None) -> None:
    """The repeated layer with attention, KV cache and feed-forward block, and the step to the next layer."""
    label = {
        "vlm": "LLM layers",
        "llm": "LLM layers",
        "encoder": "Encoder blocks",
        "denoiser": "Denoising network",
    }
    between = "inside-llm" if shape in ("vlm", "llm") or drawing.on("inside-llm") else "inside-encoder"
    top = drawing.y
    whole = drawing.on("whole-model") or bool({"layers", "sublayers"} & drawing.target)
    gone = {"layers", "sublayers"} & drawing.target
    for index in (2, 1):  # further layers, peeping out behind the first
        kind = "d-frame d-gone" if gone and index == 1 else "d-frame"
        drawing.rect(_LEFT - 14 + 5 * index, top + 5 * index, _RIGHT - _LEFT + 28, 150, kind, 6)
    drawing.rect(_LEFT - 14, top, _RIGHT - _LEFT + 28, 150, "d-frame d-warm" if whole else "d-frame", 6)
    drawing.badge("whole-model", _LEFT - 14, top)
    drawing.text(_LEFT - 4, top + 16, label[shape], "d-small", "start")
    _normalisation(drawing, top + 24)
    _attention(drawing, top + 34, cached=shape in ("vlm", "llm"))
    _normalisation(drawing, top + 83)
    _feed_forward(drawing, top + 93)
    drawing.y = top + 150 + 10
    if drawing.on(between):
        _gate(drawing, between)
        if _TOKENS & drawing.target:
            drawing.sequence(shortened=cut is not None)
            drawing.text(
                _MIDDLE,
                drawing.y + 10,
                "further blocks" if shape == "encoder" else "further layers",
                "d-small",
            )
            drawing.y += 14


def _normalisation(drawing: _Drawing, y: float) -> None:
    drawing.rect(_LEFT, y, _RIGHT - _LEFT, 5, "d-box d-hot" if drawing.on("normalisation") else "d-box", 2)
    drawing.badge("normalisation", _RIGHT, y)


def _attention(drawing: _Drawing, y: float, *, cached: bool) -> None:
    in_cache = cached and bool(_CACHE & drawing.target)
    hot = drawing.on("attention") and not in_cache
    drawing.rect(_LEFT, y, _RIGHT - _LEFT, 42, "d-box d-hot" if hot else "d-box")
    drawing.text(_MIDDLE, y + 16, "Attention")
    drawing.row(_MIDDLE - 43, y + 24, 8, (2, 5, 6) if "heads" in drawing.target else (), size=8, gap=3)
    if cached:
        x, width, height = 276, 76, 62
        drawing.path(f"M{_RIGHT} {y + 21:g}h{x - _RIGHT}", "d-line")
        drawing.rect(
            x, y - 10, width, height, "d-box d-hot" if drawing.on("attention") and in_cache else "d-box"
        )
        drawing.text(x + width / 2, y + 6, "KV cache")
        thinned = drawing.thins_cache or bool(_CACHE & drawing.target)
        for line in range(3):
            drawing.row(x + 9, y + 14 + line * 11, 6, (0, 1, 3, 4, 5)[line % 2 :: 2] if thinned else ())
        if in_cache:
            drawing.badge("attention", x + width - 4, y - 10)
    drawing.badge("attention", _RIGHT, y)


def _feed_forward(drawing: _Drawing, y: float) -> None:
    drawing.rect(_LEFT, y, _RIGHT - _LEFT, 42, "d-box d-hot" if drawing.on("ffn") else "d-box")
    drawing.text(_MIDDLE, y + 16, "Feed-forward")
    thinned = {"channels", "weights", "filters"} & drawing.target
    for index in range(20):
        gone = bool(thinned) and index in (1, 4, 5, 8, 11, 13, 14, 18)
        drawing.rect(_MIDDLE - 59 + index * 6, y + 24, 3, 10, "d-gone" if gone else "d-unit", 0.5)
    drawing.badge("ffn", _RIGHT, y)


def _loop(drawing: _Drawing, start: float, place: str) -> None:
    """The way back from the output to the input."""
    hot = drawing.on(place)
    bottom, top = drawing.y + 6, start + 15
    drawing.path(
        f"M{_MIDDLE - 32} {bottom:g}H34q-10 0 -10 -10V{top + 10:g}q0 -10 10 -10H{_LEFT - 4}m-4 -4l4 4l-4 4",
        "d-loop d-on" if hot else "d-loop",
    )
    middle = (top + bottom) / 2
    words = "decode loop" if place == "decode-loop" else "denoising loop"
    drawing.shapes.append(
        f'<text class="d-small" text-anchor="middle" transform="translate(15 {middle:g}) rotate(-90)">{words}</text>'
    )
    drawing.badge(place, 24, top + 34)


def _around(drawing: _Drawing) -> None:
    """Places that are not in the model: the training loop around it, and everything outside."""
    for place, words in (
        ("training-loop", "Training loop"),
        ("outside", "Outside the model"),
        ("denoising-loop", "Denoising loop"),
        ("decode-loop", "Decode loop"),
    ):
        if place in drawing.where and place not in drawing.numbered:
            drawing.rect(_LEFT - 14, drawing.y, _RIGHT - _LEFT + 28, 28, "d-box d-hot d-dashed")
            drawing.text(_MIDDLE, drawing.y + 18, words)
            drawing.badge(place, _RIGHT + 14, drawing.y)
            drawing.y += 42


def _times(drawing: _Drawing, when: Collection[str]) -> None:
    """When it happens: the six times of the vocabulary on one line."""
    drawing.path(f"M8 {drawing.y:g}h{WIDTH - 16}", "d-rule")
    share = (WIDTH - 16) / sum(len(label) + 4 for _, label in TIMES)
    x = 8.0
    for time, label in TIMES:
        width = round(share * (len(label) + 4), 1)
        hot = time in when
        if hot:
            drawing.rect(x + 1, drawing.y + 6, width - 2, 20, "d-box d-hot", 10)
        drawing.text(x + width / 2, drawing.y + 20, label, "d-time d-now" if hot else "d-time")
        x += width
    drawing.y += 32


def _told(where: _Terms, target: _Terms, operation: _Terms, when: _Terms) -> str:
    """The drawing in words."""
    places = "; ".join(f"{number} {label}" for number, (_, label) in enumerate(where, 1))
    removed, done, times = (", ".join(label for _, label in terms) for terms in (target, operation, when))
    return (
        f"Places, numbered from input to output of the model as drawn: {places}. What is removed or saved: "
        f"{removed}. Operation: {done}. When: {times}."
    )


STRIP = ("input", "encoder", "bridge to the LLM", "layers", "KV cache", "decode loop")
"""The pipeline in six cells, for tables."""

_CELLS = {
    "input": (0,),
    "inside-encoder": (1,),
    "after-encoder": (2,),
    "before-llm": (2,),
    "inside-llm": (3,),
    "attention": (3,),
    "ffn": (3,),
    "normalisation": (3,),
    "whole-model": (3,),
    "lm-head": (5,),
    "decode-loop": (5,),
    "denoising-loop": (5,),
}


def strip(where: Collection[str], target: Collection[str]) -> str:
    """Which of the six cells of ``STRIP`` a method touches, as ``"0"`` and ``"1"``: ``"001000"`` is the bridge."""
    cells = {cell for place in where for cell in _CELLS.get(place, ())}
    if "attention" in where and _CACHE & set(target):
        cells = (cells - {3}) | {4} if not {"inside-llm", "ffn", "whole-model"} & set(where) else cells | {4}
    return "".join("1" if cell in cells else "0" for cell in range(len(STRIP)))
