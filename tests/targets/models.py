"""Tiny randomly initialised models of every architecture, with a tokenizer, as local folders."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from tests.conftest import tiny_tokenizer

IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
PLAIN = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": len(tiny_tokenizer()),
    **IDS,
}
GROUPED = {**PLAIN, "num_key_value_heads": 2}
GPT2 = {"n_embd": 16, "n_inner": 24, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": PLAIN["vocab_size"], **IDS}
OPT = {**{k: v for k, v in PLAIN.items() if k != "intermediate_size"}, "ffn_dim": 24, "word_embed_proj_dim": 16}
NEO = {
    "hidden_size": 16, "intermediate_size": 24, "num_layers": 3, "num_heads": 4, "attention_types": [[["global", "local", "global"], 1]],
    "max_position_embeddings": 64, "vocab_size": PLAIN["vocab_size"], "window_size": 8, **IDS,
}  # fmt: skip

# name -> (class stem, config)
KINDS: dict[str, tuple[str, dict]] = {
    "gpt2": ("GPT2LMHead", GPT2),
    "gpt_neo": ("GPTNeo", NEO),
    "gpt_neox": ("GPTNeoX", PLAIN),
    "gpt_neox_serial": ("GPTNeoX", {**PLAIN, "use_parallel_residual": False, "attention_bias": False}),
    "opt": ("OPT", OPT),
    "opt_post": ("OPT", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 8}),
    "llama": ("Llama", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 8}),
    "qwen2": ("Qwen2", {**GROUPED, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 8}),
    "gemma": ("Gemma", {**GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2", {**GROUPED, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("Gemma3", {**GROUPED, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "phi": ("Phi", PLAIN),
    "phi3": ("Phi3", {**GROUPED, "head_dim": 6}),
    "arcee": ("Arcee", {**GROUPED, "mlp_bias": True, "hidden_act": "relu2"}),
}
GATED = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"}


def build(kind: str) -> torch.nn.Module:
    """A model whose weights are large enough to matter, the same in every call."""
    stem, sizes = KINDS[kind]
    config = getattr(transformers, {"GPT2LMHead": "GPT2Config", "Gemma3": "Gemma3TextConfig"}.get(stem, f"{stem}Config"))(**sizes)
    model = getattr(transformers, "GPT2LMHeadModel" if stem == "GPT2LMHead" else f"{stem}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        norm = "norm" in name or ".ln_" in name
        parameter.data = (1 + 0.1 * noise if norm and name.endswith("weight") else 0.2 * noise).clone()
    return model.eval()


def save(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The model and a tokenizer in a folder."""
    build(kind).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
