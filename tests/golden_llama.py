"""The tiny Llama models inside golden cases of weight methods."""

from __future__ import annotations

import json
from typing import Any

import torch
from golden_cases import Case
from transformers import LlamaConfig, LlamaForCausalLM


def golden_llama(case: Case) -> Any:
    """The model of a case, checked to give the case's dense logits if it has any."""
    weights = {name: weight.float() for name, weight in case.prefixed("w.").items()}
    fields = json.loads(case.item("config_json")) if "config_json" in case else _fields_of(weights)
    model = LlamaForCausalLM(LlamaConfig(**fields)).float().eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    assert not unexpected, unexpected
    assert all(name == "lm_head.weight" for name in missing), missing
    if "logits_dense" in case:
        with torch.no_grad():
            logits = model(input_ids=case.tensor("eval_ids")).logits
        torch.testing.assert_close(logits, case.tensor("logits_dense"), rtol=0.0, atol=1e-5)
    return model


def _fields_of(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Configuration of a case that holds weights only: all of these have heads of 8 channels."""
    layers = {int(name.split(".")[2]) for name in weights if name.startswith("model.layers.")}
    first = {
        name.removeprefix("model.layers.0."): weight
        for name, weight in weights.items()
        if name.startswith("model.layers.0.")
    }
    vocabulary, hidden = weights["model.embed_tokens.weight"].shape
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": len(layers),
        "intermediate_size": len(first["mlp.up_proj.weight"]),
        "num_attention_heads": len(first["self_attn.q_proj.weight"]) // 8,
        "num_key_value_heads": len(first["self_attn.k_proj.weight"]) // 8,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    }


def check_logits(model: Any, case: Case, name: str) -> None:
    """Compare the logits of a pruned model on the case's evaluation ids."""
    with torch.no_grad():
        logits = model(input_ids=case.tensor("eval_ids")).logits
    torch.testing.assert_close(logits, case.tensor(name), rtol=0.0, atol=1e-4)


def close(found: list[Any], expected: torch.Tensor, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Compare one tensor per layer with the stacked array of a case."""
    torch.testing.assert_close(torch.stack(found), expected, rtol=rtol, atol=atol)
