"""Times decoding in the style of gpt-fast (static cache, torch.compile, CUDA graphs), the peer of `wkv bench decode`; run by gpu.ts, or by hand.

    python3 bench/peers/gptfast.py [--cache 1024] [--batch 1,16] [--tokens 100] [--layers 32] [--quick]

Llama-3-8B's shapes, random bf16 weights, greedy. Every step attends to the whole static cache, which keeps no scores and drops nothing.
Prints one JSON line a size. --quick leaves inductor's tuning out.
"""

import argparse
import json
import time

import torch
import torch._inductor.config
import torch.nn.functional as F

WIDTH, HIDDEN, HEADS, KV_HEADS, DIM, VOCABULARY, BASE = 4096, 14336, 32, 8, 128, 128256, 500000.0


def numbers(text):
    return [int(word) for word in text.split(",")]


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cache", type=numbers, default=[1024])
    parser.add_argument("--batch", type=numbers, default=[1, 16])
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


def random(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Parameter(random((HEADS + 2 * KV_HEADS) * DIM, WIDTH))
        self.output = torch.nn.Parameter(random(WIDTH, HEADS * DIM))
        self.gate_up = torch.nn.Parameter(random(2 * HIDDEN, WIDTH))
        self.down = torch.nn.Parameter(random(WIDTH, HIDDEN))
        self.norms = torch.nn.Parameter(torch.ones(2, WIDTH, device="cuda", dtype=torch.bfloat16))
        self.keys = self.values = None

    def reset(self, batch, cache):
        self.keys, self.values = (random(batch, KV_HEADS, cache, DIM) for _ in range(2))

    def forward(self, x, position, cosine, sine, mask):
        batch = x.shape[0]
        parts = F.linear(F.rms_norm(x, (WIDTH,), self.norms[0]), self.qkv).split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], -1)
        q, k, v = (part.view(batch, 1, -1, DIM).transpose(1, 2) for part in parts)
        q, k = (t * cosine + torch.cat([-t[..., DIM // 2 :], t[..., : DIM // 2]], -1) * sine for t in (q, k))
        self.keys[:, :, position] = k
        self.values[:, :, position] = v
        y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask, enable_gqa=True)
        x = x + F.linear(y.transpose(1, 2).reshape(batch, 1, -1), self.output)
        gate, up = F.linear(F.rms_norm(x, (WIDTH,), self.norms[1]), self.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down)


def main():
    args = parse()
    torch.set_grad_enabled(False)
    torch.set_float32_matmul_precision("high")
    torch._inductor.config.coordinate_descent_tuning = not args.quick
    layers = torch.nn.ModuleList([Layer() for _ in range(args.layers)])
    embedding, head = random(VOCABULARY, WIDTH), random(VOCABULARY, WIDTH)
    weights = 2 * (sum(p.numel() for p in layers.parameters()) + head.numel())

    for cache in args.cache:
        places = torch.arange(cache, device="cuda")
        angles = torch.outer(places.float(), BASE ** (-torch.arange(DIM // 2, device="cuda").float() / (DIM // 2)))
        cosines, sines = (torch.cat([t, t], -1).bfloat16() for t in (angles.cos(), angles.sin()))
        for batch in args.batch:
            torch._dynamo.reset()
            for layer in layers:
                layer.reset(batch, cache)

            def step(token, position):
                x = embedding[token]
                mask = (places <= position)[None, None, None]
                for layer in layers:
                    x = layer(x, position, cosines[position][None, None], sines[position][None, None], mask)
                return F.linear(x, head)[:, -1].argmax(-1, keepdim=True)

            compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
            token = torch.zeros(batch, 1, device="cuda", dtype=torch.long)
            position = torch.tensor([max(0, cache - args.tokens - 8)], device="cuda")
            start = time.perf_counter()
            for _ in range(5):
                token = compiled(token, position).clone()
                position += 1
            torch.cuda.synchronize()
            compile_seconds = time.perf_counter() - start
            start = time.perf_counter()
            for _ in range(args.tokens):
                token = compiled(token, position).clone()
                position += 1
            torch.cuda.synchronize()
            ms = (time.perf_counter() - start) * 1e3 / args.tokens
            size = weights + args.layers * 2 * batch * KV_HEADS * cache * DIM * 2
            print(
                json.dumps({
                    "peer": "gpt-fast style",
                    "version": torch.__version__,
                    "device": torch.cuda.get_device_name(),
                    "test": "decode",
                    "batch": batch,
                    "cache": cache,
                    "layers": args.layers,
                    "tokens": args.tokens,
                    "tokensPerSecond": round(batch * 1e3 / ms, 2),
                    "ms": round(ms, 4),
                    "bytes": size,
                    "gbps": round(size / ms / 1e6, 1),
                    "tuned": not args.quick,
                    "compileSeconds": round(compile_seconds, 1),
                }),
                flush=True,
            )


if __name__ == "__main__":
    main()
