"""SliceGPT against its official code: principal components, the shortcuts, logits of fused and of sliced models."""

from __future__ import annotations

import torch
from golden_cases import Case, golden
from golden_llama import golden_llama

from zoo.methods.weights._slicegpt_rotation import principal_components, second_moment
from zoo.methods.weights.slicegpt import SliceGPT
from zoo.models.anatomy import Decoder, DecoderLayer, anatomy_of
from zoo.models.pruned import refit


@golden("slicegpt", "X", "mask", "eigval", "Q")
def components(case: Case) -> None:
    x, mask = case.tensor("X"), case.tensor("mask").bool()
    for suffix, valid in (("", mask), ("_nomask", torch.ones_like(mask))):
        tokens = (batch[own] for batch, own in zip(x, valid, strict=True))
        values, vectors = principal_components(second_moment(tokens))
        torch.testing.assert_close(values, case.tensor(f"eigval{suffix}"), rtol=1e-6, atol=0.0)
        same = (vectors * case.tensor(f"Q{suffix}")).sum(0).abs()  # an eigenvector has no sign
        torch.testing.assert_close(same, torch.ones_like(same), rtol=0.0, atol=1e-6)


def logits(model: torch.nn.Module, case: Case) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=case.tensor("eval_ids")).logits


def sliced(case: Case, width: int, method: SliceGPT) -> tuple[torch.Tensor, Decoder]:
    model = golden_llama(case)
    decoder = anatomy_of(model).decoder
    assert decoder is not None
    generator = torch.Generator().manual_seed(0)
    method.slice_to(width, decoder, model, case.tensor("input_ids"), generator, batch=4)
    refit(model)
    found = anatomy_of(model).decoder
    assert found is not None
    return logits(model, case), found


@golden("slicegpt", "config_json", "input_ids", "eval_ids", "logits_fused")
def whole_model(case: Case) -> None:
    full = golden_llama(case).config.hidden_size
    fused, _ = sliced(case, full, SliceGPT(centre_embeddings=True))
    torch.testing.assert_close(fused, case.tensor("logits_fused"), rtol=0.0, atol=1e-3)
    for index in sorted(name.split(".")[0] for name in case.arrays if name.endswith(".dim")):
        width = int(case.item(f"{index}.dim"))
        for orientation in ("pca", "random"):
            for suffix, official in (("", True), ("_nomean", False)):
                if f"{index}.logits_sliced{suffix}" not in case:
                    continue
                method = SliceGPT(orientation=orientation, centre_embeddings=official)
                found, decoder = sliced(case, width, method)
                expected = case.tensor(f"{index}.logits_sliced{suffix}")
                torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-3)
                for number, layer in enumerate(decoder.layers):
                    check_shortcuts(case, f"{index}.layer{number}", layer, gram=official)


def check_shortcuts(case: Case, name: str, layer: DecoderLayer, gram: bool) -> None:
    attention, mlp = layer.attention_shortcut, layer.mlp_shortcut
    assert attention is not None
    assert mlp is not None
    # The official matrices are multiplied from the right: [in, out].
    assert list(attention.weight.T.shape) == case.tensor(f"{name}.attn_shortcut_shape").tolist()
    assert list(mlp.weight.T.shape) == case.tensor(f"{name}.mlp_shortcut_shape").tolist()
    if gram:
        found = float(attention.weight.detach().double().square().sum())
        assert abs(found - case.item(f"{name}.attn_shortcut_gram")) < 1e-3
