"""The tiny Llama models inside golden cases of weight methods."""

from __future__ import annotations

import json
from typing import Any

import torch
from golden_cases import Case
from transformers import LlamaConfig, LlamaForCausalLM


def golden_llama(case: Case) -> Any:
    """The model of a case, checked to give the case's dense logits."""
    model = LlamaForCausalLM(LlamaConfig(**json.loads(case.item("config_json")))).float().eval()
    weights = {name: weight.float() for name, weight in case.prefixed("w.").items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    assert not unexpected, unexpected
    assert all(name == "lm_head.weight" for name in missing), missing
    with torch.no_grad():
        logits = model(input_ids=case.tensor("eval_ids")).logits
    torch.testing.assert_close(logits, case.tensor("logits_dense"), rtol=0.0, atol=1e-5)
    return model


def check_logits(model: Any, case: Case, name: str) -> None:
    """Compare the logits of a pruned model on the case's evaluation ids."""
    with torch.no_grad():
        logits = model(input_ids=case.tensor("eval_ids")).logits
    torch.testing.assert_close(logits, case.tensor(name), rtol=0.0, atol=1e-4)


def close(found: list[Any], expected: torch.Tensor, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Compare one tensor per layer with the stacked array of a case."""
    torch.testing.assert_close(torch.stack(found), expected, rtol=rtol, atol=atol)
