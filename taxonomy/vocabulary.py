"""The closed vocabulary of the taxonomy: facets, their terms, and one line on what each means.

A card may only use the terms listed here, so two cards that say ``before-llm`` mean the same place. Facets
are grouped: the *core* facets describe any method; each *survey view* repeats the tree of one survey, so that
the survey's own picture can be drawn from the cards.

This module is pure data plus look-ups. It imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Term:
    """One value of a facet. ``parent`` makes a tree inside the facet; ``label`` is what people read."""

    id: str
    label: str
    definition: str
    parent: str | None = None


@dataclass(frozen=True)
class Facet:
    """One question asked of every method, with the closed list of answers."""

    id: str
    label: str
    question: str
    terms: tuple[Term, ...]
    view: str = "core"
    """``core``, or the slug of the survey whose tree this facet repeats."""

    _index: dict[str, Term] = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", {term.id: term for term in self.terms})

    def __contains__(self, term_id: str) -> bool:
        return term_id in self._index

    def __getitem__(self, term_id: str) -> Term:
        return self._index[term_id]


def _terms(*rows: tuple[str, str, str] | tuple[str, str, str, str]) -> tuple[Term, ...]:
    return tuple(Term(*row) for row in rows)


FAMILY = Facet(
    "family",
    "Family",
    "Which line of research does it belong to?",
    _terms(
        (
            "visual-token-pruning",
            "Visual-token pruning",
            "Removes or merges image tokens of a vision-language model.",
        ),
        (
            "video-token-reduction",
            "Video-token reduction",
            "Removes or merges tokens across the frames of a video.",
        ),
        (
            "vit-token-reduction",
            "Encoder-token reduction",
            "Removes or merges tokens inside a vision (or text) encoder.",
        ),
        (
            "diffusion-token-reduction",
            "Diffusion-token reduction",
            "Removes or merges tokens of an image-generating diffusion model.",
        ),
        ("decoding", "Accelerated decoding", "Produces several tokens per forward pass of the large model."),
        ("kv-cache", "KV-cache compression", "Evicts, merges or shrinks entries of the key-value cache."),
        ("sparse-attention", "Sparse attention", "Reads only a part of the keys for each query."),
        ("weight-pruning", "Weight pruning", "Removes weights, channels or heads inside layers."),
        ("layer-pruning", "Layer pruning", "Removes or skips whole layers or sub-layers."),
        (
            "data-pruning",
            "Data and prompt pruning",
            "Removes training samples, training tokens or prompt tokens.",
        ),
        (
            "normalization",
            "Normalisation skipping",
            "Skips or approximates the computation of normalisation layers.",
        ),
        (
            "evaluation",
            "Evaluation and analysis",
            "Measures or analyses methods instead of accelerating a model.",
        ),
    ),
)

TARGET = Facet(
    "target",
    "Target",
    "What is removed or saved?",
    _terms(
        ("tokens", "Tokens", "Rows of the sequence."),
        ("visual-tokens", "Visual tokens", "Tokens that stand for image or video patches.", "tokens"),
        ("text-tokens", "Text tokens", "Tokens of the prompt or the text.", "tokens"),
        ("frames", "Frames", "Whole video frames, views or image tiles.", "tokens"),
        ("tiles", "Tiles", "Image crops or tiles, encoded or not.", "tokens"),
        ("latent-tokens", "Latent tokens", "Tokens of a diffusion or state-space backbone.", "tokens"),
        ("kv-entries", "KV entries", "Cached key-value pairs."),
        ("kv-channels", "KV channels", "Channels of cached keys or values."),
        (
            "key-reads",
            "Key reads",
            "Reads of keys by a query: the cache stays, the attention touches less of it.",
        ),
        ("weights", "Single weights", "Individual entries of weight matrices."),
        ("channels", "FFN channels", "Intermediate neurons of the feed-forward block."),
        ("heads", "Attention heads", "Whole heads or key-value groups."),
        ("experts", "Experts", "Whole experts of a mixture."),
        ("hidden-dims", "Hidden dimensions", "Dimensions of the residual stream."),
        ("layers", "Layers", "Whole transformer blocks."),
        ("sublayers", "Sub-layers", "An attention or an MLP sub-block."),
        ("edges", "Graph edges", "Connections of the computation graph."),
        ("filters", "Filters", "Convolution filters or channels."),
        ("decoding-steps", "Decoding steps", "Sequential forward passes of the large model."),
        ("denoising-work", "Denoising work", "Positions or steps of a (masked) diffusion process."),
        ("training-samples", "Training samples", "Examples of a training set."),
        (
            "normalisation-statistics",
            "Normalisation statistics",
            "Means and variances that need not be computed.",
        ),
        ("nothing", "Nothing", "It measures, organises or adds information; no work is removed."),
    ),
)

WHERE = Facet(
    "where",
    "Where",
    "At which place of the pipeline does it act?",
    _terms(
        ("input", "Input", "Before the model: data, prompt text, pixels, tiles."),
        ("inside-encoder", "Inside the encoder", "Between or within the blocks of a vision or text encoder."),
        ("after-encoder", "After the encoder", "On the encoder's output, before or at the projector."),
        ("before-llm", "Before the LLM", "On projected visual tokens, before the first decoder layer."),
        ("inside-llm", "Inside the LLM", "Between decoder layers."),
        ("attention", "In attention", "Within the attention of a layer, or its key-value cache."),
        ("ffn", "In the FFN", "Within the feed-forward block of a layer."),
        ("normalisation", "In normalisation layers", "Within LayerNorm or RMSNorm."),
        ("whole-model", "Whole model", "Any matrix or layer of the network."),
        ("lm-head", "At the LM head", "On next-token logits."),
        ("decode-loop", "Decode loop", "Around the model: how next tokens are proposed and checked."),
        ("denoising-loop", "Denoising loop", "Around or inside the steps of a diffusion process."),
        ("training-loop", "Training loop", "In the training procedure."),
        ("outside", "Outside the model", "Benchmarks, analyses, surveys."),
    ),
)

SIGNAL = Facet(
    "signal",
    "Signal",
    "What decides what goes and what stays?",
    _terms(
        ("attention", "Attention", "Attention weights or query-key products."),
        ("cls-attention", "[CLS] attention", "Attention that the class token pays to patches.", "attention"),
        (
            "encoder-attention",
            "Encoder self-attention",
            "Attention among patches in the encoder.",
            "attention",
        ),
        (
            "text-to-vision-attention",
            "Text-to-vision attention",
            "Attention that text rows pay to visual tokens.",
            "attention",
        ),
        (
            "observed-attention",
            "Accumulated attention",
            "Attention a key received from the queries seen so far.",
            "attention",
        ),
        (
            "expected-attention",
            "Expected attention",
            "Attention estimated for queries yet to come.",
            "attention",
        ),
        (
            "query-key-bound",
            "Query-key estimate",
            "A cheap bound or estimate of query-key products.",
            "attention",
        ),
        ("similarity", "Similarity", "Distance between token, key or hidden vectors."),
        (
            "diversity",
            "Diversity",
            "How well a subset covers the others (max-min, DPP, k-centre).",
            "similarity",
        ),
        ("clustering", "Clustering", "Membership in a cluster of similar vectors.", "similarity"),
        ("graph", "Graph", "Propagation or centrality on a token graph.", "similarity"),
        (
            "temporal-similarity",
            "Temporal similarity",
            "Likeness of the same place in successive frames.",
            "similarity",
        ),
        ("text-relevance", "Text relevance", "Similarity between visual tokens and the instruction."),
        ("activation-norm", "Activation norm", "Size of activations or hidden states."),
        (
            "principal-components",
            "Principal components",
            "Energy of directions in a PCA basis of activations.",
        ),
        ("activation-fluctuation", "Activation fluctuation", "Variation of activations around their mean."),
        ("hidden-state-change", "Hidden-state change", "How much a layer or module changes its input."),
        (
            "cross-layer-predictability",
            "Cross-layer predictability",
            "How well a statistic follows from an earlier layer.",
        ),
        ("information", "Information measure", "Entropy, mutual information, rank or flow of information."),
        ("weight-magnitude", "Weight magnitude", "Size of weights or of groups of weights."),
        ("gradient", "Gradient", "First-order (or zeroth-order) sensitivity of a loss."),
        ("second-order", "Second-order", "Hessian or reconstruction error of a layer."),
        ("task-loss", "Measured loss", "Loss, perplexity or accuracy after actual removal."),
        ("output-change", "Output change", "Change of the output distribution after actual removal."),
        (
            "sample-loss",
            "Sample loss",
            "Loss, perplexity or error of the current model on a sample or token.",
        ),
        ("position", "Position", "Place in the sequence, image grid or depth alone."),
        ("random", "Random", "Uniform chance."),
        ("learned-score", "Learned score", "A trained gate, router, threshold or predictor."),
        (
            "confidence",
            "Model confidence",
            "Probability or confidence of an intermediate or draft prediction.",
        ),
        ("ngram-match", "N-gram match", "Repetition of a token sequence in a store."),
        ("token-statistics", "Token statistics", "Counts or recycled logits of earlier tokens."),
        ("draft-model", "Draft model", "Probabilities of a smaller or reduced model."),
        ("geometry", "Geometry", "Depth, camera pose or 3-D position."),
        ("none", "None", "Nothing is decided."),
        ("host-score", "Host's score", "Whatever score another method supplies; it is wrapped or corrected."),
    ),
)

OPERATION = Facet(
    "operation",
    "Operation",
    "What happens to the targeted things?",
    _terms(
        ("drop", "Drop", "Removed for good."),
        ("early-exit", "Early exit", "Leaves with its prediction finalised."),
        ("mark", "Mark", "Runs of dropped things are replaced by a marker."),
        ("merge", "Merge", "Combined with others, usually as a weighted mean."),
        ("recycle", "Recycle", "Parked, summarised or re-inserted later."),
        (
            "transform",
            "Transform",
            "Replaced by a linear map: rotation, re-solved weights, many-to-many tokens.",
        ),
        ("mask", "Mask", "Set to zero or hidden; shapes stay."),
        ("skip", "Skip", "Not computed or not read for this input; still there."),
        ("compensate", "Compensate", "The loss is made up for by a bias or a weight update."),
        ("quantise", "Quantise", "Stored or computed with fewer bits."),
        ("draft-and-verify", "Draft and verify", "Proposed cheaply, checked in parallel by the large model."),
        ("iterate", "Iterate", "Refined in parallel passes to a fixed point."),
        ("measure", "Measure", "Nothing changes; something is measured."),
        ("rescore", "Rescore", "Corrects another method's scores; removes nothing itself."),
        ("augment", "Augment", "Information is added, nothing is removed."),
    ),
)

BUDGET = Facet(
    "budget",
    "Budget",
    "How is the amount of removal set?",
    _terms(
        ("fixed-ratio", "Fixed ratio", "A fixed fraction of what is there."),
        ("fixed-count", "Fixed count", "A fixed number, whatever the input."),
        ("pattern", "Fixed pattern", "A fixed N:M pattern."),
        ("schedule", "Schedule", "A list of ratios or counts over layers or steps."),
        ("threshold", "Threshold", "Whatever passes a threshold."),
        ("adaptive-input", "Adaptive per input", "The amount depends on the input."),
        (
            "adaptive-layer",
            "Adaptive per layer",
            "Layers or heads share a total according to their importance.",
        ),
        ("global-ranking", "Global ranking", "One threshold over all layers meets a total."),
        ("search", "Search", "Found by a search over configurations."),
        ("learned", "Learned", "Set by training, usually with a target."),
        ("none", "None", "No budget."),
    ),
)

WHEN = Facet(
    "when",
    "When",
    "At what time does it act?",
    _terms(
        ("offline", "Offline", "Once, before the model is used."),
        ("prefill", "At prefill", "While the prompt (or the image) is processed."),
        ("decode", "Each decode step", "While tokens are generated."),
        ("denoise", "Each denoising step", "While a diffusion process runs."),
        ("training", "In training", "While the model is trained."),
        ("evaluation", "In evaluation", "When models are compared."),
    ),
)

TRAINING = Facet(
    "training",
    "Training",
    "What must be trained or collected first?",
    _terms(
        ("none", "None", "Works on the model as it is."),
        (
            "calibration",
            "Calibration",
            "Needs statistics or gradients over a little data; no weight is trained.",
        ),
        (
            "layer-reconstruction",
            "Layer reconstruction",
            "The weights of each layer are re-solved or tuned alone on its calibration inputs.",
        ),
        ("light-module", "Light module", "A small module is trained; the model is frozen."),
        ("peft", "Adapters", "Low-rank adapters or a few parameters are tuned."),
        ("fine-tune", "Fine-tuning", "The model itself is fine-tuned."),
        ("from-scratch", "From scratch", "The model is trained from scratch (or nearly)."),
    ),
)

MODALITY = Facet(
    "modality",
    "Modality",
    "On which kind of input was it shown?",
    _terms(
        ("text", "Text", "Text only."),
        ("image", "Image", "Single images, vision only."),
        ("image-text", "Image and text", "Images with text."),
        ("multi-image", "Several images", "Several images, views or in-context examples with text."),
        ("video-text", "Video and text", "Videos with text."),
        ("image-generation", "Image generation", "Images are the output."),
        ("embedding", "Embedding", "Texts are turned into vectors."),
    ),
)

ARCHITECTURE = Facet(
    "architecture",
    "Architecture",
    "On which kind of network does it work?",
    _terms(
        ("decoder-llm", "Decoder LLM", "Causal decoder language model."),
        ("vlm", "Vision-language model", "Vision encoder, projector and decoder LLM."),
        ("vit", "Vision transformer", "Plain ViT-like encoder."),
        ("text-encoder", "Text encoder", "BERT-like or embedding encoder."),
        ("encoder-decoder", "Encoder-decoder", "Sequence-to-sequence transformer."),
        ("diffusion", "Diffusion model", "Text-to-image diffusion network."),
        ("diffusion-lm", "Diffusion LM", "Masked-diffusion language model."),
        ("ssm", "State-space model", "Mamba-like backbone."),
        ("cnn", "CNN", "Convolutional network."),
    ),
)

# --- Survey views ---------------------------------------------------------------------------------------------

_GR = "generation-refinement-survey"

GENERATION = Facet(
    "generation",
    "Generation",
    "How are candidate tokens produced? (generation-refinement survey, branch A)",
    _terms(
        (
            "predefined-fill",
            "A1 Predefined fill",
            "Guess positions are filled with arbitrary or copied tokens and fixed by iteration.",
        ),
        ("retrieval", "A2 Retrieval", "Candidates are copied from text inside or outside the context."),
        ("ngram-statistics", "A3 N-gram statistics", "Candidates come from statistics of tokens."),
        (
            "autoregressive-draft",
            "A4 Autoregressive draft",
            "A smaller or reduced model drafts token by token.",
        ),
        (
            "independent-drafter",
            "A4a Independent drafter",
            "A separate small language model.",
            "autoregressive-draft",
        ),
        (
            "layer-skipping",
            "A4b Layer skipping",
            "The target drafts with some layers skipped.",
            "autoregressive-draft",
        ),
        ("early-exit", "A4c Early exit", "The target drafts from an early layer.", "autoregressive-draft"),
        (
            "feature-head",
            "A4d Feature-level head",
            "A light head extrapolates the target's features.",
            "autoregressive-draft",
        ),
        (
            "multi-token-prediction",
            "A5 Multi-token prediction",
            "Parallel heads of the target predict several positions.",
        ),
        ("masked-drafting", "A6 Diffusion or masked drafting", "A block of masks is filled in parallel."),
    ),
    _GR,
)

REFINEMENT = Facet(
    "refinement",
    "Refinement",
    "How are candidates checked? (generation-refinement survey, branch B)",
    _terms(
        ("single-pass-linear", "B1 Single pass, linear", "One chain, one verification pass."),
        ("single-pass-tree", "B2 Single pass, tree", "A tree of candidates under tree attention, one pass."),
        ("iterative", "B3 Iterative", "Several passes over the same block."),
    ),
    _GR,
)

ACCEPTANCE = Facet(
    "acceptance",
    "Acceptance",
    "Which rule accepts a candidate? (generation-refinement survey, axis C)",
    _terms(
        ("greedy-match", "C1 Greedy match", "Equal to the target's argmax."),
        ("sample-match", "C1 Sample match", "Equal to a token sampled from the target."),
        ("rejection-sampling", "C2 Rejection sampling", "Exact in distribution."),
        ("typical", "C3 Typical or threshold", "Good enough under a softened rule; lossy."),
        ("confidence", "C3 Confidence", "The model's own confidence unmasks it."),
        ("fixed-point", "C4 Fixed point", "The block no longer changes."),
    ),
    _GR,
)

TOPOLOGY = Facet(
    "topology",
    "Topology",
    "What shape has the draft? (generation-refinement survey, axis D)",
    _terms(
        ("chain", "D1 Chain", "One sequence."),
        ("static-tree", "D2 Static tree", "A tree of fixed shape."),
        ("dynamic-tree", "D3 Dynamic tree", "A tree whose shape follows the probabilities."),
        ("spine-tree", "D4 Anisotropic spine tree", "A long spine with short branches."),
        ("window-branches", "D5 Window and branches", "A 2-D window plus n-gram branches."),
        ("guess-block", "D5 Block of guesses", "A plain block of guessed positions, iterated."),
        ("mask-block", "D6 Block of masks", "A block of masked positions."),
    ),
    _GR,
)

_DP = "dnn-pruning-survey"

SPEEDUP = Facet(
    "speedup",
    "Speed-up",
    "Which hardware or kernel turns the saving into time? (network-pruning survey, facet A)",
    _terms(
        ("unstructured", "A1 Unstructured", "Single weights; needs sparse kernels to be faster."),
        ("semi-structured", "A2 Semi-structured", "A small fixed pattern such as 2:4; fast where supported."),
        ("structured", "A3 Structured", "Whole structures disappear; every device gains."),
    ),
    _DP,
)

PRUNING_TIME = Facet(
    "pruning_time",
    "Pruning time",
    "When, in the life of the network, is it pruned? (network-pruning survey, facet B)",
    _terms(
        ("before-training", "B1 Before training", "The mask is chosen at initialisation."),
        ("during-training", "B2 During training", "Weights and mask evolve together."),
        ("after-training", "B3 After training", "Starts from converged weights."),
        (
            "post-training",
            "B3 Post-training",
            "After training, without retraining, with little or no data.",
            "after-training",
        ),
        (
            "prune-and-finetune",
            "B3 Prune and fine-tune",
            "After training, then recovered by training.",
            "after-training",
        ),
        ("run-time", "B4 Run-time", "Chosen per input while running."),
    ),
    _DP,
)

CRITERION = Facet(
    "criterion",
    "Criterion",
    "How is the decision made? (network-pruning survey, facet C)",
    _terms(
        ("score", "C1 Criterion", "Score, then cut."),
        ("magnitude", "C1 Magnitude", "|w|.", "score"),
        ("norm", "C1 Norm of a group", "An l_p norm of a filter, channel or head.", "score"),
        (
            "saliency",
            "C1 Sensitivity or saliency",
            "Effect on loss or output, by gradient or activation statistics.",
            "score",
        ),
        (
            "loss-change",
            "C1 Loss change",
            "Difference in loss, by Taylor expansion or by actual removal.",
            "score",
        ),
        ("learn", "C2 Learn to prune", "The decision is optimised."),
        (
            "sparsity-regularisation",
            "C2 Sparsity regularisation",
            "Penalties or gates push units to zero.",
            "learn",
        ),
        ("meta-learning", "C2 Meta-learning", "A network predicts pruned weights or their quality.", "learn"),
        ("graph-network", "C2 Graph network", "A graph network proposes decisions.", "learn"),
        ("reinforcement-learning", "C2 Reinforcement learning", "An agent picks ratios.", "learn"),
        (
            "bi-level",
            "C2 Bi-level optimisation",
            "Mask and weights are optimised in two nested problems.",
            "learn",
        ),
        (
            "evolutionary-search",
            "C2 Evolutionary search",
            "Gradient-free search over configurations.",
            "learn",
        ),
        (
            "learned-mask",
            "C2 Learned mask",
            "Masks are trained with a straight-through or soft estimate.",
            "learn",
        ),
    ),
    _DP,
)

FUSION = Facet(
    "fusion",
    "Fusion",
    "With which other compression is pruning combined? (network-pruning survey, facet D)",
    _terms(
        ("quantisation", "Quantisation", "Pruning with fewer bits."),
        ("low-rank", "Low rank", "Pruning with tensor decomposition."),
        ("architecture-search", "Architecture search", "Pruning as a search for an architecture."),
        ("distillation", "Distillation", "Pruning with a teacher."),
    ),
    _DP,
)

PLACEMENT = Facet(
    "placement",
    "Placement",
    "Where are visual tokens pruned? (UniPruneBench)",
    _terms(
        ("vit-only", "ViT-only", "After the vision tower or projector, before the LLM."),
        ("llm-only", "LLM-only", "Between decoder layers."),
        ("hybrid", "Hybrid", "Both."),
    ),
    "uniprunebench",
)

COMPRESSION = Facet(
    "compression",
    "Compression",
    "Is the sequence or the network compressed? (EffiVLM-Bench)",
    _terms(
        ("token-compression", "1 Token compression", "Fewer tokens or cache entries."),
        (
            "visual-token-pruning",
            "1a Visual-token pruning",
            "Visual tokens leave the sequence.",
            "token-compression",
        ),
        ("kv-compression", "1b KV-cache compression", "Cache entries leave.", "token-compression"),
        ("parameter-compression", "2 Parameter compression", "Fewer or smaller parameters."),
        ("parameter-pruning", "2a Weight pruning", "Weights leave.", "parameter-compression"),
        (
            "parameter-quantisation",
            "2b Weight quantisation",
            "Weights take fewer bits.",
            "parameter-compression",
        ),
    ),
    "effivlm-bench",
)

FACETS: dict[str, Facet] = {
    facet.id: facet
    for facet in (
        FAMILY, TARGET, WHERE, SIGNAL, OPERATION, BUDGET, WHEN, TRAINING, MODALITY, ARCHITECTURE,
        GENERATION, REFINEMENT, ACCEPTANCE, TOPOLOGY,
        SPEEDUP, PRUNING_TIME, CRITERION, FUSION,
        PLACEMENT, COMPRESSION,
    )
}  # fmt: skip

CORE_FACETS = tuple(facet.id for facet in FACETS.values() if facet.view == "core")


@dataclass(frozen=True)
class Property:
    """A yes/no statement on a card that a test can execute."""

    id: str
    label: str
    statement: str
    check: str
    """How ``tests/test_card_contracts.py`` executes it."""


PROPERTIES: dict[str, Property] = {
    prop.id: prop
    for prop in (
        Property("query_aware", "Query-aware", "What is kept depends on the question.", "Another question changes what is kept; without the property it must not."),
        Property("needs_attention_maps", "Needs attention maps", "A full attention matrix must be materialised.", "Runs under SDPA while any full attention map is forbidden."),
        Property("lossless", "Lossless", "The output is that of the dense model.", "Same tokens as plain greedy decoding."),
        Property("deterministic", "Deterministic", "The same input gives the same result.", "Two runs agree to the bit."),
        Property("batchable", "Batchable", "Works on padded batches.", "A padded batch gives what single inputs give."),
        Property("shrinks_sequence", "Shrinks the sequence", "Later layers see fewer tokens.", "The length seen by the layers falls as the report says."),
        Property("shrinks_cache", "Shrinks the KV cache", "Fewer key-value pairs are stored.", "Lengths per layer of the cache fall as the report says."),
        Property("shrinks_weights", "Shrinks the weights", "Matrices are really smaller.", "Fewer parameters in memory, as the report says."),
        Property("keeps_positions", "Keeps positions", "Survivors keep their original position ids.", "Position ids seen by later layers are the original ones."),
    )
}  # fmt: skip


def facet(name: str) -> Facet:
    """Return the facet called ``name`` (dashes and underscores are alike); raises ``KeyError`` if there is none."""
    return FACETS[name.replace("-", "_")]
