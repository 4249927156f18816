import torch
from golden_cases import Case, golden
from transformers import LlamaConfig, LlamaForCausalLM

from zoo.engines.segments import arrange
from zoo.engines.tokens import View
from zoo.methods.visual_tokens.transprune import MODULES, TransPrune, token_transition
from zoo.models.anatomy import Decoder, anatomy_of


def decoder_of(case: Case, layer: int) -> Decoder:
    """A decoder whose layer ``layer`` has the projections of the layer about to run."""
    config = LlamaConfig(
        hidden_size=case.tensor("features").shape[-1],
        num_attention_heads=case.item("num_heads"),
        num_key_value_heads=case.item("num_kv_heads"),
        head_dim=case.item("head_dim"),
        intermediate_size=8,
        num_hidden_layers=layer + 1,
        vocab_size=8,
        rms_norm_eps=case.item("rms_eps"),
        rope_parameters={"rope_type": "default", "rope_theta": case.item("rope_base")},
    )
    decoder = anatomy_of(LlamaForCausalLM(config)).decoder
    assert decoder is not None
    coming = decoder.layers[layer]
    coming.attention.query.weight.copy_(case.tensor("q_weight"))
    coming.attention.key.weight.copy_(case.tensor("k_weight"))
    coming.module.input_layernorm.weight.copy_(case.tensor("rms_weight"))
    return decoder


@golden(
    "transprune",
    "features",
    "q_weight",
    "k_weight",
    "rms_weight",
    "image_start",
    "num_image_tokens",
    "keep_ratio",
    "ttv_before",
    "ttv_after",
    "ttv_per_layer",
    "kept_index",
)
@torch.no_grad()
def one_cut(case: Case) -> None:
    features, before, after = case.tensor("features"), case.tensor("ttv_before"), case.tensor("ttv_after")
    start, number = case.item("image_start"), case.item("num_image_tokens")
    layer, length = len(before), features.shape[1]
    index = torch.arange(start, start + number)
    text = torch.cat((torch.arange(start), torch.arange(start + number, length)))
    hidden = {
        (seen, place): modules[seen, module].unsqueeze(0)
        for seen in range(layer)
        for module, pair in enumerate(MODULES)
        for place, modules in zip(pair, (before, after), strict=True)
    }
    view = View(
        tokens=features[0, index],
        index=index,
        original=index,
        text=features[0, text],
        text_index=text,
        total=number,
        layer=layer,
        ordinal=torch.arange(number),
        _hidden=hidden,
    )
    method = TransPrune(layers=(layer,), keep_ratios=(case.item("keep_ratio"),), first_layer=1)
    expected = case.tensor("ttv_per_layer")
    for seen in range(layer):
        whole = sum(token_transition(x, y) for x, y in zip(before[seen], after[seen], strict=True))
        torch.testing.assert_close(whole, expected[seen], rtol=0, atol=1e-6)
        torch.testing.assert_close(method.transition(view, seen), expected[seen, index], rtol=0, atol=1e-6)
    reduction = method.select(decoder_of(case, layer), (layer,), 0, range(layer), view)
    assert reduction.length == case.item("num_keep")
    row = arrange(reduction, view)
    assert row.place.tolist() == case.tensor("kept_index").tolist()
    torch.testing.assert_close(expected[:, row.place], case.tensor("ttv_after_prune"), rtol=0, atol=1e-6)
    noted = view.memory["transprune"][reduction.index[0]]
    torch.testing.assert_close(
        noted, case.tensor("ttv_after_prune")[:, row.visual].sum(0), rtol=0, atol=1e-6 * layer
    )
    assert list(range(len(row.place))) == case.tensor("position_ids_after").tolist()
