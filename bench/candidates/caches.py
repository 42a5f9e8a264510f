"""Caches of many sequences under different rules, and their steps; for run.py and measured.py."""

import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from rules import Rule

SINKS = 4


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
        self.most_recent = stack(
            [
                np.minimum(own, half if rule.recent is None else rule.recent)
                for rule, (_, own) in zip(self.rules, given)
            ]
        )
        # A head's own choice of its recent part may be more than half of its budget.
        self.any_recent = stack(
            [
                np.full_like(own, "parts" in rule.budgets)
                for rule, (_, own) in zip(self.rules, given)
            ]
        )
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
        """q [n, heads * group, dim] is rotated, k [n, heads, dim] where places are the text's."""
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
        cost = (
            w.masked_fill(stays, math.inf)
            if rule.error is None
            else (w * self.distance(rule.error, own, w)).masked_fill(stays, math.inf)
        )
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
        """Budget goes from heads whose victims are worth least to those whose are worth most."""
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
        row = lambda state, at: (
            state[:, own].gather(3, at.unsqueeze(-1).expand(-1, -1, -1, 1, self.dim)).squeeze(3)
        )
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
        self.values[:, own].scatter_(
            3, r.unsqueeze(-1).expand(-1, -1, -1, 1, self.dim), mixed.unsqueeze(3)
        )
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


def turn_all(caches, turns, t, angles, queries):
    """A step's cosines and sines, into angles [2, layers, n, queries + heads, dim / 2]."""
    lo = 0
    for own in caches:
        own.begin(t.int())
        for x, into in zip(turns, angles):
            part = into[:, lo : lo + own.n]
            if own.positions == "text":
                part.copy_(x.index_select(0, t).expand_as(part))
                continue
            # The newest token's rank, to which keys are turned when they are read.
            part[:, :, :queries] = F.embedding(own.held, x).repeat_interleave(
                queries // own.heads, 2
            )
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


def turns(base, dim, length, dtype, device):
    frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies.float().double()
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def rotate(x, cos, sin):
    one, two = x.chunk(2, -1)
    return torch.cat([one * cos - two * sin, one * sin + two * cos], -1)
