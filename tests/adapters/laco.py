"""LaCo against its official code: the similarity of every merge tried, and where the layers that are left come from."""

from __future__ import annotations

import torch
from golden_cases import Case, golden
from golden_llama import golden_llama

from zoo.methods.weights.laco import LaCo, projections
from zoo.models.anatomy import anatomy_of


@golden("laco", "sentences", "merge_layers", "interval", "threshold", "similarities", "norm_source_layer")
def laco(case: Case) -> None:
    decoder = anatomy_of(golden_llama(case)).decoder
    assert decoder is not None
    method = LaCo(
        merge_layers=case.item("merge_layers"),
        interval=case.item("interval"),
        threshold=case.item("threshold"),
        **{name: case.item(name) for name in ("low", "high") if name in case},
    )
    stack, tried = method.collapse(decoder, case.tensor("sentences"), batch=2)
    torch.testing.assert_close(torch.tensor(tried), case.tensor("similarities"), rtol=0.0, atol=1e-4)
    assert len(stack) == case.item("layers_left")
    assert [layer.index for layer in stack] == case.tensor("norm_source_layer").tolist()
    for layer, source in zip(stack, case.tensor("projection_source_layer").tolist(), strict=True):
        for name, value in projections(decoder.layers[source]).items():
            assert torch.equal(layer.projections[name], value), f"{name} of the layer from {source}"
