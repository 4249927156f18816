"""Tiny vision-language models and what feeds them: text, pictures of any size, and videos (lists of frames).

The processors take ``<image>`` and ``<video>`` in a prompt and write the markup that the real processor of the
architecture writes; transformers' own processors ask for packages (torchvision, num2words) that small tests can do
without.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from zoo.errors import BadInput
from zoo.models import tiny

VIDEO = "<video>"
_SIDE, _PATCH = 48, 8
_PER_SIDE = _SIDE // _PATCH
_MERGE = 2

Features = dict[str, Any]


def _image_processor(kind: str, **fields: Any) -> Any:
    from transformers import AutoImageProcessor

    with TemporaryDirectory() as folder:
        text = json.dumps({"image_processor_type": kind, "do_convert_rgb": True, **fields})
        (Path(folder) / "preprocessor_config.json").write_text(text, encoding="utf-8")
        return AutoImageProcessor.from_pretrained(folder)


class TinyProcessor(ABC):
    """Turns prompts, pictures and videos into the inputs of one architecture.

    Args:
        model: the model to feed.
        tokenizer: with the markup of the architecture among its special tokens.
        image_processor: transformers' own.
    """

    markup: ClassVar[tuple[str, ...]] = ()
    """Special tokens beside ``<image>``."""

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any) -> None:
        self.inner = model.model
        self.tokenizer = tokenizer
        self.image_processor = image_processor

    @classmethod
    @abstractmethod
    def make_image_processor(cls) -> Any:
        """The image processor for 48-pixel encoders."""

    @abstractmethod
    def pictures(self, images: list[Image.Image], counts: list[int]) -> tuple[Features, list[str]]:
        """Model inputs of all pictures, and what each ``<image>`` becomes.

        Args:
            images: of all samples, in order.
            counts: number of pictures of each sample.
        """

    def videos(self, videos: list[list[Image.Image]]) -> tuple[Features, list[str]]:
        """Model inputs of all videos (lists of frames), and what each ``<video>`` becomes.

        Raises:
            BadInput: the architecture knows pictures only.
        """
        raise BadInput(f"{self.inner.config.model_type} takes pictures, not videos")

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        return_tensors: str = "pt",
        padding: bool = True,
    ) -> Features:
        """Inputs of a batch, padded on the left.

        Args:
            images: pictures, one per ``<image>``; flat, or a list per sample.
            text: one prompt or several.
            videos: lists of frames, one per ``<video>``.
            return_tensors: ``pt``.
            padding: pad the prompts to one length.

        Raises:
            BadInput: prompts and pictures do not belong together.
        """
        prompts = [text] if isinstance(text, str) else list(text or ())
        features: Features = {}
        for mark, given, make in (
            (tiny.IMAGE, _flat(images), self._pictures),
            (VIDEO, _clips(videos), self._videos),
        ):
            counts = [prompt.count(mark) for prompt in prompts]
            if sum(counts) != len(given):
                raise BadInput(f"the prompts have {sum(counts)} {mark}, but {len(given)} were given")
            if not given:
                continue
            made, replacements = make(given, counts)
            features |= made
            prompts = _replaced(prompts, mark, replacements)
        prompts = [prompt.replace(_HELD, tiny.IMAGE) for prompt in prompts]
        encoded = self.tokenizer(prompts, padding=padding, return_tensors=return_tensors)
        inputs = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], **features}
        return inputs | self.more(inputs)

    def _pictures(self, given: list[Any], counts: list[int]) -> tuple[Features, list[str]]:
        return self.pictures(given, counts)

    def _videos(self, given: list[Any], counts: list[int]) -> tuple[Features, list[str]]:
        return self.videos(given)

    def more(self, inputs: Features) -> Features:
        """Inputs that depend on the token ids."""
        return {}

    def decode(self, *args: Any, **options: Any) -> str:
        """As the tokenizer's."""
        text: str = self.tokenizer.decode(*args, **options)
        return text

    def batch_decode(self, *args: Any, **options: Any) -> list[str]:
        """As the tokenizer's."""
        texts: list[str] = self.tokenizer.batch_decode(*args, **options)
        return texts

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer and image processor."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


_HELD = "\x00"
"""Stands for a finished placeholder while ``<image>`` and ``<video>`` are still being replaced."""


def _flat(images: Any) -> list[Any]:
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return list(chain.from_iterable(_flat(entry) for entry in images))
    return [images]


def _clips(videos: Any) -> list[list[Any]]:
    """One list of frames per video, from one video, a list of videos, or a list of videos per sample."""
    if not videos:
        return []
    if not isinstance(videos[0], (list, tuple)):
        return [list(videos)]
    return list(chain.from_iterable(_clips(entry) for entry in videos))


def _replaced(prompts: list[str], mark: str, replacements: list[str]) -> list[str]:
    left = iter(replacements)
    result = []
    for prompt in prompts:
        head, *rest = prompt.split(mark)
        result.append(head + "".join(next(left) + piece for piece in rest))
    return result


def _normalised(frames: list[Image.Image], height: int, width: int) -> torch.Tensor:
    """Frames ``[T, 3, height, width]`` in [-1, 1]."""
    small = [frame.convert("RGB").resize((width, height), Image.Resampling.BICUBIC) for frame in frames]
    pixels = torch.from_numpy(np.stack([np.asarray(frame) for frame in small])).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1


class AnyResolution(TinyProcessor):
    """LLaVA-NeXT: the number of tokens is what the model's own packing makes of the crops."""

    kind: ClassVar[str] = "LlavaNextImageProcessor"
    grids: ClassVar[list[list[int]]] = [[1, 2], [2, 1], [2, 2], [1, 3], [3, 1]]

    @classmethod
    def make_image_processor(cls) -> Any:
        """As in the model's configuration."""
        square = {"height": _SIDE, "width": _SIDE}
        return _image_processor(cls.kind, size=square, crop_size=square, image_grid_pinpoints=cls.pinpoints())

    @classmethod
    def pinpoints(cls) -> list[list[int]]:
        """Resolutions ``[height, width]`` that crops may cover."""
        return [[rows * _SIDE, columns * _SIDE] for rows, columns in cls.grids]

    def pictures(self, images: list[Image.Image], counts: list[int]) -> tuple[Features, list[str]]:
        """Crops of each picture."""
        made = self.image_processor(images=images, return_tensors="pt")
        crops = made["pixel_values"]
        sizes = made["image_sizes"]
        texts = []
        for size in sizes.tolist():
            texts.append(_HELD * self._length(size, self._crops(size)))
        return {"pixel_values": crops, "image_sizes": sizes}, texts

    def _crops(self, size: list[int]) -> int:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        return int(image_size_to_num_patches(size, self.pinpoints(), _SIDE))

    def _length(self, size: list[int], crops: int, **options: Any) -> int:
        features = [torch.zeros(crops, _PER_SIDE**2, 1)]
        options = options or {"vision_feature_select_strategy": "default"}
        packed, _ = self.inner.pack_image_features(
            features, torch.tensor([size]), image_newline=torch.zeros(1), **options
        )
        return len(packed[0])


class OneVision(AnyResolution):
    """LLaVA-OneVision: crops for a picture that is alone in its sample, one view otherwise; videos."""

    markup = (VIDEO,)
    kind = "LlavaOnevisionImageProcessor"
    grids: ClassVar[list[list[int]]] = [[rows, columns] for rows in range(1, 5) for columns in range(1, 5)]

    def pictures(self, images: list[Image.Image], counts: list[int]) -> tuple[Features, list[str]]:
        """Crops of each picture."""
        counts = [count for count in counts if count]
        nested = [
            [images[sum(counts[:sample]) + index] for index in range(n)] for sample, n in enumerate(counts)
        ]
        made = self.image_processor(images=nested, return_tensors="pt", do_pad=True)
        crops, sizes = made["pixel_values"], made["image_sizes"]
        alone = [count == 1 for count in counts for _ in range(count)]
        texts = [
            _HELD * self._length(size, self._crops(size) if tiled else 1, vision_aspect_ratio="anyres_max_9")
            for size, tiled in zip(sizes.tolist(), alone, strict=True)
        ]
        features = {"pixel_values": crops, "image_sizes": sizes, "batch_num_images": torch.tensor(counts)}
        return features, texts

    def videos(self, videos: list[list[Image.Image]]) -> tuple[Features, list[str]]:
        """Frames of 48 pixels, all videos of one length."""
        if len({len(video) for video in videos}) > 1:
            raise BadInput("all videos of a batch must have the same number of frames")
        pixels = torch.stack([_normalised(video, _SIDE, _SIDE) for video in videos])
        tokens = pixels.shape[1] * ((_PER_SIDE + 1) // 2) ** 2 + 1
        return {"pixel_values_videos": pixels}, [VIDEO * tokens] * len(videos)


class QwenVl(TinyProcessor):
    """Qwen2.5-VL: pictures keep their shape; every four neighbouring patches give one token."""

    start: ClassVar[str] = "<|vision_start|>"
    end: ClassVar[str] = "<|vision_end|>"
    markup = (VIDEO, "<|vision_start|>", "<|vision_end|>")

    @classmethod
    def make_image_processor(cls) -> Any:
        """Patches of 8 pixels, at most 144 of them."""
        return _image_processor(
            "Qwen2VLImageProcessor",
            patch_size=_PATCH,
            merge_size=_MERGE,
            temporal_patch_size=2,
            size={"shortest_edge": 32 * 32, "longest_edge": 96 * 96},
        )

    def pictures(self, images: list[Image.Image], counts: list[int]) -> tuple[Features, list[str]]:
        """Patches of all pictures in one row."""
        made = dict(self.image_processor(images=images, return_tensors="pt"))
        texts = [f"{self.start}{_HELD * self._tokens(grid)}{self.end}" for grid in made["image_grid_thw"]]
        return made, texts

    def videos(self, videos: list[list[Image.Image]]) -> tuple[Features, list[str]]:
        """Two frames make one; the last is repeated when their number is odd."""
        patches, grids = [], []
        for video in videos:
            width, height = (max(2, round(side / 16)) * 16 for side in video[0].size)
            width, height = min(width, 96), min(height, 96)
            pixels = _normalised([*video, video[-1]][: len(video) + len(video) % 2], height, width)
            grid = (len(pixels) // 2, height // _PATCH, width // _PATCH)
            folded = pixels.view(
                grid[0], 2, 3, grid[1] // _MERGE, _MERGE, _PATCH, grid[2] // _MERGE, _MERGE, _PATCH
            )
            # frame, block row, block column, row in it, column in it; then channel, time, pixels
            patches.append(folded.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(grid[0] * grid[1] * grid[2], -1))
            grids.append(grid)
        features = {"pixel_values_videos": torch.cat(patches), "video_grid_thw": torch.tensor(grids)}
        return features, [self.video_text(grid) for grid in features["video_grid_thw"]]

    def video_text(self, grid: torch.Tensor) -> str:
        """All tokens of a video in one run."""
        return f"{self.start}{VIDEO * self._tokens(grid)}{self.end}"

    def more(self, inputs: Features) -> Features:
        """0 for text, 1 for pictures, 2 for videos."""
        ids, config = inputs["input_ids"], self.inner.config
        kinds = (ids == config.image_token_id).long() + 2 * (ids == config.video_token_id).long()
        return {"mm_token_type_ids": kinds}

    @staticmethod
    def _tokens(grid: torch.Tensor) -> int:
        return int(grid.prod()) // _MERGE**2


class Qwen3Vl(QwenVl):
    """Qwen3-VL: every frame of a video stands behind its time."""

    def video_text(self, grid: torch.Tensor) -> str:
        """One run of tokens per frame."""
        frame = f"{self.start}{VIDEO * (self._tokens(grid) // int(grid[0]))}{self.end}"
        return "".join(f"<{second + 0.5:.1f} seconds>{frame}" for second in range(int(grid[0])))


class InternVl(TinyProcessor):
    """InternVL: tiles and a thumbnail in one run."""

    markup = ("<img>", "</img>")

    @classmethod
    def make_image_processor(cls) -> Any:
        """Up to six tiles."""
        return _image_processor(
            "GotOcr2ImageProcessor",
            size={"height": _SIDE, "width": _SIDE},
            crop_to_patches=True,
            min_patches=1,
            max_patches=6,
        )

    def pictures(self, images: list[Image.Image], counts: list[int]) -> tuple[Features, list[str]]:
        """Tiles of all pictures in one row."""
        made = self.image_processor(images=images, return_tensors="pt")
        tokens = (_PER_SIDE // _MERGE) ** 2
        texts = [f"<img>{_HELD * (tokens * int(tiles))}</img>" for tiles in made["num_patches"]]
        return {"pixel_values": made["pixel_values"]}, texts

    def videos(self, videos: list[list[Image.Image]]) -> tuple[Features, list[str]]:
        """Frames are pictures of one tile."""
        pixels = torch.cat([_normalised(video, _SIDE, _SIDE) for video in videos])
        frame = f"<img>{_HELD * (_PER_SIDE // _MERGE) ** 2}</img>"
        texts = ["\n".join(f"Frame{index + 1}: {frame}" for index in range(len(video))) for video in videos]
        return {"pixel_values": pixels}, texts


class Idefics(TinyProcessor):
    """Idefics3: every tile behind its row and column, then the global view."""

    fake: ClassVar[str] = "<fake_token_around_image>"
    whole: ClassVar[str] = "<global-img>"
    markup = (
        "<fake_token_around_image>",
        "<global-img>",
        *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
    )
    kind: ClassVar[str] = "Idefics3ImageProcessor"

    @classmethod
    def make_image_processor(cls) -> Any:
        """Up to three tiles on a side."""
        return _image_processor(
            cls.kind, size={"longest_edge": 3 * _SIDE}, max_image_size={"longest_edge": _SIDE}
        )

    def pictures(self, images: list[Image.Image], counts: list[int]) -> tuple[Features, list[str]]:
        """Tiles of each sample, padded with black ones; a sample without a picture gets only those."""
        from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

        nested = [
            [images[sum(counts[:sample]) + index] for index in range(n)] for sample, n in enumerate(counts)
        ]
        made = self.image_processor(
            images=[own for own in nested if own], return_row_col_info=True, return_tensors="pt"
        )
        rows, columns = list(chain.from_iterable(made["rows"])), list(chain.from_iterable(made["cols"]))
        texts = [
            get_image_prompt_string(
                int(row), int(column), (_PER_SIDE // _MERGE) ** 2, self.fake, _HELD, self.whole
            )
            for row, column in zip(rows, columns, strict=True)
        ]
        features = {}
        for name in ("pixel_values", "pixel_attention_mask"):
            full = made[name].new_zeros(len(counts), *made[name].shape[1:])
            full[[sample for sample, count in enumerate(counts) if count]] = made[name]
            features[name] = full
        return features, texts


class SmolVlm(Idefics):
    """SmolVLM: as Idefics3, and videos as pictures without tiles."""

    kind = "SmolVLMImageProcessor"

    def videos(self, videos: list[list[Image.Image]]) -> tuple[Features, list[str]]:
        """Frames are pictures with only a global view; one video per sample."""
        if len({len(video) for video in videos}) > 1:
            raise BadInput("all videos of a batch must have the same number of frames")
        pixels = torch.stack([_normalised(video, _SIDE, _SIDE) for video in videos])
        frame = f"{self.fake}{self.whole}{_HELD * (_PER_SIDE // _MERGE) ** 2}{self.fake}"
        texts = [
            "".join(f"\nFrame from 00:{second:02d}:{frame}" for second in range(len(video))) + "\n\n"
            for video in videos
        ]
        return {"pixel_values": pixels}, texts


# --- models -------------------------------------------------------------------------------------------------------

_SQUARE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": _SIDE,
    "patch_size": _PATCH,
}
_STREAM: dict[str, Any] = {
    "depth": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "patch_size": _PATCH,
    "spatial_merge_size": _MERGE,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
}


def _configs(
    transformers: Any, text: dict[str, Any]
) -> dict[str, tuple[type[TinyProcessor], str, dict[str, Any]]]:
    """Kind -> processor, model class and configuration fields."""
    plain, mrope = text["plain"], text["mrope"]
    return {
        "llava_next": (
            AnyResolution,
            "LlavaNext",
            {
                "vision_config": transformers.CLIPVisionConfig(**_SQUARE),
                "text_config": transformers.LlamaConfig(**plain),
                "image_grid_pinpoints": AnyResolution.pinpoints(),
                "vision_feature_layer": -2,
                "vision_feature_select_strategy": "default",
            },
        ),
        "llava_onevision": (
            OneVision,
            "LlavaOnevision",
            {
                "vision_config": transformers.SiglipVisionConfig(**_SQUARE, vision_use_head=False),
                "text_config": transformers.Qwen2Config(**plain),
                "image_grid_pinpoints": OneVision.pinpoints(),
                "vision_feature_layer": -1,
                "vision_feature_select_strategy": "full",
            },
        ),
        "qwen2_5_vl": (
            QwenVl,
            "Qwen2_5_VL",
            {
                "vision_config": {**_STREAM, "window_size": 4 * _PATCH, "fullatt_block_indexes": [1, 3]},
                "text_config": {
                    **mrope,
                    "rope_parameters": {
                        "rope_type": "default",
                        "rope_theta": 1e4,
                        "mrope_section": [2, 3, 3],
                    },
                },
            },
        ),
        "qwen3_vl": (
            Qwen3Vl,
            "Qwen3VL",
            {
                "vision_config": {
                    **_STREAM,
                    "num_position_embeddings": _PER_SIDE**2,
                    "deepstack_visual_indexes": [0, 1, 2],
                },
                "text_config": {
                    **mrope,
                    "head_dim": 16,
                    "rope_parameters": {
                        "rope_type": "default",
                        "rope_theta": 1e4,
                        "mrope_section": [4, 2, 2],
                    },
                },
            },
        ),
        "internvl": (
            InternVl,
            "InternVL",
            {
                "vision_config": {**_SQUARE, "image_size": [_SIDE, _SIDE], "patch_size": [_PATCH, _PATCH]},
                "text_config": transformers.Qwen2Config(**plain),
                "image_seq_length": (_PER_SIDE // _MERGE) ** 2,
            },
        ),
        "smolvlm": (
            SmolVlm,
            "SmolVLM",
            {
                "vision_config": _SQUARE,
                "text_config": transformers.LlamaConfig(**plain),
                "scale_factor": _MERGE,
            },
        ),
        "idefics3": (
            Idefics,
            "Idefics3",
            {
                "vision_config": _SQUARE,
                "text_config": transformers.LlamaConfig(**plain),
                "scale_factor": _MERGE,
            },
        ),
    }


def build(kind: str, changes: dict[str, Any]) -> tuple[Any, TinyProcessor]:
    """A model with random weights and its processor.

    Args:
        kind: ``config.model_type``.
        changes: fields of the text configuration to override.
    """
    import transformers

    base = {**tiny._DECODER, **changes}
    classes = {"llava_next": AnyResolution, "llava_onevision": OneVision, "internvl": InternVl}
    classes |= {"qwen2_5_vl": QwenVl, "qwen3_vl": Qwen3Vl, "smolvlm": SmolVlm, "idefics3": Idefics}
    tokenizer = tiny.byte_tokenizer(*classes[kind].markup)
    base["vocab_size"] = len(tokenizer)
    processor_class, name, fields = _configs(transformers, {"plain": base, "mrope": base})[kind]
    ids = {"image_token_id": tokenizer.convert_tokens_to_ids(tiny.IMAGE)}
    if VIDEO in processor_class.markup:
        ids["video_token_id"] = tokenizer.convert_tokens_to_ids(VIDEO)
    if issubclass(processor_class, QwenVl):
        ids["vision_start_token_id"] = tokenizer.convert_tokens_to_ids(QwenVl.start)
        ids["vision_end_token_id"] = tokenizer.convert_tokens_to_ids(QwenVl.end)
    config = getattr(transformers, f"{name}Config")(**fields, **ids, tie_word_embeddings=False)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(model.generation_config, token, base[token])
    return model, processor_class(model, tokenizer, processor_class.make_image_processor())
