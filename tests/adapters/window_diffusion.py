from __future__ import annotations

from typing import Any

import torch
from golden_cases import Case, golden
from transformers import LlamaConfig, LlamaForCausalLM

from zoo.methods.decoding.window_diffusion import WindowDiffusion, denoise

NAMES = {
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def model_of(case: Case) -> Any:
    embeddings = case.tensor("w_wte")
    config = LlamaConfig(
        vocab_size=embeddings.shape[0],
        hidden_size=embeddings.shape[1],
        intermediate_size=case.tensor("w_l0_gate").shape[0],
        num_hidden_layers=case.item("n_layers"),
        num_attention_heads=case.item("n_heads"),
        num_key_value_heads=case.item("n_kv_heads"),
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        is_causal=False,
        mask_token_id=case.item("mask_id"),
    )
    weights = {"model.embed_tokens.weight": embeddings, "lm_head.weight": case.tensor("w_lm_head")}
    weights["model.norm.weight"] = torch.ones(embeddings.shape[1])
    for layer in range(case.item("n_layers")):
        for short, name in NAMES.items():
            weights[f"model.layers.{layer}.{name}.weight"] = case.tensor(f"w_l{layer}_{short}")
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(weights)
    return model


@golden("window-diffusion", "w_wte", "active_mask", "window_mask", "x_after_step", "output")
def run(case: Case) -> None:
    names = ("window_tokens", "active_tokens", "refresh_cycle", "steps")
    method = WindowDiffusion(**{name: case.item(name) for name in names})
    steps = list(
        denoise(model_of(case), method, case.tensor("prompt"), case.item("gen_length"), case.item("mask_id"))
    )
    for name, attribute in (("active_mask", "active"), ("window_mask", "window"), ("x_after_step", "tokens")):
        expected = case.tensor(name)
        assert len(expected) == len(steps)
        for step, (taken, wanted) in enumerate(zip(steps, expected, strict=True)):
            assert torch.equal(getattr(taken, attribute), wanted), f"{name} of step {step}"
    assert torch.equal(steps[-1].tokens, case.tensor("output"))
