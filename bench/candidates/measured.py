"""Budgets and metrics that a full cache's queries, keys and values tell; used by run.py."""

import time

import numpy as np
import torch
from caches import SINKS, Caches, attend_all, replay, rotate, turn_all
from rules import LATE, Rule

GRID = [1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1, 3 / 2, 2, 5 / 2, 3]


def spread(kind, budget, layers, heads):
    """Budgets [layers, heads] that the library knows, as src/cache/budget.ts spreads them."""
    least = max(1, budget / 20)
    line = np.linspace(2 * budget - least, least, layers)
    if kind == "even":
        line = np.full(layers, budget)
    caps = np.diff(np.floor(np.cumsum(line) + 0.5), prepend=0).astype(int)
    caps = caps[::-1] if kind == "inverse" else caps
    caps = np.repeat(caps[:, None], heads, 1)
    return caps, caps // 2 - SINKS


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
        tape.clear()
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
        )
        sums = torch.zeros(2, model.layers, len(probes), count, heads, device=model.device)
        # [layers, windows, ...] of a step, once for each rule.
        now = lambda x: x.index_select(2, t).squeeze(2)
        every = lambda x: x.repeat(1, len(probes), *[1] * (x.dim() - 2))

        def step(scores):
            turn_all(caches, turns, t, angles, model.queries)
            both = rotate(every(now(qk)), *angles)
            value = every(now(v))
            made = torch.stack(
                [
                    attend_all(
                        caches,
                        i,
                        both[i, :, : model.queries],
                        both[i, :, model.queries :],
                        value[i],
                        turns,
                    )
                    for i in range(model.layers)
                ]
            )
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
            gains = [
                (curve[at] - curve[to]) / (grid[to] - grid[at]) for to in range(at + 1, len(grid))
            ]
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
