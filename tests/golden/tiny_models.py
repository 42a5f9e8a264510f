"""Writes models/<name>/ (config.json, model.safetensors) and models/<name>.json (tokens, logits): tiny random models and what transformers makes of them.

Run from the project's root: python tests/golden/tiny_models.py
Made with Python 3.11.7, torch 2.13.0 (CPU), transformers 5.23.0, safetensors 0.8.0, numpy 2.4.6.
Weights are drawn in f32 and stored in bf16, as which transformers reads them too; it computes in f32. Logits are those
of all positions of one text, fed at once, as base64 of little-endian f32 [positions, vocabulary].
"""

import base64
import json
import pathlib
import shutil

import torch
import transformers as t

HERE = pathlib.Path(__file__).parent / "models"
POSITIONS = 24
COMMON = dict(vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def rope(kind, **more):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=10000.0, **more))


FAR = dict(factor=4.0, original_max_position_embeddings=16)
LONG = dict(short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], long_factor=[1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.0],
            original_max_position_embeddings=16)
CASES = {
    "llama": (t.LlamaConfig, {}),
    "llama-mha": (t.LlamaConfig, dict(num_key_value_heads=4, tie_word_embeddings=True)),
    "llama-mqa": (t.LlamaConfig, dict(num_key_value_heads=1, head_dim=32, attention_bias=True)),
    "llama-linear": (t.LlamaConfig, rope("linear", factor=4.0)),
    "llama-dynamic": (t.LlamaConfig, dict(max_position_embeddings=16, **rope("dynamic", factor=2.0))),
    "llama-yarn": (t.LlamaConfig, rope("yarn", **FAR)),
    "llama-llama3": (t.LlamaConfig, rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, **FAR)),
    "mistral": (t.MistralConfig, dict(sliding_window=32, head_dim=32)),
    "qwen2": (t.Qwen2Config, dict(tie_word_embeddings=True)),
    "phi3": (t.Phi3Config, rope("default", partial_rotary_factor=0.5)),
    "phi3-longrope": (t.Phi3Config, dict(original_max_position_embeddings=16, **rope("longrope", **LONG))),
    "qwen3": (t.Qwen3Config, dict(head_dim=32)),
    "olmo2": (t.Olmo2Config, dict(num_hidden_layers=3)),
    "gemma2": (t.Gemma2Config, dict(head_dim=32, sliding_window=8, query_pre_attn_scalar=24, num_hidden_layers=3,
                                    attn_logit_softcapping=4.0, final_logit_softcapping=3.0)),
    "gemma3": (t.Gemma3TextConfig, dict(head_dim=32, sliding_window=8, query_pre_attn_scalar=24, num_hidden_layers=7,
                                        rope_parameters=dict(
                                            full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
                                            sliding_attention=dict(rope_type="default", rope_theta=1e4)))),
    "mistral-window": (t.MistralConfig, dict(sliding_window=8, head_dim=32)),
}

torch.set_num_threads(1)
torch.set_grad_enabled(False)
shutil.rmtree(HERE, ignore_errors=True)
for seed, (name, (kind, more)) in enumerate(CASES.items()):
    torch.manual_seed(seed)
    config = kind(**{**COMMON, **more})
    model = t.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for key, p in model.named_parameters():
        # Norms near 1, biases that matter, and attention that is not flat.
        p.normal_(0, 0.3 if p.dim() == 1 else 1.5 * p.shape[1] ** -0.5)
        if "norm" in key:
            p.add_(1)
    model.to(torch.bfloat16).save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink(missing_ok=True)
    model = t.AutoModelForCausalLM.from_pretrained(HERE / name, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.randint(3, COMMON["vocab_size"], (POSITIONS,))
    logits = model(tokens[None]).logits[0].float()
    (HERE / f"{name}.json").write_text(json.dumps({
        "tokens": tokens.tolist(), "logits": base64.b64encode(logits.numpy().tobytes()).decode()}) + "\n")
