import torch
from golden_cases import Case, golden
from transformers import LlamaConfig, LlamaForCausalLM

from zoo.engines.segments import arrange
from zoo.engines.tokens import View
from zoo.methods.visual_tokens.pyramiddrop import PyramidDrop
from zoo.models.anatomy import Decoder, anatomy_of


def decoder_of(case: Case) -> Decoder:
    """A decoder whose layer 0 has the projections of the layer that was about to run."""
    heads, width = case.item("num_heads"), case.tensor("features").shape[-1]
    config = LlamaConfig(
        hidden_size=width,
        num_attention_heads=heads,
        head_dim=case.item("head_dim"),
        intermediate_size=8,
        num_hidden_layers=1,
        vocab_size=8,
        rms_norm_eps=case.item("rms_eps"),
        rope_parameters={"rope_type": "default", "rope_theta": case.item("rope_base")},
    )
    decoder = anatomy_of(LlamaForCausalLM(config)).decoder
    assert decoder is not None
    layer = decoder.layers[0]
    with torch.no_grad():
        layer.attention.query.weight.copy_(case.tensor("q_weight"))
        layer.attention.key.weight.copy_(case.tensor("k_weight"))
        layer.module.input_layernorm.weight.copy_(case.tensor("rms_weight"))
    return decoder


@golden(
    "pyramiddrop",
    "features",
    "q_weight",
    "k_weight",
    "orig_image_tokens",
    "ratio_list",
    "stage",
    "num_keep",
    "image_scores",
    "kept_index",
)
@torch.no_grad()
def selection(case: Case) -> None:
    features, ratios, stage = case.tensor("features"), case.tensor("ratio_list").tolist(), case.item("stage")
    start, number, total = (
        case.item(name) for name in ("image_start", "num_image_tokens", "orig_image_tokens")
    )
    index = torch.arange(start, start + number)
    text = torch.cat((torch.arange(start), torch.arange(start + number, len(features))))
    view = View(features[index], index, index, features[text], text, total, layer=0)
    ratios = ratios[1:]
    method = PyramidDrop(layers=range(1, len(ratios) + 1), keep_ratios=ratios)
    decoder = decoder_of(case)
    torch.testing.assert_close(
        method.scores(decoder, view), case.tensor("image_scores"), rtol=1e-5, atol=1e-6
    )
    reduction = method.select(decoder, ratios[stage], view)
    assert reduction.length == case.item("num_keep")
    row = arrange(reduction, view)
    assert row.place.tolist() == case.tensor("kept_index").tolist()
    assert list(range(len(row.place))) == case.tensor("position_ids_after").tolist()
