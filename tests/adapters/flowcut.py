import torch
from golden_cases import Case, golden
from transformers import CLIPVisionConfig, CLIPVisionModel

from zoo.engines.blocks import BlockReducer
from zoo.methods.visual_tokens.flowcut import FlowCut, cut_size, flow_score
from zoo.models.anatomy import Encoder
from zoo.models.vit_like import encoder_parts

NAMES = {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}


def _encoder(case: Case) -> Encoder:
    layers = case.item("num_layers")
    width, hidden = case.tensor("w.0.mlp.0.weight").shape
    config = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=case.item("num_heads"),
        layer_norm_eps=1e-5,
        hidden_act="quick_gelu",
        image_size=8,
        patch_size=4,
    )
    encoder = encoder_parts(CLIPVisionModel(config).eval())
    for number, block in enumerate(encoder.blocks):
        weights = case.prefixed(f"w.{number}.")
        state = {}
        for name in block.module.state_dict():
            part, kind = name.rsplit(".", 1)
            state[name] = weights[f"{NAMES.get(part, part)}.{kind}"].float()
        block.module.load_state_dict(state)
    return encoder


@golden(
    "flowcut",
    "x",
    "num_heads",
    "num_layers",
    "target_num",
    "select_layer",
    "tokens_after_layer",
    "keep_indices",
    "final_hidden",
    "hidden_minus2",
    "u_cls_attn",
    "u_sem_attn",
    "u_value",
    "u_score",
    "u_rpl",
    "u_prune_num",
)
@torch.no_grad()
def encoder(case: Case) -> None:
    attention, target = case.tensor("u_cls_attn"), case.item("target_num")
    score = flow_score(attention, case.tensor("u_sem_attn"), case.tensor("u_value"))
    torch.testing.assert_close(score, case.tensor("u_score"))
    sizes = torch.full((len(attention),), attention.shape[1])
    cuts = [
        int(cut_size(attention, sizes, target, remaining).max().round())
        for remaining in case.tensor("u_rpl").tolist()
    ]
    assert cuts == case.tensor("u_prune_num").tolist()

    parts, x = _encoder(case), case.tensor("x")
    method = FlowCut(keep_tokens=target, largest_cut_for_all=True)
    blocks = BlockReducer(parts, method.cuts(case.item("select_layer")), method.slug)
    states = []
    for block in parts.blocks:
        x = block.module(x, attention_mask=None)
        states.append(x)
    patches = blocks.sources[:, 1:, 1:].argmax(-1)
    blocks.close()
    assert [state.shape[1] for state in states] == case.tensor("tokens_after_layer").tolist()
    assert patches.tolist() == case.tensor("keep_indices").tolist()
    torch.testing.assert_close(states[-1], case.tensor("final_hidden"), rtol=0, atol=1e-3)
    torch.testing.assert_close(states[-2], case.tensor("hidden_minus2"), rtol=0, atol=1e-3)
