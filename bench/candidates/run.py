"""
Runs the cache rules of docs/candidates.md side by side, as sequences of one
batch, and writes what bench/tables.ts prints. In torch, so that a rule costs a
few lines and no kernel; check.py compares each with plain lists.

  deno run -A bench/candidates/tokens.ts --text FILE,... --out tokens.json
  python bench/candidates/run.py --tokens tokens.json --out result.json
    [--rules all|NAME;...] [--windows 12] [--tune tokens.json] [--budget 256]
    [--sequences 600] [--seconds N] [--model FILE] [--device cuda] [--list]

Every window begins with an empty cache and is fed a token a step; its second
half is scored, of a question its answer. Budgets and metrics are measured on the
windows that the file of --tune keeps for it. A run that is cut off keeps the
batches that were finished, and goes on with the others.
"""

import argparse
import datetime
import glob
import hashlib
import json
import math
import os
import shutil
import subprocess
import time

import torch
import torch.nn.functional as F
from caches import Caches, attend_all, replay, rotate, turn_all
from measured import Measured
from model import Model
from rules import Rule, even, rules


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
        self.caches = [
            Caches(group, count, budget, shape, measured, options) for group in groups.values()
        ]
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


def write(path, head, rows):
    fields = [f'"{key}": {json.dumps(value)}' for key, value in head.items()]
    lines = ",\n".join("    " + json.dumps(row) for row in rows)
    with open(path + ".part", "w") as file:
        file.write("{\n  " + ",\n  ".join([*fields, f'"rows": [\n{lines}\n  ]']) + "\n}\n")
    os.replace(path + ".part", path)


def sources():
    """A hash of these files."""
    files = sorted(glob.glob(os.path.join(os.path.dirname(os.path.abspath(__file__)), "*.py")))
    return hashlib.sha256(b"".join(open(path, "rb").read() for path in files)).hexdigest()


def frame(args, tokens):
    gpu = driver = None
    if args.device != "cpu":
        gpu = torch.cuda.get_device_name()
        if shutil.which("nvidia-smi"):
            asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(asked, capture_output=True, text=True).stdout.split("\n")[0]
    return dict(
        library=f"torch {torch.__version__}",
        kernels=sources(),
        **(dict(gpu=gpu, driver=driver) if gpu else {}),
        date=datetime.date.today().isoformat(),
        command="python bench/candidates/run.py --tokens FILE --out FILE",
        model=os.path.basename(args.model),
        **{key: tokens[key] for key in ("texts", "starts", "length") if key in tokens},
        budget=args.budget,
        cacheType="f32",
    )


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser()
    for name, value in dict(
        tokens=None,
        out=None,
        rules="all",
        windows=0,
        tune=None,
        budget=256,
        sequences=600,
        seconds=1e9,
        device="cuda",
        model=os.path.expanduser("~/.cache/weightedkv/models/SmolLM2-135M-Instruct.Q4_1.gguf"),
    ).items():
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
                rows.append(
                    dict(
                        policy=name,
                        task=task,
                        questions=len(own),
                        score=100 * sum(scores) / len(own),
                        nll=sum(nlls) / len(own),
                        seconds=round(seconds, 1),
                        scores=scores,
                        nlls=nlls,
                    )
                )
                print(
                    f"{name}, {task}: {rows[-1]['score']:.0f}%, {rows[-1]['nll']:.3f}", flush=True
                )
            return
        host = rule.host and rule.host.rsplit(", ", 1)
        rows.append(
            dict(
                rule=rule.name,
                positions=rule.positions,
                **(dict(host=host[0], hostPositions=host[1], bound=rule.bound) if host else {}),
                window=length,
                picked=list(range(count)),
                targets=sum(targets),
                perplexity=math.exp(sum(nll) / sum(targets)),
                seconds=round(seconds, 1),
                windowTargets=targets,
                windowNll=[round(x, 4) for x in nll],
            )
        )
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
