"""Writes perplexity.json: caches and perplexities of bounded caches on text.txt, token by token in f32 PyTorch.

Run from the project's root, after llamacpp.mjs:
  python tests/golden/perplexity.py MODEL.gguf
Options to run it on another text: --text FILE --tokens IDS.json --out FILE --layers all --windows N --window W --budget M.

A cache here is what remains of a list after removals: token by token, in rank order, with un-rotated keys, f32 values,
score (sum of the attention received, mean over the query heads of the KV head's group) and steps (how often it was
attended). Each (window, KV head) chooses on its own; `tova` alone chooses once for all heads of a layer.
"""

import argparse
import json
import math
import pathlib
import sys

import torch

from llama import Llama, rotate, sha256

HERE = pathlib.Path(__file__).parent


def protected(policy, budget):
    """(sinks, recent) as results print them; recent is null where nothing of the kind is protected."""
    if policy == "full":
        return None, None
    if policy == "streaming-llm":
        return 4, budget - 4
    if policy == "h2o":
        return 0, budget // 2
    if policy == "tova":
        return 0, None
    return 4, max(1, budget // 2 - 4)


class Layer:
    """One layer's cache: k, v [batch, kvHeads, kept, dim]; score, steps, place (in the text) [batch, kvHeads, kept]."""

    def __init__(self, batch, heads, dim):
        self.k = torch.zeros(batch, heads, 0, dim)
        self.v = torch.zeros(batch, heads, 0, dim)
        self.score = torch.zeros(batch, heads, 0)
        self.steps = torch.zeros(batch, heads, 0, dtype=torch.int64)
        self.place = torch.zeros(batch, heads, 0, dtype=torch.int64)

    def append(self, k, v, time):
        one = torch.zeros(*self.score.shape[:2], 1)
        self.k = torch.cat((self.k, k[:, :, None]), 2)
        self.v = torch.cat((self.v, v[:, :, None]), 2)
        self.score = torch.cat((self.score, one), 2)
        self.steps = torch.cat((self.steps, one.long()), 2)
        self.place = torch.cat((self.place, one.long() + time), 2)

    def remove(self, victim):
        """Drops rank victim [batch, kvHeads] of every head."""
        batch, heads, length = self.score.shape
        keep = torch.arange(length) != victim[..., None]
        for name in ("score", "steps", "place"):
            setattr(self, name, getattr(self, name)[keep].view(batch, heads, length - 1))
        for name in ("k", "v"):
            setattr(self, name, getattr(self, name)[keep].view(batch, heads, length - 1, -1))


class Cached:
    """An `attend` for Llama.hidden() that feeds one token of each of `batch` sequences a step."""

    def __init__(self, model, batch, policy, budget, positions):
        self.model, self.policy, self.budget, self.positions = model, policy, budget, positions
        self.sinks, self.recent = protected(policy, budget)
        self.layer = [Layer(batch, model.kv_heads, model.dim) for _ in range(model.layers)]
        self.time = 0

    def __call__(self, index, q, k, v):
        cache, model = self.layer[index], self.model
        cache.append(k, v, self.time)
        batch, heads, length, dim = cache.k.shape
        if self.positions == "cache":
            key_at, query_at = torch.arange(length), torch.tensor([length - 1])
        else:
            key_at, query_at = cache.place, torch.tensor([self.time])
        keys = rotate(cache.k, key_at, model.base)
        query = rotate(q.view(batch, heads, model.group, dim), query_at, model.base)
        weights = (query @ keys.transpose(2, 3) / dim**0.5).softmax(-1)
        out = weights @ cache.v
        attention = weights.mean(2)
        cache.score += attention
        cache.steps += 1
        if self.budget is not None and length > self.budget:
            self.shrink(cache, attention)
        return out.reshape(batch, model.heads, dim)

    def shrink(self, cache, attention):
        length = cache.score.shape[2]
        start, stop = self.sinks, length - (self.recent or 0)
        average = cache.score / cache.steps
        left, right = average[..., :-1], average[..., 1:]
        # What each rank's removal costs; the first of the lowest goes.
        if self.policy == "streaming-llm":
            cost = cache.place.float()
        elif self.policy == "h2o":
            cost = cache.score
        elif self.policy == "tova":
            cost = attention.mean(1, keepdim=True).expand_as(attention)
        elif self.policy == "weighted-kv-ward":
            distance = (cache.v[:, :, :-1] - cache.v[:, :, 1:]).square().sum(-1)
            cost = torch.where(left + right == 0, 0.0, left * right / (left + right) * distance)
        else:
            cost = average
        cost = cost[..., start:stop]
        ranks = torch.arange(cost.shape[-1])
        lowest = cost == cost.min(-1, keepdim=True).values
        victim = start + torch.where(lowest, ranks, cost.shape[-1]).min(-1).values

        if self.policy.startswith("weighted-kv"):
            at = victim[..., None]
            weight, neighbour = average.gather(2, at), average.gather(2, at + 1)
            wide = at[..., None].expand(-1, -1, -1, cache.v.shape[-1])
            gone, kept = cache.v.gather(2, wide), cache.v.gather(2, wide + 1)
            weight, neighbour = weight[..., None], neighbour[..., None]
            merged = (weight * gone + neighbour * kept) / (weight + neighbour)
            cache.v.scatter_(2, wide + 1, torch.where(weight + neighbour == 0, kept, merged))
        cache.remove(victim)


def digits(values, number=5):
    return [float(f"{value:.{number}g}") for value in values.tolist()]


def dump(cached, layers):
    """The rows of the first sequence."""
    for index in layers:
        cache = cached.layer[index]
        for head in range(cache.k.shape[1]):
            yield {
                "policy": cached.policy,
                "positions": cached.positions,
                "budget": cached.budget,
                "steps": cached.time,
                "layer": index,
                "head": head,
                "kept": cache.place[0, head].tolist(),
                "steps_attended": cache.steps[0, head].tolist(),
                "score": digits(cache.score[0, head]),
                "value_norm": digits(cache.v[0, head].norm(dim=-1)),
            }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--text", default=HERE / "text.txt", type=pathlib.Path)
    parser.add_argument("--tokens", default=HERE / "text.json", type=pathlib.Path)
    parser.add_argument("--out", default=HERE / "perplexity.json", type=pathlib.Path)
    parser.add_argument("--layers", default="0,7,15,29")
    parser.add_argument("--window", default=256, type=int)
    parser.add_argument("--windows", default=2, type=int)
    parser.add_argument("--budget", default=64, type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)

    model = Llama(args.model)
    layers = range(model.layers) if args.layers == "all" else [int(layer) for layer in args.layers.split(",")]
    ids = json.loads(args.tokens.read_text())
    window, stride = args.window, args.window // 2
    starts = [index * stride for index in range(args.windows)]
    if starts[-1] + window > len(ids):
        raise SystemExit(f"the text has {len(ids)} tokens, the windows need {starts[-1] + window}")
    text = torch.tensor([ids[start:start + window] for start in starts])

    caches, perplexities = [], []
    for policy, positions in (
        ("full", "cache"),
        ("weighted-kv", "cache"),
        ("eviction", "cache"),
        ("eviction", "text"),
        ("streaming-llm", "cache"),
        ("weighted-kv-ward", "cache"),
        ("h2o", "cache"),
        ("tova", "cache"),
    ):
        budget = None if policy == "full" else args.budget
        cached = Cached(model, len(starts), policy, budget, positions)
        losses = torch.zeros(len(starts), window - 1, dtype=torch.float64)
        for time in range(window - 1):
            logits = model.hidden(text[:, time], cached) @ model.output.T
            cached.time += 1
            target = text[:, time + 1, None]
            losses[:, time] = logits.double().log_softmax(-1).gather(-1, target)[:, 0].neg()
        # Every target once: all of the first window, the last `stride` of each later one.
        scored = torch.cat([losses[0]] + [losses[index, -stride:] for index in range(1, len(starts))])
        nll = scored.mean().item()
        caches.extend(dump(cached, layers))
        perplexities.append({
            "policy": policy,
            "budget": budget,
            "sinks": cached.sinks,
            "recent": cached.recent,
            "positions": positions,
            "window": window,
            "stride": stride,
            "windows": len(starts),
            "targets": len(scored),
            "nll": round(nll, 6),
            "perplexity": round(math.exp(nll), 4),
        })
        print(json.dumps(perplexities[-1]), file=sys.stderr, flush=True)

    lines = lambda rows: ",\n".join("  " + json.dumps(row) for row in rows)
    args.out.write_text(
        f'{{\n "model": "{sha256(args.model)}",\n "text": "{args.text.name}",\n "textSha256": "{sha256(args.text)}",\n'
        f' "perplexity": [\n{lines(perplexities)}\n ],\n "cache": [\n{lines(caches)}\n ]\n}}\n'
    )


if __name__ == "__main__":
    main()
