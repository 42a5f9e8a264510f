"""Times decode attention of torch, the peer of wkv_attend; run by gpu.ts, or by hand.

    python3 bench/peers/attention.py [--cache 512,1024,2048,8192] [--batch 1,16] [--shape 32,8,128] [--prompt 4096,32768] [--quick]

One query token a sequence, bf16, every call on other data, together more than any L2 holds, all calls in one CUDA graph. Prints one
JSON line a size, microseconds a call:
  flash, cudnn     scaled_dot_product_attention; they give no scores
  eager_scores     written out, the scores added up as WeightedKV needs them
  compiled_scores  the same under torch.compile (not with --quick)
--prompt times causal attention of that many tokens over themselves, the peer of wkv_prefill: flash, cudnn, and eager_scores up to 8192
tokens; --batch 0 that alone. None selects or merges. The first line is the speed of copy_, timed on a stream.
"""

import argparse
import json
import statistics
import warnings

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

WORKING_SET = 256e6


def numbers(text):
    return [int(word) for word in text.split(",")]


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cache", type=numbers, default=[512, 1024, 2048, 8192])
    parser.add_argument("--batch", type=numbers, default=[1, 16])
    parser.add_argument("--shape", type=numbers, default=[32, 8, 128], help="query heads, KV heads, head dimension")
    parser.add_argument("--prompt", type=numbers, default=[])
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


def timed(calls, repeats):
    """Microseconds of one call: median over replays of one graph that holds each call once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    samples = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e3 / len(calls))
    return round(statistics.median(samples), 3)


def copy_speed(repeats):
    """Bytes a second of copy_ of 1 GiB, read and write counted: median of copies one behind another, on a GPU that is awake."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    for _ in range(20):
        target.copy_(source)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        target.copy_(source)
        event.record()
    torch.cuda.synchronize()
    milliseconds = [start.elapsed_time(end) for start, end in zip(events, events[1:])]
    return round(2 * source.numel() / statistics.median(milliseconds) * 1e3)


def attempt(measure):
    """A figure, or None where torch has no kernel for it."""
    try:
        return measure()
    except Exception:
        return None


def main():
    args = parse()
    heads, kv_heads, dim = args.shape
    repeats = 5 if args.quick else 20
    warnings.filterwarnings("ignore")
    torch.set_grad_enabled(False)

    def scored(q, k, v, scores):
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        p = (q @ k.transpose(-1, -2) * dim**-0.5).float().softmax(-1)
        scores += p.view(p.shape[0], kv_heads, heads // kv_heads, -1).sum(2)
        return p.to(q.dtype) @ v

    common = {"peer": "torch", "version": torch.__version__, "device": torch.cuda.get_device_name()}
    print(json.dumps({**common, "test": "copy", "bytesPerSecond": copy_speed(20)}), flush=True)

    for rows in args.prompt:
        options = {"device": "cuda", "dtype": torch.bfloat16}
        q = torch.randn(1, heads, rows, dim, **options)
        k, v = (torch.randn(1, kv_heads, rows, dim, **options) for _ in range(2))
        scores = torch.zeros(1, kv_heads, rows, device="cuda")

        def prompt(backend):
            with sdpa_kernel(backend):
                return timed([lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)], 5)

        def prompt_scored():
            wide = [t.repeat_interleave(heads // kv_heads, 1) for t in (k, v)]
            s = q @ wide[0].transpose(-1, -2) * dim**-0.5
            s.masked_fill_(torch.ones(rows, rows, dtype=torch.bool, device="cuda").triu_(1), -torch.inf)
            p = s.float().softmax(-1)
            scores.add_(p.view(1, kv_heads, heads // kv_heads, rows, rows).mean(2).sum(2))
            return p.to(q.dtype) @ wide[1]

        row = {**common, "test": "prompt", "rows": rows}
        row["flash"] = attempt(lambda: prompt(SDPBackend.FLASH_ATTENTION))
        row["cudnn"] = attempt(lambda: prompt(SDPBackend.CUDNN_ATTENTION))
        row["eager_scores"] = attempt(lambda: timed([prompt_scored], 5)) if rows <= 8192 else None
        print(json.dumps(row), flush=True)

    for batch in args.batch if args.batch != [0] else []:
        for cache in args.cache:
            size = 2 * batch * kv_heads * cache * dim * 2
            copies = max(2, min(300, int(WORKING_SET // size) + 1))
            options = {"device": "cuda", "dtype": torch.bfloat16}
            data = [[torch.randn(batch, kv_heads, cache, dim, **options) for _ in range(2)] for _ in range(copies)]
            q = torch.randn(batch, heads, 1, dim, **options)
            scores = torch.zeros(batch, kv_heads, cache, device="cuda")

            def sdpa(backend):
                with sdpa_kernel(backend):
                    return timed([lambda k=k, v=v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True) for k, v in data], repeats)

            def with_scores(function):
                return timed([lambda k=k, v=v: function(q, k, v, scores) for k, v in data], repeats)

            row = {**common, "test": "attention", "batch": batch, "cache": cache, "bytes": size, "copies": copies}
            row["flash"] = attempt(lambda: sdpa(SDPBackend.FLASH_ATTENTION))
            row["cudnn"] = attempt(lambda: sdpa(SDPBackend.CUDNN_ATTENTION))
            row["eager_scores"] = attempt(lambda: with_scores(scored))
            if not args.quick:
                row["compiled_scores"] = attempt(lambda: with_scores(torch.compile(scored, dynamic=False)))
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
