"""The default model in torch, from its GGUF file; its figures agree with the library's in f32."""

import math
import struct

import numpy as np
import torch
import torch.nn.functional as F
from caches import rotate, turns


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

        self.embed, self.norm = (
            put(tensors["token_embd.weight"]),
            put(tensors["output_norm.weight"]),
        )
        self.head = put(tensors["output.weight"]) if "output.weight" in tensors else self.embed
        self.blocks = []
        for i in range(self.layers):
            t = lambda name, i=i: tensors[f"blk.{i}.{name}.weight"]
            q, k = unpermuted(t("attn_q")), unpermuted(t("attn_k"))
            self.blocks.append(
                dict(
                    qkv=put(np.concatenate([q, k, t("attn_v")])),
                    out=put(t("attn_output")),
                    up=put(np.concatenate([t("ffn_gate"), t("ffn_up")])),
                    down=put(t("ffn_down")),
                    norm1=put(t("attn_norm")),
                    norm2=put(t("ffn_norm")),
                )
            )
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
                q[None],
                k[None],
                v.transpose(0, 1).repeat_interleave(group, 0)[None],
                is_causal=True,
            )[0].transpose(0, 1)
            if tape is not None:
                o.retain_grad()
                tape.append((qk.detach(), v.detach(), o, x.detach().square().sum(-1)))
            x = x + F.linear(o.flatten(1), block["out"])
            x = x + self.mlp(block, x)
        parts = zip(x[:-1].split(1024), tokens[1:].split(1024))
        return [torch.cat(list(one)) for one in zip(*(self.nll(*part) for part in parts))]


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
