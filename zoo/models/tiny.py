"""Tiny models with seeded random weights, one per architecture: built in milliseconds, without a file.

They are for tests and for trying a method out. Text and pictures go in as with real models: each comes with a
byte-level tokenizer, an image processor, or both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from zoo.errors import BadInput
from zoo.models.quiet import quiet_transformers

PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"
_SPECIAL = (PAD, BOS, EOS, IMAGE)
_PAD_ID, _BOS_ID, _EOS_ID, _IMAGE_ID = range(4)
_VOCABULARY = 256 + len(_SPECIAL)

_DECODER: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": _PAD_ID,
    "bos_token_id": _BOS_ID,
    "eos_token_id": _EOS_ID,
    "tie_word_embeddings": False,
}
_ENCODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": 8,
}


def tiny_model(name: str, *, seed: int = 0, attention: str = "sdpa", **changes: Any) -> tuple[Any, Any]:
    """Build one of the ``tiny-*`` models and its processor.

    Args:
        name: a name such as ``tiny-llama``.
        seed: of the weights. The global random state is neither read nor changed.
        attention: attention implementation of transformers.
        changes: fields of the configuration to override (of the text configuration, for ``tiny-llava``), such as
            ``num_hidden_layers=6``.

    Returns:
        The model (fp32, CPU, eval mode) and its tokenizer, image processor or multimodal processor.

    Raises:
        BadInput: there is no such tiny model, or transformers refuses the attention or a changed field.
    """
    if name not in _BUILDERS:
        raise BadInput(f"there is no tiny model called '{name}'; there are {', '.join(_BUILDERS)}")
    # Building initialises weights from the global generator, and we replace them from our own afterwards.
    try:
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            model, processor = _BUILDERS[name](changes)
            model.set_attn_implementation(attention)
    except (ValueError, ImportError) as error:
        raise BadInput(f"{name} cannot be built so: {str(error).splitlines()[0]}") from None
    _randomise(model, seed)
    return model.eval(), processor


@torch.no_grad()
def _randomise(model: nn.Module, seed: int) -> None:
    """Weights lively enough that attention, gates and norms matter (the usual std of 0.02 makes all tokens alike).

    Matrices and filters ``[out, in, ...]`` get a standard deviation of ``fan_in ** -0.5``, so activations keep their
    size, and so do the logits of a head tied to the embedding; embeddings of positions and special patches get 1, norms
    and layer scales stay near one, biases are small but not zero.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            adds_to_patches = "position_embedding" in name or name.endswith("_token")
            parameter.copy_(noise if adds_to_patches else noise / math.sqrt(parameter[0].numel()))
        elif name.endswith(("weight", "lambda1", "lambda_1", "lambda_2")):
            parameter.copy_(1 + 0.1 * noise)
        else:
            parameter.copy_(0.1 * noise)


def byte_tokenizer(*extra: str) -> Any:
    """A tokenizer without training: one token per UTF-8 byte, ``<s>`` in front, padding on the left.

    Args:
        extra: further special tokens; their ids follow those of the bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: index for index, token in enumerate((*_SPECIAL, *alphabet, *extra))}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (*_SPECIAL, *extra)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, _BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[IMAGE, *extra],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


@cache
def _image_processor(kind: str, size: int) -> Any:
    """A stock image processor for square pictures of ``size`` pixels.

    Made from its JSON form by the auto class, which picks the variant for the libraries at hand (torchvision or PIL).
    """
    from transformers import AutoImageProcessor

    square = {"height": size, "width": size}
    fields = {"image_processor_type": kind, "do_convert_rgb": True, "size": square, "crop_size": square}
    with TemporaryDirectory() as folder:
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(fields), encoding="utf-8")
        return AutoImageProcessor.from_pretrained(folder)


def _decoder(kind: str, model: str | None = None, **own: Any) -> Callable[[dict[str, Any]], tuple[Any, Any]]:
    def build(changes: dict[str, Any]) -> tuple[Any, Any]:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**{**_DECODER, **own, **changes})
        return getattr(transformers, f"{model or kind}ForCausalLM")(config), byte_tokenizer()

    return build


def _masked_diffusion(changes: dict[str, Any]) -> tuple[Any, Any]:
    """As LLaDA: a Llama whose attention looks both ways, and a mask to be filled in."""
    from transformers import LlamaConfig, LlamaForCausalLM

    own = {"vocab_size": _VOCABULARY + 1, "mask_token_id": _VOCABULARY, "is_causal": False}
    return LlamaForCausalLM(LlamaConfig(**{**_DECODER, **own, **changes})), byte_tokenizer("<mask>")


def _encoder(
    kind: str, processor: str, suffix: str = "Model", **own: Any
) -> Callable[[dict[str, Any]], tuple[Any, Any]]:
    def build(changes: dict[str, Any]) -> tuple[Any, Any]:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**{**_ENCODER, **own, **changes})
        model = getattr(transformers, f"{kind}{suffix}")(config)
        return model, _image_processor(processor, config.image_size)

    return build


def _segmenter(changes: dict[str, Any]) -> tuple[Any, Any]:
    from zoo.models.segvit import SegViT, SegViTConfig

    own = {"exits": [1, 2, 3], "head_size": 32, "head_layers": 2, "head_heads": 2, "num_labels": 6}
    config = SegViTConfig(**{**own, "backbone": {"model_type": "vit", **_ENCODER}, **changes})
    return SegViT(config), _image_processor("ViTImageProcessor", _ENCODER["image_size"])


def _vision_mamba(**own: Any) -> Callable[[dict[str, Any]], tuple[Any, Any]]:
    def build(changes: dict[str, Any]) -> tuple[Any, Any]:
        from zoo.models.vim import VimConfig, VimForImageClassification

        config = VimConfig(**{"num_labels": 10, **own, **changes})
        return VimForImageClassification(config), _image_processor("ViTImageProcessor", config.image_size)

    return build


def _text_encoder(changes: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import BertConfig, BertModel

    own = {name: value for name, value in _DECODER.items() if name != "num_key_value_heads"}
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "right"  # positions of BERT count from the first token
    return BertModel(BertConfig(**{**own, **changes})), tokenizer


def _gpt2(changes: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    own = {name: value for name, value in _DECODER.items() if name != "num_key_value_heads"}
    own |= {"n_inner": own.pop("intermediate_size"), "tie_word_embeddings": True}
    return GPT2LMHeadModel(GPT2Config(**{**own, **changes})), byte_tokenizer()


def _llava(vision: dict[str, Any], text: dict[str, Any]) -> Callable[[dict[str, Any]], tuple[Any, Any]]:
    def build(changes: dict[str, Any]) -> tuple[Any, Any]:
        return _build_llava({**_ENCODER, **vision}, {**_DECODER, **text, **changes})

    return build


def _build_llava(vision_fields: dict[str, Any], text_fields: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    vision = CLIPVisionConfig(**vision_fields)
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text_fields),
        image_token_id=_IMAGE_ID,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    processor = LlavaProcessor(
        image_processor=_image_processor("CLIPImageProcessor", vision.image_size),
        tokenizer=byte_tokenizer(),
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,  # [CLS], which the model drops again
    )
    model = LlavaForConditionalGeneration(config)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(model.generation_config, name, getattr(config.text_config, name))
    return model, processor


def _vision_language(kind: str) -> Callable[[dict[str, Any]], tuple[Any, Any]]:
    def build(changes: dict[str, Any]) -> tuple[Any, Any]:
        from zoo.models import tiny_vlm

        return tiny_vlm.build(kind, changes)

    return build


def _text_to_image(changes: dict[str, Any]) -> tuple[Any, Any]:
    from zoo.models.diffusion import tiny_text_to_image

    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = 77
    return tiny_text_to_image(tokenizer, _VOCABULARY, changes), tokenizer


_BUILDERS: dict[str, Callable[[dict[str, Any]], tuple[Any, Any]]] = {
    "tiny-llama": _decoder("Llama"),
    "tiny-llama-mha": _decoder("Llama", num_key_value_heads=4),
    "tiny-qwen2": _decoder("Qwen2", tie_word_embeddings=True),
    "tiny-qwen3": _decoder("Qwen3", head_dim=24),
    "tiny-mistral": _decoder("Mistral", sliding_window=None),
    "tiny-gemma3": _decoder(
        "Gemma3Text",
        "Gemma3",
        head_dim=24,
        query_pre_attn_scalar=24,
        sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        tie_word_embeddings=True,
    ),
    "tiny-phi3": _decoder("Phi3"),
    "tiny-llada": _masked_diffusion,
    "tiny-gpt2": _gpt2,
    "tiny-bert": _text_encoder,
    "tiny-vit": _encoder("ViT", "ViTImageProcessor", "ForImageClassification", num_labels=10),
    "tiny-deit": _encoder("DeiT", "DeiTImageProcessor"),
    "tiny-dinov2": _encoder("Dinov2", "BitImageProcessor", mlp_ratio=2),
    "tiny-dinov2-registers": _encoder(
        "Dinov2WithRegisters", "BitImageProcessor", mlp_ratio=2, num_register_tokens=4
    ),
    "tiny-clip": _encoder("CLIPVision", "CLIPImageProcessor"),
    "tiny-siglip": _encoder("SiglipVision", "SiglipImageProcessor"),
    "tiny-beit": _encoder(
        "Beit",
        "BeitImageProcessor",
        "ForImageClassification",
        use_relative_position_bias=True,
        num_labels=10,
    ),
    "tiny-segvit": _segmenter,
    "tiny-vim": _vision_mamba(hidden_size=64, num_hidden_layers=4, image_size=48, patch_size=8),
    "small-vim": _vision_mamba(hidden_size=192),
    "tiny-llava": _llava({}, {}),
    "small-llava": _llava(
        {
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "image_size": 336,
            "patch_size": 14,
        },
        {
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        },
    ),
    "tiny-llava-next": _vision_language("llava_next"),
    "tiny-llava-onevision": _vision_language("llava_onevision"),
    "tiny-qwen2.5-vl": _vision_language("qwen2_5_vl"),
    "tiny-qwen3-vl": _vision_language("qwen3_vl"),
    "tiny-internvl": _vision_language("internvl"),
    "tiny-smolvlm": _vision_language("smolvlm"),
    "tiny-idefics3": _vision_language("idefics3"),
    "tiny-diffusion": _text_to_image,
}
