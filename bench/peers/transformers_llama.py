"""Times transformers on a model of Llama-3-8B's shapes with random bf16 weights; run by gpu.ts, or by hand.

    python3 bench/peers/transformers_llama.py [--cache 1024,4096] [--tokens 64] [--prompt 4096,32768] [--quick]

Prompt and greedy decode through generate(), batch 1: its default cache with SDPA, and written-out attention, whose scores other
implementations of such caches read. --prompt times prompts alone, --cache 0 nothing else; written-out attention is left out above 8192
tokens, where its scores take more memory than there is. Prints one JSON line a figure.
"""

import argparse
import json
import time

import torch
import transformers


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cache", type=lambda text: [int(word) for word in text.split(",")], default=[1024, 4096])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=lambda text: [int(word) for word in text.split(",")], default=[])
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


def main():
    args = parse()
    tokens = 16 if args.quick else args.tokens
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.bfloat16)
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        tie_word_embeddings=False,
    )
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config).eval()

    def seconds(ids, count):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def report(attention, test, cache, count, ms, samples=None):
        row = {
            "peer": f"transformers {attention}",
            "version": transformers.__version__,
            "device": torch.cuda.get_device_name(),
            "batch": 1,
            "cache": cache,
            "test": test,
            "tokens": cache if test == "prefill" else tokens,
            "ms": round(ms, 4),
            "tokensPerSecond": round(count * 1e3 / ms, 2),
        }
        print(json.dumps({**row, **({"samples": samples} if samples else {})}), flush=True)

    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        for count in args.prompt:
            if attention == "eager" and count > 8192:
                continue
            ids = torch.randint(5, 1000, (1, count), device="cuda")
            seconds(ids, 1)
            samples = sorted(seconds(ids, 1) * 1e3 for _ in range(3))
            report(attention, "prefill", count, count, samples[1], [round(ms, 3) for ms in samples])
        for cache in args.cache[:1] if args.quick else args.cache:
            if cache == 0:
                continue
            ids = torch.randint(5, 1000, (1, cache), device="cuda")
            seconds(ids, 4)
            prompt = seconds(ids, 1)
            decode = (seconds(ids, tokens + 1) - prompt) / tokens
            report(attention, "prefill", cache, cache, prompt * 1e3)
            report(attention, "decode", cache, 1, decode * 1e3)


if __name__ == "__main__":
    main()
