"""Writes logits.bin and logits.json: f32 logits of two prompts of llamacpp.json with their continuations, every position.

Run from the project's root, after llamacpp.mjs:
  python tests/golden/logits.py MODEL.gguf
It first checks itself against llama.cpp: fed the same tokens, each greedy token of llama.cpp must be the first choice
here or within 1.0 of it (llama.cpp rounds activations to 8 bits and its cache to 16, so near-ties may fall elsewhere).

logits.bin is little-endian, one record of 328 bytes a position, prompts one behind the other:
  f32 columns[64]   the logits of the vocabulary ids in logits.json's `columns`
  u32 topIds[8]     the ids of the highest logits, the highest first
  f32 topLogits[8]
  f32 logSumExp     natural log of the sum of exp over the whole vocabulary
  f32 norm          L2 norm of the whole logit vector
"""

import json
import pathlib
import sys

import numpy as np
import torch

from llama import Llama, sha256

PROMPTS = ("code", "passage")
COLUMNS = 64
TOP = 8
HERE = pathlib.Path(__file__).parent

torch.set_num_threads(1)
torch.set_grad_enabled(False)
path = sys.argv[1]
model = Llama(path)
vocabulary = model.output.shape[0]
# Spread over the vocabulary, the first and the last id included.
columns = [round(i * (vocabulary - 1) / (COLUMNS - 1)) for i in range(COLUMNS)]
record = np.dtype([
    ("columns", "<f4", COLUMNS),
    ("topIds", "<u4", TOP),
    ("topLogits", "<f4", TOP),
    ("logSumExp", "<f4"),
    ("norm", "<f4"),
])

prompts, chunks, count = [], [], 0
for row in json.loads((HERE / "llamacpp.json").read_text())["prompts"]:
    start, tokens = len(row["promptTokens"]), row["promptTokens"] + row["tokens"]
    logits = model.hidden(torch.tensor(tokens), model.causal) @ model.output.T

    # The token at i was chosen from the logits at i - 1.
    choice = logits[start - 1:-1]
    gap = choice.max(-1).values - choice.gather(-1, torch.tensor(row["tokens"])[:, None])[:, 0]
    first = int((gap == 0).sum())
    print(f"{row['name']}: {first} of {len(gap)} first choices, largest gap {gap.max():.3f}", file=sys.stderr)
    if gap.max() > 1.0:
        raise SystemExit(f"{row['name']}: llama.cpp's token is {gap.max():.3f} below the first choice")

    if row["name"] not in PROMPTS:
        continue
    out = np.zeros(len(tokens), record)
    top = logits.topk(TOP)
    out["columns"] = logits[:, columns]
    out["topIds"] = top.indices
    out["topLogits"] = top.values
    out["logSumExp"] = logits.double().logsumexp(-1)
    out["norm"] = logits.double().norm(dim=-1)
    prompts.append({"name": row["name"], "first": count, "positions": len(tokens)})
    chunks.append(out)
    count += len(tokens)

np.concatenate(chunks).tofile(HERE / "logits.bin")
(HERE / "logits.json").write_text(
    json.dumps({
        "model": sha256(path),
        "recordBytes": record.itemsize,
        "top": TOP,
        "prompts": prompts,
        "columns": columns,
    }, indent=1) + "\n"
)
