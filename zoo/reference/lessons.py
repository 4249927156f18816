"""What the reference VLM learns, in two lessons.

*Words*: the projector alone. Every patch is to look like the words for what it shows and for where that is, as the
language model's own embedding knows them. The language model takes no part, so thousands of canvases cost little.

*Answers*: projector and adapters. All questions on a canvas go through the language model as one sequence: the picture
once, behind it the questions, each of which sees the picture and itself only and counts its positions from the picture
on. So every answer is predicted exactly as if its question stood alone, at a fraction of the cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoo.engines.training import Group, Loss, Task, groups_by_decay
from zoo.reference.canvases import DIGITS, NAMES, SIDE, Box, Canvas, paint
from zoo.reference.questions import Question, overview, questions

COLUMNS, ROWS = ("left", "center", "right"), ("top", "middle", "bottom")
NOTHING = "empty"
COVERED = 0.4
"""A patch shows a picture from this share of its area on."""
SURE = 12.0
"""Log-odds that a patch with exactly the embedding of a word would give that word, on average."""


class Canvases(Sequence[Canvas]):
    """Canvases for training, painted when their turn comes."""

    def __init__(self, count: int, first: int = 0) -> None:
        self._count, self._first = count, first

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: Any) -> Any:
        return paint("train", self._first + range(self._count)[place])


def features(model: Any, processor: Any, canvases: Sequence[Canvas]) -> torch.Tensor:
    """What the frozen encoder sees, ``[B, patches, width]`` float32: the projector's input."""
    pixels = processor.image_processor([canvas.pixels for canvas in canvases], return_tensors="pt")[
        "pixel_values"
    ]
    tower, layer = model.model.vision_tower, model.config.vision_feature_layer
    device = next(tower.parameters()).device
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        hidden = tower(pixel_values=pixels.to(device), output_hidden_states=True).hidden_states[layer]
    return hidden[:, 1:].float()


# --- words -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Labels:
    """Of each patch: the number of its word, and whether it counts; both ``[B, patches]``, per kind of word."""

    words: dict[str, torch.Tensor]
    counts: dict[str, torch.Tensor]


def words_lesson(model: Any, processor: Any, examples: Sequence[Canvas]) -> Task:
    """Let the projector say what each patch shows, in words of the language model."""
    projector = model.model.multi_modal_projector
    embedding = model.get_input_embeddings().weight.detach().float()
    vocabularies = {
        "what": _embedded(
            processor.tokenizer, embedding, (*NAMES, *(str(digit) for digit in range(10)), NOTHING)
        ),
        "column": _embedded(processor.tokenizer, embedding, COLUMNS),
        "row": _embedded(processor.tokenizer, embedding, ROWS),
    }

    def collate(batch: list[Canvas]) -> tuple[torch.Tensor, _Labels]:
        return features(model, processor, batch), _labels(
            batch, SIDE // processor.patch_size, embedding.device
        )

    def loss(batch: tuple[torch.Tensor, _Labels], step: int) -> Loss:
        seen, labels = batch
        said = projector(seen).float()
        parts = {}
        for kind, vectors in vocabularies.items():
            middle = vectors.mean(0)
            scale = SURE / (vectors - middle).pow(2).sum(-1).mean()
            logits = scale * (said - middle) @ (vectors - middle).T
            wrong = F.cross_entropy(logits.flatten(0, 1), labels.words[kind].flatten(), reduction="none")
            parts[kind] = (wrong * labels.counts[kind].flatten()).sum()
        # Nothing above holds back what no word tells apart: patches stay as long as words are.
        length = embedding.pow(2).sum(-1).mean()
        parts["length"] = 0.1 * (said.pow(2).sum(-1) / length - 1).pow(2).sum()
        return Loss(torch.stack(list(parts.values())).sum(), seen.shape[0] * seen.shape[1], parts)

    groups = groups_by_decay(projector.named_parameters(prefix="projector"))
    return Task(groups, examples, collate, loss, projector, "patches")


def _embedded(tokenizer: Any, embedding: torch.Tensor, words: Sequence[str]) -> torch.Tensor:
    """Words as the language model embeds them, ``[words, width]``: the mean over the tokens of each.

    Digits stand without the space that words have in front: so they are read, and so they are answered.
    """
    written = [word if word.isdigit() else f" {word}" for word in words]
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    return torch.stack([embedding[torch.tensor(tokens)].mean(0) for tokens in ids])


def _labels(canvases: Sequence[Canvas], side: int, device: torch.device) -> _Labels:
    """Words for all patches; a patch that is partly covered counts for nothing, an empty one has a place of its own."""
    shape = (len(canvases), side, side)
    centre = (np.arange(side) + 0.5) * SIDE / side
    words = {
        "what": np.full(shape, len(NAMES) + len(DIGITS)),
        "column": np.broadcast_to(_third(centre), shape).copy(),
        "row": np.broadcast_to(_third(centre)[:, None], shape).copy(),
    }
    whole = np.ones(shape)
    for number, canvas in enumerate(canvases):
        for name, box in _things(canvas):
            share = _share(box, side)
            covered, touched = share >= COVERED, share > 0
            whole[number][touched & ~covered] = 0
            words["what"][number][covered] = name
            for kind, middle in zip(("column", "row"), box.centre, strict=True):
                words[kind][number][covered] = _third(np.asarray(middle))
    place = np.where(words["what"] < len(NAMES) + len(DIGITS), 1.0, 0.3) * whole
    counts = {"what": place, "column": 0.5 * place, "row": 0.5 * place}
    return _Labels(
        {kind: torch.from_numpy(values).long().flatten(1).to(device) for kind, values in words.items()},
        {kind: torch.from_numpy(values).float().flatten(1).to(device) for kind, values in counts.items()},
    )


def _things(canvas: Canvas) -> Iterator[tuple[int, Box]]:
    """Number of the word, and where: pictures, then the single digits of the strip."""
    for picture in canvas.pictures:
        yield NAMES.index(picture.name), picture.box
    if canvas.strip is not None:
        left, top, size = canvas.strip.left, canvas.strip.top, canvas.strip.bottom - canvas.strip.top
        for place, digit in enumerate(canvas.digits):
            edge = left + place * size
            yield len(NAMES) + int(digit), Box(edge, top, edge + size, top + size)


def _third(middle: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.clip(middle * 3 // SIDE, 0, 2).astype(int)


def _share(box: Box, side: int) -> np.ndarray[Any, Any]:
    """How much of each patch a box covers, ``[side, side]``."""
    patch = SIDE / side
    edges = np.arange(side) * patch
    across = np.clip(np.minimum(edges + patch, box.right) - np.maximum(edges, box.left), 0, None)
    down = np.clip(np.minimum(edges + patch, box.bottom) - np.maximum(edges, box.top), 0, None)
    share: np.ndarray[Any, Any] = np.outer(down, across) / patch**2
    return share


# --- answers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """Canvases with all their questions, as the language model reads them.

    Attributes:
        features: of the encoder, ``[B, patches, width]``.
        ids: tokens ``[B, N]``; the picture's placeholders are at ``1 .. patches``.
        positions: ``[B, N]``.
        mask: who sees whom, bool ``[B, 1, N, N]``.
        answers: ``[B, N]`` bool: tokens that are to be predicted, each from the one before it.
    """

    features: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    answers: torch.Tensor


def answers_lesson(
    model: Any,
    processor: Any,
    examples: Sequence[Canvas],
    adapters: dict[str, nn.Parameter],
    rate: float = 0.5,
) -> Task:
    """Let projector and adapters find the answers.

    Args:
        rate: of the projector, which has learnt before, as a factor on that of the adapters.
    """

    def collate(batch: list[Canvas]) -> Packed:
        asked = [_asked(canvas) for canvas in batch]
        return pack(
            features(model, processor, batch), asked, processor.tokenizer, model.config.image_token_id
        )

    def loss(batch: Packed, step: int) -> Loss:
        # Of the fused kernels, the CPU's is slow backwards at such lengths.
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            logits = predict(model, batch)
        total = F.cross_entropy(logits.float(), batch.ids[batch.answers], reduction="sum")
        return Loss(total, int(batch.answers.sum()))

    projector = dict(model.model.multi_modal_projector.named_parameters(prefix="projector"))
    groups = [*groups_by_decay(projector.items(), rate), Group(adapters)]
    return Task(groups, examples, collate, loss, model, "answer tokens")


def _asked(canvas: Canvas) -> list[Question]:
    """All questions on a canvas for training; which ones depends on the canvas alone."""
    random = np.random.default_rng(int(canvas.pixels.sum()))
    whole = overview(canvas)
    return questions(canvas, random) + ([] if whole is None else [whole])


def predict(model: Any, batch: Packed) -> torch.Tensor:
    """Logits ``[answer tokens, vocabulary]`` of all answers in a batch, in its order."""
    seen = model.model.multi_modal_projector(batch.features)
    embedded = model.get_input_embeddings()(batch.ids)
    patches = seen.shape[1]
    embedded = torch.cat((embedded[:, :1], seen.to(embedded.dtype), embedded[:, 1 + patches :]), dim=1)
    hidden = model.model.language_model(
        inputs_embeds=embedded, position_ids=batch.positions, attention_mask=batch.mask, use_cache=False
    ).last_hidden_state
    logits: torch.Tensor = model.lm_head(hidden[batch.answers.roll(-1, dims=1)])
    return logits


def pack(seen: torch.Tensor, asked: Sequence[Sequence[Question]], tokenizer: Any, image_id: int) -> Packed:
    """Canvases and their questions as one batch.

    Args:
        seen: features ``[B, patches, width]``.
        asked: questions on each canvas.
        tokenizer: of the model.
        image_id: the placeholder's.
    """
    patches = seen.shape[1]
    texts = [[(question.text, f" {question.answer}") for question in row] for row in asked]
    flat = [piece for row in texts for pair in row for piece in pair]
    tokens = iter(tokenizer(flat, add_special_tokens=False)["input_ids"] if flat else [])
    rows = []
    for row in texts:
        turns = [(next(tokens), [*next(tokens), tokenizer.eos_token_id]) for _ in row]
        rows.append(turns)
    length = 1 + patches + max(sum(len(q) + len(a) for q, a in turns) for turns in rows)
    shape = (len(rows), length)
    ids = torch.full(shape, tokenizer.pad_token_id)
    ids[:, 0], ids[:, 1 : 1 + patches] = tokenizer.bos_token_id, image_id
    positions = torch.arange(length).repeat(len(rows), 1)
    turn = torch.full(shape, -1)  # -1: padding, 0: the picture, then the questions by number
    turn[:, : 1 + patches] = 0
    answers = torch.zeros(shape, dtype=torch.bool)
    for number, turns in enumerate(rows):
        end = 1 + patches
        for place, (question, answer) in enumerate(turns, start=1):
            begin, middle, end = end, end + len(question), end + len(question) + len(answer)
            ids[number, begin:end] = torch.tensor([*question, *answer])
            positions[number, begin:end] = torch.arange(1 + patches, 1 + patches + end - begin)
            turn[number, begin:end] = place
            answers[number, middle:end] = True
    sees = (turn[:, :, None] == turn[:, None, :]) | (turn[:, None, :] == 0)
    mask = (sees & torch.ones(length, length, dtype=torch.bool).tril()).unsqueeze(1)
    device = seen.device
    return Packed(seen, ids.to(device), positions.to(device), mask.to(device), answers.to(device))
