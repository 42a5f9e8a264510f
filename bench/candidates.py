"""
Runs the cache rules of docs/candidates.md side by side, as sequences of one
batch, and writes what bench/tables.ts prints. In torch, so that a rule costs a
few lines and no kernel; bench/candidates_check.py compares each with plain lists.

  deno run -A bench/candidates.ts --text FILE,... --out tokens.json
  python bench/candidates.py --tokens tokens.json --out result.json
    [--rules all|NAME;...] [--windows 12] [--tune tokens.json] [--budget 256]
    [--sequences 600] [--seconds N] [--model FILE] [--device cuda] [--list]

Every window begins with an empty cache and is fed a token a step; its second
half is scored, of a question its answer. Budgets and metrics are measured on the windows that the file of
--tune keeps for it. A run that is cut off keeps the batches that were finished,
and goes on with the others.
"""

import argparse
import dataclasses
import datetime
import hashlib
import json
import math
import os
import struct
import subprocess
import time

import numpy as np
import torch
import torch.nn.functional as F

SINKS = 4


# ---- rules ----


@dataclasses.dataclass(frozen=True)
class Rule:
    """One change, or several, of E (eviction) or W (weighted-kv)."""

    name: str
    host: str | None = None  # "RULE, positions"
    bound: float = 0  # g, in per cent, that it is kept above
    positions: str = "text"
    # What becomes of the victim's value: None drops it; else its share of w_j in the merge.
    merge: float | None = None
    toward: str = "right"  # or "cheaper", "key": the neighbour merged into
    state: str = "keep"  # or "add", "max", "mean": r's average after a merge
    gate: tuple[str, float] | None = None  # merged only where the cosine is above
    # w is multiplied by a distance: of v to o ("value", or by the metrics "output"
    # and "loss"), or of the merged value to o ("merged").
    error: str | None = None
    prior: float = 0
    age: int = 0
    decay: float = 1
    recent: int | None = None  # half of the budget, less the sinks
    budgets: str = "even"
    lends: str | None = None  # "layer" or "model": who shares the budget
    floor: float = 0.2  # a head keeps this share of its budget
    most: float = 3  # and has at most so many times the mean
    moves: int = 4  # budget tokens that change heads in a step ("model")

    def kind(self):
        """Rules of a kind run the same operations."""
        return (
            self.lends or "",
            self.moves if self.lends == "model" else 0,
            self.merge is not None,
            self.toward != "right",
            self.gate is not None,
            self.error or "",
        )


# The best of the single changes to when attention counts.
LATE = dict(prior=32, age=64, decay=0.997)


def rules():
    E, W, EC = "E, text", "W, text", "E, cache"
    w = dict(host=W, merge=1.0)
    yield Rule("E", positions="cache")
    yield Rule("E", EC, 10)
    yield Rule("W", positions="cache", merge=1.0)
    yield Rule("W", "W, cache", 10, merge=1.0)
    # C6, C9, lighter merges, gates, C3
    for state in ("add", "max", "mean"):
        yield Rule(f"W, state {state}", **w, state=state)
    for toward in ("cheaper", "key"):
        yield Rule(f"W, toward {toward}", **w, toward=toward)
    for share in (1 / 2, 1 / 4):
        yield Rule(f"W, weight {share}", W, 1, merge=share)
    for what, least in (("value", 0.5), ("value", 0.8), ("key", 0.8)):
        yield Rule(f"W, {what}s alike {least}", **w, bound=1, gate=(what, least))
    yield Rule("W, error of merging", **w, bound=1, error="merged")
    yield Rule("W, late", **w, bound=2, **LATE)
    # C3, C4, C5
    for error in ("value", "output", "loss"):
        yield Rule(f"E, error by {error}", E, 1, error=error)
    yield Rule("E, prior 32", E, 1, prior=32)
    yield Rule("E, prior 128", E, 1, prior=128)
    yield Rule("E, late", E, 2, **LATE)
    yield Rule("E, late, error by output", E, 2, **LATE, error="output")
    # C7
    for floor in (0.2, 0.5):
        yield Rule(f"E, lends in a layer, floor {floor}", E, 3, lends="layer", floor=floor)
    yield Rule("E, lends in a layer, recent 64", E, 3, lends="layer", recent=64)
    yield Rule("E, lends in a layer", EC, 3, positions="cache", lends="layer")
    for error in ("output", "loss"):
        yield Rule(f"E, lends in the model by {error}", E, 3, lends="model", error=error)
    # C8
    for budgets in ("pyramid", "inverse"):
        yield Rule(f"E, {budgets}", E, 2, budgets=budgets)
    for by in ("residual", "loss"):
        yield Rule(f"E, layers by {by}", E, 5, budgets=f"layers by {by}")
        yield Rule(f"E, heads by {by}", E, 5, budgets=f"heads by {by}")
    yield Rule("E, heads by loss", EC, 5, positions="cache", budgets="heads by loss")
    # What combines, against the aim.
    aim = dict(host=EC, bound=50)
    for by in ("residual", "loss"):
        yield Rule(f"E, heads by {by}, late", **aim, budgets=f"heads by {by}", **LATE)
        yield Rule(f"E, parts by {by}, late", **aim, budgets=f"parts by {by}", **LATE)
    yield Rule("E, layers by loss, late", **aim, budgets="layers by loss", **LATE)
    yield Rule("E, heads by root of loss, late", **aim, budgets="heads by root of loss", **LATE)
    for error in ("output", "loss"):
        yield Rule(
            f"E, parts by loss, late, error by {error}",
            **aim, budgets="parts by loss", **LATE, error=error,
        )  # fmt: skip
    lends = dict(**aim, **LATE, lends="layer")
    yield Rule("E, lends in a layer, late", **lends)
    yield Rule("E, layers by loss, lends, late", **lends, budgets="layers by loss")
    yield Rule("E, heads by loss, lends, late", **lends, budgets="heads by loss", floor=0.5)
    yield Rule(
        "E, heads by loss, lends, late, error by output",
        **lends, budgets="heads by loss", floor=0.5, error="output",
    )  # fmt: skip
    yield Rule(
        "E, lends in the model by loss, late",
        **aim, **LATE, lends="model", error="loss", moves=8,
    )  # fmt: skip
    yield Rule(
        "E, heads by loss, lends in the model, late",
        **aim, **LATE, budgets="heads by loss", lends="model", error="loss", floor=0.5,
    )  # fmt: skip
    yield Rule("E, heads by loss, late", EC, 50, positions="cache", budgets="heads by loss", **LATE)
    yield Rule("W, heads by loss, late", **aim, merge=1.0, budgets="heads by loss", **LATE)
    yield Rule(
        "W, heads by loss, late, weight 0.25",
        **aim, merge=1 / 4, budgets="heads by loss", **LATE,
    )  # fmt: skip
    yield Rule(
        "W, heads by loss, late, values alike 0.8",
        **aim, merge=1.0, gate=("value", 0.8), budgets="heads by loss", **LATE,
    )  # fmt: skip


# ---- caches ----


class Caches:
    """
    Caches of all layers, of rules with the same positions and room: tokens lie in
    any slot, and `rank` has their order. Shapes are [layers, sequences, heads,
    slots]; sequences of a rule, one a window, stand together.
    """

    def __init__(self, rules, windows, budget, shape, measured, options):
        layers, heads, dim = shape
        self.rules = sorted(rules, key=Rule.kind)
        self.positions = rules[0].positions
        self.budget, self.heads, self.dim = budget, heads, dim
        self.n = len(rules) * windows
        floats, self.device = options["dtype"], options["device"]
        of = lambda *size, value=0, dtype=floats: torch.full(
            (layers, self.n, heads, *size), value, dtype=dtype, device=self.device
        )

        def each(values, dtype=floats):
            """A number a rule, [n, 1]."""
            one = torch.tensor(values, dtype=dtype).repeat_interleave(windows)
            return one.view(-1, 1).to(self.device)

        half = budget // 2 - SINKS
        given = [measured(rule.budgets) for rule in self.rules]
        # [layers, rules, heads] -> [layers, n, heads]
        stack = lambda lists: torch.tensor(
            np.stack(lists, 1), dtype=torch.int32, device=self.device
        ).repeat_interleave(windows, 1)
        self.cap = stack([caps for caps, _ in given])
        self.most_recent = stack([
            np.minimum(own, half if rule.recent is None else rule.recent)
            for rule, (_, own) in zip(self.rules, given)
        ])  # fmt: skip
        # A head's own choice of its recent part may be more than half of its budget.
        self.any_recent = stack([np.full_like(own, "parts" in rule.budgets)
                                 for rule, (_, own) in zip(self.rules, given)])  # fmt: skip
        self.most_recent = torch.where(
            self.any_recent > 0, stack([own for _, own in given]), self.most_recent
        )
        self.floor = (self.cap * each([rule.floor for rule in self.rules])).ceil().int()
        self.prior = each([rule.prior for rule in self.rules])
        self.age = each([rule.age for rule in self.rules], torch.int32)
        self.decay = each([rule.decay for rule in self.rules]).unsqueeze(-1)
        self.share = each([rule.merge or 0 for rule in self.rules]).unsqueeze(-1)
        states = ["keep", "add", "max", "mean"]
        self.state = each([states.index(rule.state) for rule in self.rules]).unsqueeze(-1)
        self.toward = each([rule.toward == "key" for rule in self.rules], torch.bool).unsqueeze(-1)
        self.gate = each([rule.gate[1] if rule.gate else -2 for rule in self.rules]).unsqueeze(-1)
        keys = [rule.gate is not None and rule.gate[0] == "key" for rule in self.rules]
        self.gate_key = each(keys, torch.bool).unsqueeze(-1)
        self.kinds = []
        for i, rule in enumerate(self.rules):
            if i == 0 or rule.kind() != self.rules[i - 1].kind():
                self.kinds.append([rule, i * windows, i * windows])
            self.kinds[-1][2] += windows
        self.slots = slots = room(self.rules, budget, heads, measured)
        self.keys, self.values = of(slots, dim), of(slots, dim)
        self.a, self.steps, self.p = of(slots), of(slots), of(slots)
        self.bias = of(slots)
        self.place = of(slots, value=-1, dtype=torch.int32)  # in the text; -1: free
        self.rank = of(slots, value=-1, dtype=torch.int32)
        self.held = of(dtype=torch.int32)
        self.slot = of(1, dtype=torch.int64)
        self.output = of(dim)
        self.each_head = torch.arange(heads, device=self.device)
        self.base = torch.arange(self.n * heads, device=self.device) * slots
        self.metric = options.get("metric")

    def begin(self, t):
        """Makes room for the token at place t, an int32 [1]."""
        put = lambda state, value: state.scatter_(3, self.slot, value.expand_as(self.slot))
        put(self.place, t)
        put(self.rank, self.held.unsqueeze(-1))
        for state in (self.a, self.steps):
            state.scatter_(3, self.slot, 0)
        self.bias.zero_().masked_fill_(self.place < 0, -math.inf)
        self.at = (self.base.view(1, self.n, self.heads) + self.slot.squeeze(-1)).flatten(1)

    def attend(self, layer, q, k, v, turns):
        """q [n, heads * group, dim], rotated, as are k and v [n, heads, dim] where places are the text's."""
        nh, slots, dim = self.n * self.heads, self.slots, self.dim
        for state, new in ((self.keys, k), (self.values, v)):
            state[layer].view(-1, dim).index_copy_(0, self.at[layer], new.reshape(-1, dim))
        keys = self.keys[layer]
        if self.positions == "cache":
            keys = rotate(keys, *(F.embedding(self.rank[layer].clamp(min=0), x) for x in turns))
        p = torch.baddbmm(
            self.bias[layer].view(nh, 1, slots),
            q.reshape(nh, -1, dim),
            keys.reshape(nh, slots, dim).mT,
            alpha=dim**-0.5,
        ).softmax(-1)
        torch.mean(p, 1, out=self.p[layer].view(nh, slots))
        o = torch.bmm(p, self.values[layer].view(nh, slots, dim))
        torch.mean(o, 1, out=self.output[layer].view(nh, dim))
        return o.view(self.n, -1, dim)

    def finish(self, t):
        """Adds the step's attention to the state; then tokens leave."""
        age, live = t - self.place, self.place >= 0
        own = self.cap.clone()
        for rule, lo, hi in self.kinds:
            if rule.lends == "layer":
                own[:, lo:hi] = self.held[:, lo:hi]
        recent = torch.where(
            self.any_recent > 0,
            self.most_recent,
            torch.minimum(self.most_recent, own // 2 - SINKS),
        ).clamp(min=1)
        # Nothing may leave before its attention has counted.
        counts = (age >= torch.minimum(self.age, recent).unsqueeze(-1)) & live
        self.a.mul_(self.decay).add_(self.p * counts)
        self.steps.mul_(self.decay).add_(counts)
        w = self.a + (self.prior / self.cap).unsqueeze(-1)
        w /= (self.steps + self.prior.unsqueeze(-1)).clamp(min=1)
        stays = (self.place < SINKS) | (age < recent.unsqueeze(-1))
        for rule, lo, hi in self.kinds:
            self.leave(rule, slice(lo, hi), w[:, lo:hi], stays[:, lo:hi], t)
        # A free one: their place is the lowest.
        self.slot.copy_(self.place.argmin(-1, keepdim=True))

    def leave(self, rule, own, w, stays, t):
        cost = w.masked_fill(stays, math.inf) if rule.error is None else (
            w * self.distance(rule.error, own, w)
        ).masked_fill(stays, math.inf)  # fmt: skip
        cap, held, floor = (x[:, own] for x in (self.cap, self.held, self.floor))
        if rule.lends == "layer":
            for _ in range(self.heads):
                least, j = cost.min(-1)
                least = least.masked_fill(held <= floor, math.inf)
                lender = least.argmin(-1, keepdim=True) == self.each_head
                over = held.sum(-1, keepdim=True) > cap.sum(-1, keepdim=True)
                leaves = lender & over & least.isfinite()
                self.evict(rule, own, w, j.unsqueeze(-1), leaves)
                cost.scatter_(3, j.unsqueeze(-1), least.masked_fill(leaves, math.inf).unsqueeze(-1))
            return
        least, j = cost.min(-1)
        if rule.lends == "model":
            self.lend(rule, least, cap, held, floor)
        for turn in range(1 if rule.lends is None else 2):
            if turn > 0:
                cost.scatter_(3, j.unsqueeze(-1), math.inf)
                least, j = cost.min(-1)
            self.evict(rule, own, w, j.unsqueeze(-1), (held > cap) & least.isfinite())

    def lend(self, rule, least, cap, held, floor):
        """Budget goes from the heads whose victims are worth least to those whose are worth most."""
        layers, n, heads = least.shape
        flat = lambda x: x.transpose(0, 1).reshape(n, layers * heads)
        full = flat(held) >= flat(cap)
        worth, has = flat(least), flat(cap)
        ok = full & worth.isfinite()
        gives = worth.masked_fill(~ok | (has <= flat(floor)), math.inf)
        takes = worth.masked_fill(~ok | (has >= int(rule.most * self.budget)), -math.inf)
        pairs = min(rule.moves, worth.shape[1])
        gives, donors = gives.topk(pairs, largest=False)
        takes, recipients = takes.topk(pairs)
        moved = (gives < takes).int()
        change = torch.zeros_like(has).scatter_add_(1, donors, -moved)
        change.scatter_add_(1, recipients, moved)
        cap += change.view(n, layers, heads).transpose(0, 1)

    def distance(self, error, own, w):
        v, o = self.values[:, own], self.output[:, own].unsqueeze(3)
        if error == "merged":
            rank = self.rank[:, own].long()
            order = torch.arange(self.slots, device=self.device).expand_as(rank)
            # Free slots write behind the last rank, where nothing reads.
            at = torch.zeros_like(rank[..., :1]).expand(*rank.shape[:3], self.slots + 2).clone()
            at.scatter_(3, rank.masked_fill(rank < 0, self.slots + 1), order)
            right = at.gather(3, rank + 1)
            wr = w.gather(3, right).unsqueeze(-1)
            vr = v.gather(3, right.unsqueeze(-1).expand_as(v))
            wj = w.unsqueeze(-1)
            v = torch.where(wj + wr > 0, (wj * v + wr * vr) / (wj + wr), vr)
        apart = v - o
        if error in ("value", "merged"):
            return apart.norm(dim=-1)
        # [layers, 1, heads, dim, dim]
        across = apart @ self.metric[error].unsqueeze(1)
        return (across * apart).sum(-1).clamp(min=0).sqrt()

    def evict(self, rule, own, w, j, leaves):
        """The token in slot j leaves where `leaves`, both [layers, n, heads(, 1)]."""
        place, rank = self.place[:, own], self.rank[:, own]
        mine, leaves = rank.gather(3, j), leaves.unsqueeze(-1)
        if rule.merge is not None:
            self.merge(rule, own, w, j, mine, leaves)
        rank.sub_(((rank > mine) & leaves).int())
        rank.scatter_(3, j, mine.masked_fill(leaves, -1))
        place.scatter_(3, j, place.gather(3, j).masked_fill(leaves, -1))
        self.held[:, own].sub_(leaves.squeeze(-1).int())

    def merge(self, rule, own, w, j, mine, leaves):
        rank, a, steps = (x[:, own] for x in (self.rank, self.a, self.steps))
        row = lambda state, at: state[:, own].gather(
            3, at.unsqueeze(-1).expand(-1, -1, -1, 1, self.dim)
        ).squeeze(3)  # fmt: skip
        beside = lambda by: (rank == mine + by).int().argmax(-1, keepdim=True)
        r = beside(1)
        wj, vj, kj = w.gather(3, j), row(self.values, j), row(self.keys, j)
        if rule.toward != "right":
            left = beside(-1)
            costs = []
            for at in (r, left):
                wx = w.gather(3, at)
                apart = (vj - row(self.values, at)).norm(dim=-1, keepdim=True)
                ward = wj * wx / (wj + wx).clamp(min=1e-30) * apart
                alike = F.cosine_similarity(kj, row(self.keys, at), dim=-1, eps=1e-12)
                costs.append(torch.where(self.toward[own], -alike.unsqueeze(-1), ward))
            r = torch.where(costs[1] < costs[0], left, r)
        wr, vr = w.gather(3, r), row(self.values, r)
        if rule.gate is not None:
            kr = row(self.keys, r)
            alike = torch.where(
                self.gate_key[own],
                F.cosine_similarity(kj, kr, dim=-1, eps=1e-12).unsqueeze(-1),
                F.cosine_similarity(vj, vr, dim=-1, eps=1e-12).unsqueeze(-1),
            )
            leaves = leaves & (alike > self.gate[own])
        part = self.share[own] * wj
        mixed = (part * vj + wr * vr) / (part + wr)
        mixed = torch.where(leaves & (part + wr > 0), mixed, vr)
        self.values[:, own].scatter_(3, r.unsqueeze(-1).expand(-1, -1, -1, 1, self.dim), mixed.unsqueeze(3))
        nr, state = steps.gather(3, r), self.state[own]
        after = torch.where(state == 1, wj + wr, torch.maximum(wj, wr))
        both = (a.gather(3, j) + a.gather(3, r)) / (steps.gather(3, j) + nr)
        after = torch.where(state == 3, both, after) * nr
        a.scatter_(3, r, torch.where(leaves & (state > 0), after, a.gather(3, r)))


def room(rules, budget, heads, measured):
    """Slots that suffice: a head's most tokens and the new one."""

    def most(rule):
        caps, _ = measured(rule.budgets)
        if rule.lends == "model":
            return max(int(rule.most * budget), caps.max())
        if rule.lends is None:
            return caps.max()
        floors = np.ceil(rule.floor * caps).astype(int)
        # All but one at their floor; new tokens come before old ones leave.
        return (caps.sum(1, keepdims=True) - floors.sum(1, keepdims=True) + floors).max() + heads

    return int(max(most(rule) for rule in rules)) + 1


def even(rule):
    return rule.budgets == "even" and rule.lends is None


def spread(kind, budget, layers, heads):
    """Budgets that the library spreads over layers, [layers, heads], as src/cache/budget.ts does."""
    least = max(1, budget / 20)
    line = np.linspace(2 * budget - least, least, layers)
    if kind != "pyramid":
        line = line[::-1] if kind == "inverse" else np.full(layers, budget)
    caps = np.diff(np.floor(np.cumsum(line) + 0.5), prepend=0).astype(int)
    caps = np.repeat(caps[:, None], heads, 1)
    return caps, caps // 2 - SINKS


# ---- the model ----


class Model:
    """Llama from a GGUF file, its weights in f32."""

    def __init__(self, path, device):
        meta, tensors = read_gguf(path)
        of = lambda key: meta["llama." + key]
        self.layers, self.hidden = of("block_count"), of("embedding_length")
        self.queries, self.heads = of("attention.head_count"), of("attention.head_count_kv")
        self.dim = self.hidden // self.queries
        self.eps, self.device = of("attention.layer_norm_rms_epsilon"), device
        put = lambda x: torch.tensor(x, device=device)

        def unpermuted(x):
            # Rows of a head lie in pairs; halves rotate with fewer operations.
            return x.reshape(-1, self.dim // 2, 2, self.hidden).swapaxes(1, 2).reshape(x.shape)

        self.embed, self.norm = put(tensors["token_embd.weight"]), put(tensors["output_norm.weight"])
        self.head = put(tensors["output.weight"]) if "output.weight" in tensors else self.embed
        self.blocks = []
        for i in range(self.layers):
            t = lambda name: tensors[f"blk.{i}.{name}.weight"]
            q, k = unpermuted(t("attn_q")), unpermuted(t("attn_k"))
            self.blocks.append(dict(
                qkv=put(np.concatenate([q, k, t("attn_v")])),
                out=put(t("attn_output")),
                up=put(np.concatenate([t("ffn_gate"), t("ffn_up")])),
                down=put(t("ffn_down")),
                norm1=put(t("attn_norm")),
                norm2=put(t("ffn_norm")),
            ))  # fmt: skip
        self.base = of("rope.freq_base")

    def turns(self, length, dtype=torch.float32):
        """Cosines and sines of the places, [length, dim / 2]."""
        return turns(self.base, self.dim, length, dtype, self.device)

    def qkv(self, block, x):
        """Queries and keys [..., queries + heads, dim], values [..., heads, dim]."""
        y = F.linear(F.rms_norm(x, (self.hidden,), block["norm1"], self.eps), block["qkv"])
        y = y.unflatten(-1, (-1, self.dim))
        return y[..., : self.queries + self.heads, :], y[..., self.queries + self.heads :, :]

    def mlp(self, block, x):
        y = F.linear(F.rms_norm(x, (self.hidden,), block["norm2"], self.eps), block["up"])
        gate, up = y.chunk(2, -1)
        return F.linear(F.silu(gate) * up, block["down"])

    def nll(self, x, targets):
        """Negative log probabilities of targets, and whether each is the likeliest."""
        logits = F.linear(F.rms_norm(x, (self.hidden,), self.norm, self.eps), self.head)
        log = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return logits.logsumexp(-1) - log, logits.argmax(-1) == targets

    def full(self, tokens, tape=None):
        """What nll() says of every target, with a full cache; `tape` takes what layers did."""
        cos, sin = (x.unsqueeze(1) for x in self.turns(len(tokens)))
        x = F.embedding(tokens, self.embed)
        if tape is not None:
            x = x.clone().requires_grad_()
        for block in self.blocks:
            qk, v = self.qkv(block, x)
            turned = rotate(qk, cos, sin).transpose(0, 1)
            group = self.queries // self.heads
            q, k = turned[: self.queries], turned[self.queries :].repeat_interleave(group, 0)
            o = F.scaled_dot_product_attention(
                q[None], k[None], v.transpose(0, 1).repeat_interleave(group, 0)[None], is_causal=True
            )[0].transpose(0, 1)  # fmt: skip
            if tape is not None:
                o.retain_grad()
                tape.append((qk.detach(), v.detach(), o, x.detach().square().sum(-1)))
            x = x + F.linear(o.flatten(1), block["out"])
            x = x + self.mlp(block, x)
        parts = zip(x[:-1].split(1024), tokens[1:].split(1024))
        return [torch.cat(list(one)) for one in zip(*(self.nll(*part) for part in parts))]


def turns(base, dim, length, dtype, device):
    frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies.float().double()
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def rotate(x, cos, sin):
    one, two = x.chunk(2, -1)
    return torch.cat([one * cos - two * sin, one * sin + two * cos], -1)


def read_gguf(path):
    """Metadata, and tensors as f32: F32, Q4_1 and Q8_0."""
    data = open(path, "rb").read()
    at = 8

    def number(code):
        nonlocal at
        (value,) = struct.unpack_from("<" + code, data, at)
        at += struct.calcsize("<" + code)
        return value

    def text():
        nonlocal at
        size = number("Q")
        at += size
        return data[at - size : at].decode()

    def value(kind):
        if kind == 8:
            return text()
        if kind == 9:
            kind, count = number("I"), number("Q")
            return [value(kind) for _ in range(count)]
        return number("BbHhIif?__Qqd"[kind])

    count, pairs = number("Q"), number("Q")
    meta = {}
    for _ in range(pairs):
        key = text()
        meta[key] = value(number("I"))
    infos = []
    for _ in range(count):
        name = text()
        shape = [number("Q") for _ in range(number("I"))][::-1]
        infos.append((name, shape, number("I"), number("Q")))
    start = -(-at // 32) * 32

    def load(shape, kind, offset):
        size = math.prod(shape)
        if kind == 0:
            return np.frombuffer(data, "<f4", size, start + offset).reshape(shape)
        width = {3: 20, 8: 34}[kind]
        raw = np.frombuffer(data, np.uint8, size // 32 * width, start + offset).reshape(-1, width)
        half = lambda i: raw[:, i : i + 2].copy().view("<f2").astype(np.float32)
        if kind == 8:
            return (half(0) * raw[:, 2:].view(np.int8)).reshape(shape)
        quants = np.concatenate([raw[:, 4:] & 15, raw[:, 4:] >> 4], 1)
        return (half(0) * quants + half(2)).reshape(shape)

    return meta, {name: load(*where) for name, *where in infos}


# ---- a step of all sequences ----


class Run:
    """All rules' sequences, which read a token of their window each step."""

    def __init__(self, model, rules, windows, scored, budget, measured, metric):
        # Both [windows, length]: the tokens, and whether each is a target.
        self.model = model
        count, self.length = windows.shape
        shape = (model.layers, model.heads, model.dim)
        options = dict(dtype=torch.float32, device=model.device, metric=metric)
        groups = {}
        for rule in rules:
            groups.setdefault((rule.positions, even(rule), rule.lends), []).append(rule)
        self.caches = [Caches(group, count, budget, shape, measured, options) for group in groups.values()]
        self.rules = [rule for caches in self.caches for rule in caches.rules]
        self.tokens, self.scored = (x.repeat(len(self.rules), 1) for x in (windows, scored))
        self.first = int(scored.any(0).nonzero()[0])
        self.n = len(self.tokens)
        self.turns = model.turns(self.length + 1)
        self.t = torch.zeros(1, dtype=torch.int64, device=model.device)
        self.nll = torch.zeros(self.n, dtype=torch.float64, device=model.device)
        self.right = torch.zeros(self.n, dtype=torch.int64, device=model.device)
        queries = model.queries + model.heads
        size = (2, model.layers, self.n, queries, model.dim // 2)
        self.angles = torch.empty(size, device=model.device)

    def begin(self):
        turn_all(self.caches, self.turns, self.t, self.angles, self.model.queries)

    def finish(self):
        for caches in self.caches:
            caches.held.add_(1)
            caches.finish(self.t.int())
        self.t.add_(1)

    def attend(self, layer, qk, v):
        qk = rotate(qk, self.angles[0, layer], self.angles[1, layer])
        q, k = qk[:, : self.model.queries], qk[:, self.model.queries :]
        return attend_all(self.caches, layer, q, k, v, self.turns)

    def step(self, scores):
        model = self.model
        self.begin()
        x = F.embedding(self.tokens.index_select(1, self.t).squeeze(1), model.embed)
        for layer, block in enumerate(model.blocks):
            o = self.attend(layer, *model.qkv(block, x))
            x = x + F.linear(o.flatten(1), block["out"])
            x = x + model.mlp(block, x)
        if scores:
            targets, scored = (
                x.index_select(1, self.t + 1).squeeze(1) for x in (self.tokens, self.scored)
            )
            nll, right = model.nll(x, targets)
            self.nll.add_(nll * scored)
            self.right.add_(right & scored)
        self.finish()

    def all(self, until=math.inf):
        """Feeds the windows; false when the time was over before their end."""
        return replay(self.step, self.length - 1, self.first - 1, self.model.device, until)


def turn_all(caches, turns, t, angles, queries):
    """Queries' and keys' cosines and sines of a step, into angles [2, layers, n, queries + heads, dim / 2]."""
    lo = 0
    for own in caches:
        own.begin(t.int())
        for x, into in zip(turns, angles):
            part = into[:, lo : lo + own.n]
            if own.positions == "text":
                part.copy_(x.index_select(0, t).expand_as(part))
                continue
            # The newest token's rank, to which keys are turned when they are read.
            part[:, :, :queries] = F.embedding(own.held, x).repeat_interleave(queries // own.heads, 2)
            part[:, :, queries:] = x[0]
        lo += own.n


def attend_all(caches, layer, q, k, v, turns):
    lo, outputs = 0, []
    for own in caches:
        part = slice(lo, lo + own.n)
        outputs.append(own.attend(layer, q[part], k[part], v[part], turns))
        lo += own.n
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def replay(step, steps, scored_from, device, until=math.inf):
    """Runs step(scores) `steps` times; on a GPU as a graph, once it has run."""
    graphs, runs, begin = {}, {False: 0, True: 0}, time.time()
    for i in range(steps):
        scores = i >= scored_from
        runs[scores] += 1
        # Kernels are loaded when they first run, which a capture must not see.
        if device == "cpu" or runs[scores] < 3:
            step(scores)
        else:
            if scores not in graphs:
                graphs[scores] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graphs[scores]):
                    step(scores)
            graphs[scores].replay()
        if i % 256 == 255 or i == steps - 1:
            if device != "cpu":
                torch.cuda.synchronize()
            spent = time.time() - begin
            print(f"  step {i + 1} of {steps}, {spent:.1f} s", flush=True)
            if time.time() + spent / (i + 1) * (steps - 1 - i) > until and i > 500:
                return False
    return True


# ---- budgets and metrics that are measured ----

GRID = [1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1, 3 / 2, 2, 5 / 2, 3]


class Measured:
    """
    What a full cache's queries, keys and values over some windows tell: what a
    head's output lacks with m tokens, for m of GRID times the budget. By residual:
    its square behind the projection over the residual's. By loss: the square of
    its product with the loss's gradient, half of which is the change in loss that
    Fisher's information expects.
    """

    def __init__(self, model, budget, windows):
        self.model, self.budget = model, budget
        self.curves = self.metric = None
        if windows is not None:
            self.measure(windows)

    def __call__(self, name):
        """Budgets and the most recent tokens of each head, both [layers, heads]."""
        layers, heads = self.model.layers, self.model.heads
        if name in ("even", "pyramid", "inverse"):
            return spread(name, self.budget, layers, heads)
        if name not in self.cached:
            kind, by = name.split(" by ", 1)
            curve = self.curves[by.removeprefix("root of ")]  # [layers, heads, 2, grid]
            if by.startswith("root"):
                curve = np.sqrt(curve)
            parts = curve.argmin(2) if kind == "parts" else np.zeros_like(curve[:, :, 0], int)
            curve = np.take_along_axis(curve, parts[:, :, None], 2)[:, :, 0]
            if kind == "layers":
                curve = curve.sum(1, keepdims=True)
            caps = shared(curve.reshape(-1, len(self.grid)), self.grid, self.budget)
            caps = np.broadcast_to(caps.reshape(layers, -1), (layers, heads)).copy()
            # A head takes the recent part of the nearest budget that was measured.
            near = np.abs(caps[:, :, None] - np.array(self.grid)).argmin(-1)
            chosen = np.take_along_axis(parts, near[:, :, None], 2)[:, :, 0]
            recent = np.where(chosen == 1, caps - SINKS - 1, caps // 2 - SINKS)
            recent = np.where(chosen == 0, np.minimum(recent, self.budget // 2 - SINKS), recent)
            self.cached[name] = caps, recent
        return self.cached[name]

    def measure(self, windows):
        model, count = self.model, len(windows)
        self.cached = {}
        # A head needs room for its first tokens, one that may leave and the newest.
        self.grid = [int(share * self.budget) for share in GRID if share * self.budget >= SINKS + 2]
        tape, begin = [], time.time()
        for tokens in windows:
            one = []
            with torch.enable_grad():
                model.full(tokens, one)[0].sum().backward()
            tape.append(one)
            print(f"  read a window, {time.time() - begin:.1f} s", flush=True)
        length, heads, dim = windows.shape[1], model.heads, model.dim
        of = lambda get: torch.stack([torch.stack([get(*x) for x in one]) for one in tape], 1)
        qk, v = of(lambda qk, v, o, x: qk), of(lambda qk, v, o, x: v)
        exact, slope = of(lambda qk, v, o, x: o.detach()), of(lambda qk, v, o, x: o.grad)
        square = of(lambda qk, v, o, x: x)  # [layers, windows, length]
        del tape
        out = torch.stack([b["out"] for b in model.blocks]).unflatten(2, (heads, -1))
        each = out.unflatten(3, (-1, dim))  # [layers, hidden, heads, group, dim]
        scale = square.mean((1, 2)).rsqrt().view(-1, 1, 1, 1, 1)
        slopes = slope.unflatten(3, (heads, -1))  # [layers, windows, length, heads, group, dim]
        self.metric = dict(
            output=torch.einsum("lxhgd,lxhge->lhde", each * scale, each * scale),
            loss=torch.einsum("lwthgd,lwthge->lhde", slopes, slopes) / (count * length),
        )
        probes = []
        caps = lambda m: np.full((model.layers, heads), m)
        shapes = {}
        for part in ("half", "all"):
            for m in self.grid:
                most = min(m // 2, self.budget // 2) - SINKS if part == "half" else m - SINKS - 1
                name = f"parts {part} {m}"
                shapes[name] = caps(m), caps(max(1, most))
                probes.append(Rule(name, budgets=name, **LATE))
        shape = (model.layers, heads, dim)
        options = dict(dtype=torch.float32, device=model.device)
        caches = [Caches(probes, count, self.budget, shape, shapes.__getitem__, options)]
        n, own = caches[0].n, [rule.name for rule in caches[0].rules]
        t = torch.zeros(1, dtype=torch.int64, device=model.device)
        turns = model.turns(length)
        angles = torch.empty(
            (2, model.layers, n, model.queries + heads, dim // 2), device=model.device
        )  # fmt: skip
        sums = torch.zeros(2, model.layers, len(probes), count, heads, device=model.device)
        # [layers, windows, ...] of a step, once for each rule.
        now = lambda x: x.index_select(2, t).squeeze(2)
        every = lambda x: x.repeat(1, len(probes), *[1] * (x.dim() - 2))

        def step(scores):
            turn_all(caches, turns, t, angles, model.queries)
            both = rotate(every(now(qk)), *angles)
            value = every(now(v))
            made = torch.stack([
                attend_all(caches, i, both[i, :, : model.queries], both[i, :, model.queries :], value[i], turns)
                for i in range(model.layers)
            ])  # fmt: skip
            if scores:
                lacks = (made - every(now(exact))).unflatten(2, (heads, -1))
                moved = torch.einsum("lnhgd,lxhgd->lnhx", lacks, each).square().sum(-1)
                moved = moved / every(now(square).unsqueeze(-1))
                loss = (lacks * every(now(slopes))).sum((3, 4)).square()
                for i, x in enumerate((moved, loss)):
                    sums[i].add_(x.unflatten(1, (len(probes), count)))
            for x in caches:
                x.held.add_(1)
                x.finish(t.int())
            t.add_(1)

        replay(step, length, length // 2, model.device)
        sums = sums.sum(3).double().cpu().numpy() / (count * (length - length // 2))
        # [2, layers, rules, heads] -> [layers, heads, 2 parts, grid]
        sums = sums[:, :, [own.index(rule.name) for rule in probes]]
        sums = sums.reshape(2, model.layers, 2, len(self.grid), heads).transpose(0, 1, 4, 2, 3)
        self.curves = dict(residual=sums[0], loss=sums[1])


def shared(curves, grid, budget):
    """Budgets of the least sum of errors, of curves [n, grid], with the mean `budget`."""
    pieces, caps = [], np.full(len(curves), grid[0])
    for i, curve in enumerate(curves):
        # Only the lower hull is reached; each of its pieces is taken whole.
        at = 0
        while at < len(grid) - 1:
            gains = [(curve[at] - curve[to]) / (grid[to] - grid[at]) for to in range(at + 1, len(grid))]
            to = at + 1 + int(np.argmax(gains))
            pieces.append((-max(gains), i, grid[to] - grid[at]))
            at = to
    left = budget * len(curves) - caps.sum()
    # Along a hull gains fall, so pieces of one head come in order.
    for _, i, size in sorted(pieces, key=lambda piece: piece[0]):
        taken = min(size, left)
        caps[i] += taken
        left -= taken
    return caps


# ---- the command ----


def write(path, head, rows):
    fields = [f'"{key}": {json.dumps(value)}' for key, value in head.items()]
    lines = ",\n".join("    " + json.dumps(row) for row in rows)
    with open(path + ".part", "w") as file:
        file.write("{\n  " + ",\n  ".join([*fields, f'"rows": [\n{lines}\n  ]']) + "\n}\n")
    os.replace(path + ".part", path)


def sha256(path):
    return hashlib.sha256(open(path, "rb").read()).hexdigest()


def frame(args, tokens):
    gpu = driver = None
    if args.device != "cpu":
        gpu = torch.cuda.get_device_name()
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True).stdout.split("\n")[0]
    return dict(
        library=f"torch {torch.__version__}",
        kernels=sha256(__file__),
        **(dict(gpu=gpu, driver=driver) if gpu else {}),
        date=datetime.date.today().isoformat(),
        command="python bench/candidates.py --tokens FILE --out FILE",
        model=os.path.basename(args.model),
        **{key: tokens[key] for key in ("texts", "starts", "length") if key in tokens},
        budget=args.budget,
        cacheType="f32",
    )


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser()
    for name, value in dict(
        tokens=None, out=None, rules="all", windows=0, tune=None, budget=256, sequences=600,
        seconds=1e9, device="cuda",
        model=os.path.expanduser("~/.cache/weightedkv/models/SmolLM2-135M-Instruct.Q4_1.gguf"),
    ).items():  # fmt: skip
        parser.add_argument("--" + name, default=value, type=type(value) if value else str)
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    chosen = list(rules())
    if args.list:
        for rule in chosen:
            print(f"{rule.name}, {rule.positions}  against {rule.host}, kept above {rule.bound}%")
        return
    if args.rules != "all":
        names = args.rules.split(";")
        known = {f"{rule.name}, {rule.positions}" for rule in chosen}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise SystemExit(f"Unknown rules: {unknown}; --list has them")
        chosen = [rule for rule in chosen if f"{rule.name}, {rule.positions}" in names]
    end = time.time() + float(args.seconds)
    tokens = json.load(open(args.tokens))
    model = Model(args.model, args.device)
    put = lambda lists: torch.tensor(lists, device=args.device)
    windows = put(tokens["windows"])[: int(args.windows) or None]
    count, length = windows.shape
    # A window's second half is scored, a question's answer.
    spans = tokens.get("scored", [[length // 2, length]] * count)[:count]
    at = torch.arange(length, device=args.device)
    scored = torch.stack([(at >= first) & (at < end) for first, end in spans])
    head, rows = frame(args, tokens), []
    if os.path.exists(args.out):
        kept = json.load(open(args.out))
        head, rows = {key: value for key, value in kept.items() if key != "rows"}, kept["rows"]
    done = {row.get("policy") or f"{row['rule']}, {row['positions']}" for row in rows}

    def add(rule, nll, right, seconds):
        targets = [end - first for first, end in spans]
        name = f"{rule.name}, {rule.positions}"
        if "tasks" in tokens:
            for task in sorted(set(tokens["tasks"][:count])):
                own = [i for i in range(count) if tokens["tasks"][i] == task]
                scores = [int(right[i] == targets[i]) for i in own]
                nlls = [round(nll[i] / targets[i], 6) for i in own]
                rows.append(dict(
                    policy=name, task=task, questions=len(own), score=100 * sum(scores) / len(own),
                    nll=sum(nlls) / len(own), seconds=round(seconds, 1), scores=scores, nlls=nlls,
                ))  # fmt: skip
                print(f"{name}, {task}: {rows[-1]['score']:.0f}%, {rows[-1]['nll']:.3f}", flush=True)
            return
        host = rule.host and rule.host.rsplit(", ", 1)
        rows.append(dict(
            rule=rule.name, positions=rule.positions,
            **(dict(host=host[0], hostPositions=host[1], bound=rule.bound) if host else {}),
            window=length, picked=list(range(count)), targets=sum(targets),
            perplexity=math.exp(sum(nll) / sum(targets)), seconds=round(seconds, 1),
            windowTargets=targets, windowNll=[round(x, 4) for x in nll],
        ))  # fmt: skip
        print(f"{name}: {rows[-1]['perplexity']:.3f}", flush=True)

    if "full, cache" not in done:
        begin = time.time()
        nll, right = [], []
        for one, targets in zip(windows, scored):
            log, hit = (x[targets[1:]] for x in model.full(one))
            nll.append(log.double().sum().item())
            right.append(hit.sum().item())
        add(Rule("full", positions="cache"), nll, right, time.time() - begin)
        write(args.out, head, rows)
    chosen = [rule for rule in chosen if f"{rule.name}, {rule.positions}" not in done]
    tune = None
    if any(rule.error in ("output", "loss") or " by " in rule.budgets for rule in chosen):
        tune = put(json.load(open(args.tune or args.tokens))["measure"])
    measured = Measured(model, args.budget, tune)
    names = {rule.budgets for rule in chosen if " by " in rule.budgets}
    if names:
        head["budgets"] = {name: measured(name)[0].tolist() for name in sorted(names)}
        head["recents"] = {name: measured(name)[1].tolist() for name in sorted(names)}
    size = max(1, args.sequences // count)
    longest = 0
    for at in range(0, len(chosen), size):
        if time.time() + longest > end:
            break
        begin, batch = time.time(), chosen[at : at + size]
        run = Run(model, batch, windows, scored, args.budget, measured, measured.metric)
        print(f"{run.n} sequences of {len(batch)} rules", flush=True)
        if not run.all(end):
            break
        longest = max(longest, time.time() - begin)
        made = zip(run.rules, *(x.view(-1, count).tolist() for x in (run.nll, run.right)))
        for rule, nll, right in sorted(made, key=lambda one: chosen.index(one[0])):
            add(rule, nll, right, longest / len(batch))
        write(args.out, head, rows)
        del run


if __name__ == "__main__":
    main()
