"""
Compares every rule of rules.py with plain lists in f64, over random
queries, keys and values: the same tokens kept at each step, the same values.

  python bench/candidates/check.py [FIRST]
"""

import math
import sys

import numpy as np
import torch
from caches import SINKS, Caches, attend_all, rotate, turn_all, turns
from rules import Rule, rules

LAYERS, HEADS, GROUP, DIM, BUDGET, STEPS = 2, 3, 2, 8, 32, 90
BASE = 100.0


class Token:
    def __init__(self, place, key, value):
        self.place, self.key, self.value = place, key, value
        self.a = self.n = self.p = 0.0


class Plain:
    """One sequence under one rule."""

    def __init__(self, rule, caps, recents, metric):
        self.rule, self.caps, self.recents, self.metric = rule, caps.copy(), recents, metric
        self.floors = np.ceil(rule.floor * caps)
        self.lists = [[[] for _ in range(HEADS)] for _ in range(LAYERS)]

    def step(self, t, q, k, v):
        rule = self.rule
        self.outputs = np.zeros((LAYERS, HEADS, DIM))
        for l in range(LAYERS):
            for h, tokens in enumerate(self.lists[l]):
                text = rule.positions == "text"
                tokens.append(Token(t, turn(k[l, h], t if text else 0), v[l, h].copy()))
                self.attend(l, h, q[l, h * GROUP : (h + 1) * GROUP], t if text else len(tokens) - 1)
        for l in range(LAYERS):
            for h, tokens in enumerate(self.lists[l]):
                for token in tokens:
                    counts = t - token.place >= min(rule.age, self.recent(l, h))
                    token.a = token.a * rule.decay + token.p * counts
                    token.n = token.n * rule.decay + counts
        worth = {(l, h): self.costs(t, l, h) for l in range(LAYERS) for h in range(HEADS)}
        if rule.lends == "layer":
            for l in range(LAYERS):
                for _ in range(HEADS):
                    heads = [h for h in range(HEADS) if len(self.lists[l][h]) > self.floors[l, h]]
                    heads = [h for h in heads if worth[l, h]]
                    if sum(map(len, self.lists[l])) > self.caps[l].sum() and heads:
                        self.evict(l, min(heads, key=lambda h: min(worth[l, h])[0]), worth)
            return
        if rule.lends == "model":
            self.lend(worth)
        for _ in range(2 if rule.lends else 1):
            for (l, h), own in worth.items():
                if len(self.lists[l][h]) > self.caps[l, h] and own:
                    self.evict(l, h, worth)

    def recent(self, l, h):
        own = len(self.lists[l][h]) if self.rule.lends == "layer" else self.caps[l, h]
        if "parts" in self.rule.budgets:
            return max(1, self.recents[l, h])
        most = BUDGET // 2 - SINKS if self.rule.recent is None else self.rule.recent
        return max(1, min(most, self.recents[l, h], own // 2 - SINKS))

    def attend(self, l, h, queries, place):
        tokens = self.lists[l][h]
        for rank, token in enumerate(tokens):
            token.p = 0.0
            token.turned = token.key if self.rule.positions == "text" else turn(token.key, rank)
        for query in queries:
            query = turn(query, place)
            exps = np.exp([query @ token.turned / math.sqrt(DIM) for token in tokens])
            for token, p in zip(tokens, exps / exps.sum()):
                token.p += p / GROUP
                self.outputs[l, h] += p * token.value / GROUP

    def weight(self, l, h, token):
        return (token.a + self.rule.prior / self.caps[l, h]) / max(1, token.n + self.rule.prior)

    def costs(self, t, l, h):
        """What may leave, as [cost, token], the weight kept with it."""
        tokens, o, found = self.lists[l][h], self.outputs[l, h], []
        for token in tokens:
            token.w = self.weight(l, h, token)
        for rank, token in enumerate(tokens):
            if token.place < SINKS or t - token.place < self.recent(l, h):
                continue
            v = token.value
            if self.rule.error == "merged":
                r = tokens[rank + 1]
                v = (token.w * v + r.w * r.value) / (token.w + r.w)
            apart = v - o
            cost = token.w
            if self.rule.error in ("value", "merged"):
                cost *= math.sqrt(apart @ apart)
            elif self.rule.error:
                cost *= math.sqrt(apart @ self.metric[self.rule.error][l, h].numpy() @ apart)
            found.append((cost, token.place, token))
        return found

    def lend(self, worth):
        heads = [
            (l, h)
            for (l, h), own in worth.items()
            if own and len(self.lists[l][h]) >= self.caps[l, h]
        ]
        least = {at: min(worth[at])[0] for at in heads}
        donors = sorted((least[at], at) for at in heads if self.caps[at] > self.floors[at])
        takers = sorted(
            ((least[at], at) for at in heads if self.caps[at] < self.rule.most * BUDGET),
            reverse=True,
        )
        for (low, donor), (high, taker) in list(zip(donors, takers))[: self.rule.moves]:
            if low < high:
                self.caps[donor] -= 1
                self.caps[taker] += 1

    def evict(self, l, h, worth):
        rule, tokens = self.rule, self.lists[l][h]
        victim = min(worth[l, h], key=lambda one: one[:2])
        worth[l, h].remove(victim)
        j = victim[2]
        rank = tokens.index(j)
        if rule.merge is not None:
            r = tokens[rank + 1]
            if rule.toward != "right":
                far = lambda x: (
                    -cos(j.key, x.key)
                    if rule.toward == "key"
                    else j.w * x.w / (j.w + x.w) * np.linalg.norm(j.value - x.value)
                )
                if far(tokens[rank - 1]) < far(r):
                    r = tokens[rank - 1]
            alike = rule.gate and cos(
                *((j.key, r.key) if rule.gate[0] == "key" else (j.value, r.value))
            )
            if rule.gate is None or alike > rule.gate[1]:
                part = rule.merge * j.w
                r.value = (part * j.value + r.w * r.value) / (part + r.w)
                if rule.state == "mean":
                    r.a = (j.a + r.a) / (j.n + r.n) * r.n
                elif rule.state != "keep":
                    r.a = (j.w + r.w if rule.state == "add" else max(j.w, r.w)) * r.n
        tokens.remove(j)


def turn(x, place):
    one, two = x[: DIM // 2], x[DIM // 2 :]
    angles = place * np.array(
        [np.float32(BASE ** (-2 * i / DIM)) for i in range(DIM // 2)], np.float64
    )
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([one * cos - two * sin, one * sin + two * cos])


def cos(x, y):
    return x @ y / max(np.linalg.norm(x), 1e-12) / max(np.linalg.norm(y), 1e-12)


def check(rule, measured, metric):
    options = dict(dtype=torch.float64, device="cpu", metric=metric)
    # Two rules and two windows, so that a neighbour's state would show.
    other = Rule("other", positions=rule.positions, budgets=rule.budgets, lends=rule.lends)
    caches = Caches([rule, other], 2, BUDGET, (LAYERS, HEADS, DIM), measured, options)
    first = 2 * caches.rules.index(rule)
    table = turns(BASE, DIM, STEPS, torch.float64, "cpu")
    angles = torch.empty(2, LAYERS, 4, HEADS * GROUP + HEADS, DIM // 2, dtype=torch.float64)
    plains = [Plain(rule, *measured(rule.budgets), metric) for _ in range(2)]
    random = torch.Generator().manual_seed(1)
    draw = lambda heads: torch.randn(LAYERS, 4, heads, DIM, generator=random, dtype=torch.float64)
    worst = left = 0
    for step in range(STEPS):
        t = torch.tensor([step])
        turn_all([caches], table, t, angles, HEADS * GROUP)
        qk, v = draw(HEADS * GROUP + HEADS), draw(HEADS)
        turned = rotate(qk, *angles)
        q, k = turned[:, :, : HEADS * GROUP], turned[:, :, HEADS * GROUP :]
        for l in range(LAYERS):
            attend_all([caches], l, q[l], k[l], v[l], table)
        caches.held.add_(1)
        caches.finish(t.int())
        for w, plain in enumerate(plains):
            n = first + w
            plain.step(
                step,
                qk[:, n, : HEADS * GROUP].numpy(),
                qk[:, n, HEADS * GROUP :].numpy(),
                v[:, n].numpy(),
            )
            for l in range(LAYERS):
                for h, tokens in enumerate(plain.lists[l]):
                    places = caches.place[l, n, h].tolist()
                    assert sorted(x for x in places if x >= 0) == [x.place for x in tokens], (
                        rule.name,
                        step,
                        l,
                        h,
                    )
                    left += len(tokens) <= step
                    ranks, values, a = (
                        x[l, n, h].numpy() for x in (caches.rank, caches.values, caches.a)
                    )
                    for rank, token in enumerate(tokens):
                        slot = places.index(token.place)
                        assert ranks[slot] == rank
                        worst = max(
                            worst, np.abs(values[slot] - token.value).max(), abs(a[slot] - token.a)
                        )
    assert left > 0 and worst < 1e-9, (rule.name, left, worst)
    return worst


def main():
    random = np.random.default_rng(0)

    def measured(name):
        caps = np.full((LAYERS, HEADS), BUDGET)
        if name != "even":
            for _ in range(3):
                lender, taker = random_pair(name)
                caps.flat[lender] -= 3
                caps.flat[taker] += 3
        return caps, caps - SINKS - 6 if "parts" in name else caps // 2 - SINKS

    def random_pair(name):
        seed = sum(map(ord, name))
        return seed % caps_size, (seed + 2) % caps_size

    caps_size = LAYERS * HEADS
    square = lambda: torch.from_numpy(random.standard_normal((LAYERS, HEADS, DIM, DIM)))
    metric = {name: (x := square()) @ x.mT for name in ("output", "loss")}
    for rule in list(rules())[int(sys.argv[1]) if len(sys.argv) > 1 else 0 :]:
        worst = check(rule, measured, metric)
        print(f"{rule.name}, {rule.positions}: within {worst:.0e}")


if __name__ == "__main__":
    main()
