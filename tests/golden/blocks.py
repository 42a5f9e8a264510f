"""Writes blocks.json: random GGUF blocks of every quantised type, and what gguf-py makes of them.

Run from the project's root: python tests/golden/blocks.py
Made with Python 3.11.7, gguf 0.19.0, numpy 2.4.6. Three rows of 256 columns a type: random bytes with ordinary scales, all bits set
with the largest scales, and zeros with a subnormal one; bytes and f32 values in base64.
"""

import base64
import json
import pathlib

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

HALVES = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2],
          "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0]}
random = np.random.default_rng(7)
types = {}
for name, halves in HALVES.items():
    kind = GGMLQuantizationType[name]
    columns, size = GGML_QUANT_SIZES[kind]
    rows = []
    for row in range(3):
        blocks = random.integers(0, 256, (256 // columns, size), np.uint8)
        if row > 0:
            blocks[:] = 255 if row == 1 else 0
        for at in halves:
            d = random.normal(0, 0.02, len(blocks)) if row == 0 else np.full(len(blocks), 60000.0 if row == 1 else 6e-8)
            blocks[:, at:at + 2] = d.astype("<f2").view(np.uint8).reshape(-1, 2)
        rows.append(blocks.reshape(-1))
    data = np.stack(rows)
    values = np.stack([dequantize(r, kind) for r in data]).astype("<f4")
    assert values.shape == (3, 256) and np.isfinite(values).all()
    types[name] = {"bytes": base64.b64encode(data.tobytes()).decode(), "values": base64.b64encode(values.tobytes()).decode()}
(pathlib.Path(__file__).parent / "blocks.json").write_text(json.dumps(types, indent=1) + "\n")
