"""What is measured for each kind of method.

Every scenario takes a ``Session``, the dense arm and the method's arm, and what to feed them; it adds comparisons to
the session's record. ``zoo run`` and ``zoo bench`` call the same functions.
"""

from zoo.bench.scenarios.decoding import measure_decoding
from zoo.bench.scenarios.diffusion import measure_diffusion
from zoo.bench.scenarios.encoder_tokens import measure_encoder_tokens
from zoo.bench.scenarios.text_tokens import measure_embedding_tokens, measure_text_tokens
from zoo.bench.scenarios.visual_tokens import measure_visual_tokens
from zoo.bench.scenarios.weights import measure_embedding_weights, measure_weights

__all__ = [
    "measure_decoding",
    "measure_diffusion",
    "measure_embedding_tokens",
    "measure_embedding_weights",
    "measure_encoder_tokens",
    "measure_text_tokens",
    "measure_visual_tokens",
    "measure_weights",
]
