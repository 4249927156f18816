"""The reference VLM: two packaged models and a small trained part, as transformers' own LLaVA.

``dinov2-small-saliency`` sees (frozen, 112 pixels, 64 patches), a two-layer projector translates its patches, and
``smollm2-135m`` answers. What was trained is the projector and low-rank adapters on the linear layers of the language
model; the adapters are merged when the parts are put together, so that the result is a plain
``LlavaForConditionalGeneration``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.image_utils import SizeDict

from zoo.errors import BadInput
from zoo.models import LoadedModel
from zoo.models.anatomy import Decoder
from zoo.models.llama_like import decoder_parts
from zoo.reference.canvases import SIDE

ENCODER, LANGUAGE = "dinov2-small-saliency", "smollm2-135m"
FEATURE_LAYER = 6
"""Encoder blocks that the projector's input has gone through. Behind them, features of small pictures get worse: this
encoder was tuned for saliency, and its last blocks tell where things are rather than what they are."""
RANK = 8
ALPHA_PER_RANK = 2.0
IMAGE = "<image>"
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
    "{% endif %}{% endfor %}"
)
"""A picture, then the question; the answer follows at once. Older turns are not told apart: ask one thing at a time."""
_PROJECTOR, _ADAPTERS = "projector.", "adapters."


def parts() -> tuple[LoadedModel, LoadedModel]:
    """Encoder and language model, float32, on the CPU; from their packages, as the hub's weights differ a little."""
    from zoo.models.loading import load_model

    encoder, language = (
        load_model(name, device="cpu", dtype="fp32", source="package") for name in (ENCODER, LANGUAGE)
    )
    return encoder, language


def put_together(trained: Path) -> tuple[Any, Any]:
    """Model and processor with the trained part in ``trained``.

    Raises:
        DownloadFailed: a part could not be fetched.
        BadInput: the trained part is missing, or does not fit.
    """
    model, processor = assemble(*parts())
    load_trained(model, trained)
    return model, processor


def assemble(encoder: LoadedModel, language: LoadedModel, seed: int = 0) -> tuple[Any, Any]:
    """Model and processor with an untrained projector; float32, on the CPU.

    Args:
        encoder: a DINOv2; its first ``FEATURE_LAYER + 1`` blocks are taken.
        language: a Llama with a tokenizer, which gets the token ``<image>``.
        seed: of the projector's random start. The global random state is neither read nor changed.

    Returns:
        ``LlavaForConditionalGeneration`` and ``LlavaProcessor``, which share no storage with the given models.
    """
    from transformers import (
        Dinov2Config,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = language.tokenizer
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    vision = {**encoder.model.config.to_dict(), "num_hidden_layers": FEATURE_LAYER + 1}
    for name in ("stage_names", "out_features", "out_indices"):  # they follow from the number of layers
        vision.pop(name, None)
    text = {**language.model.config.to_dict(), "vocab_size": len(tokenizer)}
    side = SIDE // vision["patch_size"]
    config = LlavaConfig(
        vision_config=Dinov2Config(**vision),
        text_config=LlamaConfig(**text),
        image_token_id=image_id,
        image_seq_length=side * side,
        vision_feature_layer=-2,  # LLaVA's own choice: what the last but one block puts out
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).eval()
    _copy(encoder.model.state_dict(), model.model.vision_tower)
    words = language.model.model.state_dict()
    rows = words["embed_tokens.weight"]
    fresh = rows.new_zeros(
        len(tokenizer) - len(rows), rows.shape[1]
    )  # of <image>, whose place the patches take
    _copy({**words, "embed_tokens.weight": torch.cat((rows, fresh))}, model.model.language_model)
    model.generation_config = language.model.generation_config
    square = {"height": SIDE, "width": SIDE}
    image_processor = copy.deepcopy(encoder.processor)
    image_processor.size = image_processor.crop_size = SizeDict(**square)
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision["patch_size"],
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,  # [CLS], which the model drops again
        chat_template=TEMPLATE,
    )
    return model, processor


def _copy(state: Mapping[str, torch.Tensor], module: nn.Module) -> None:
    """Fill all of ``module`` from ``state``, which may hold more."""
    own = module.state_dict()
    module.load_state_dict({name: state[name] for name in own}, strict=True)


# --- what was trained --------------------------------------------------------------------------------------------


def trained_tensors(model: Any, adapters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Projector and adapters by name, half precision.

    Args:
        model: assembled.
        adapters: as ``zoo.engines.lora.Adapters.parameters`` names them.
    """
    projector = model.model.multi_modal_projector.state_dict()
    tensors = {f"{_PROJECTOR}{name}": value for name, value in projector.items()}
    for name, value in adapters.items():
        part, _, factor = name.rpartition(".lora_")
        tensors[f"{_ADAPTERS}{part}.{factor[0]}"] = value  # ...q_proj.A and ...q_proj.B
    return {name: value.detach().half().cpu().contiguous() for name, value in tensors.items()}


def save_trained(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write the tensors of ``trained_tensors``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # One entry: safetensors writes several in any order, and the same training should give the same file.
    save_file(tensors, file, {"adapters": f"rank {RANK}, alpha {ALPHA_PER_RANK:g} per rank"})


@torch.no_grad()
def load_trained(model: Any, file: Path) -> None:
    """Put the trained part into an assembled float32 model: the projector as it is, adapters added to the weights.

    Raises:
        BadInput: the file is missing, damaged or of another model.
    """
    try:
        tensors = load_file(file)
        projector = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_PROJECTOR)}
        model.model.multi_modal_projector.load_state_dict(
            {name.removeprefix(_PROJECTOR): value.float() for name, value in projector.items()}, strict=True
        )
        for name in sorted({name.rpartition(".")[0] for name in tensors}):
            linear = model.get_submodule(name.removeprefix(_ADAPTERS))
            linear.weight += ALPHA_PER_RANK * tensors[f"{name}.B"].float() @ tensors[f"{name}.A"].float()
    except (OSError, SafetensorError, KeyError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{file} does not hold the trained part of the reference VLM: {reason}") from None


def language_parts(model: Any) -> Decoder:
    """The decoder inside an assembled model."""
    return decoder_parts(model.model.language_model, model.lm_head)
