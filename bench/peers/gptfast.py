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


def parameter(*shape):
    return torch.nn.Parameter(random(*shape))


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = parameter((HEADS + 2 * KV_HEADS) * DIM, WIDTH)
        self.output = parameter(WIDTH, HEADS * DIM)
        self.gate_up = parameter(2 * HIDDEN, WIDTH)
        self.down = parameter(WIDTH, HIDDEN)
        self.attention_norm = parameter(WIDTH)
        self.feed_forward_norm = parameter(WIDTH)

    def open_cache(self, batch, cache):
        # Buffers keep their place, so that CUDA graphs use them where they are.
        self.register_buffer("keys", random(batch, KV_HEADS, cache, DIM))
        self.register_buffer("values", random(batch, KV_HEADS, cache, DIM))

    def forward(self, x, position, cosine, sine, mask):
        batch = x.shape[0]
        parts = F.linear(F.rms_norm(x, (WIDTH,), self.attention_norm), self.qkv).split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], -1)
        q, k, v = (part.view(batch, 1, -1, DIM).transpose(1, 2) for part in parts)
        q, k = (t * cosine + torch.cat([-t[..., DIM // 2 :], t[..., : DIM // 2]], -1) * sine for t in (q, k))
        self.keys[:, :, position] = k
        self.values[:, :, position] = v
        y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask, enable_gqa=True)
        x = x + F.linear(y.transpose(1, 2).reshape(batch, 1, -1), self.output)
        gate, up = F.linear(F.rms_norm(x, (WIDTH,), self.feed_forward_norm), self.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down)


class Decoder(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer() for _ in range(layers)])
        self.embedding = parameter(VOCABULARY, WIDTH)
        self.norm = parameter(WIDTH)
        self.head = parameter(VOCABULARY, WIDTH)

    def open_cache(self, batch, cache):
        places = torch.arange(cache, device="cuda")
        angles = torch.outer(places.float(), BASE ** (-torch.arange(DIM // 2, device="cuda").float() / (DIM // 2)))
        angles = torch.cat([angles, angles], -1)
        self.register_buffer("places", places)
        self.register_buffer("cosines", angles.cos().bfloat16())
        self.register_buffer("sines", angles.sin().bfloat16())
        for layer in self.layers:
            layer.open_cache(batch, cache)

    def forward(self, token, position):
        x = self.embedding[token]
        cosine, sine = self.cosines[position][None, None], self.sines[position][None, None]
        mask = (self.places <= position)[None, None, None]
        for layer in self.layers:
            x = layer(x, position, cosine, sine, mask)
        return F.linear(F.rms_norm(x, (WIDTH,), self.norm), self.head)[:, -1].argmax(-1, keepdim=True)


def step(model, token, position):
    return model(token, position)


def main():
    args = parse()
    torch.set_grad_enabled(False)
    torch.set_float32_matmul_precision("high")
    torch._inductor.config.coordinate_descent_tuning = not args.quick
    model = Decoder(args.layers)
    weights = 2 * (sum(p.numel() for p in model.parameters()) - model.embedding.numel())

    for cache in args.cache:
        for batch in args.batch:
            torch._dynamo.reset()
            model.open_cache(batch, cache)
            decode = torch.compile(step, mode="reduce-overhead", fullgraph=True)
            token = torch.zeros(batch, 1, device="cuda", dtype=torch.long)
            position = torch.tensor([max(0, cache - args.tokens - 8)], device="cuda")
            start = time.perf_counter()
            for _ in range(5):
                token = decode(model, token, position).clone()
                position += 1
            torch.cuda.synchronize()
            compile_seconds = time.perf_counter() - start
            start = time.perf_counter()
            for _ in range(args.tokens):
                token = decode(model, token, position).clone()
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
