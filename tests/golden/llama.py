"""The Llama forward pass in plain f32 PyTorch, with attention left to the caller; logits.py and perplexity.py call it.

Written from the published architecture and the GGUF layout only, and shares no code with the project:
what it computes is what the runner is compared with. Weights are dequantised to f32 by the `gguf` package.
"""

import hashlib

import torch
from gguf import GGUFReader
from gguf.quants import dequantize


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rotate(x, positions, base):
    """RoPE on interleaved pairs (2i, 2i+1), the order GGUF keeps Llama's Q and K rows in.

    x is [..., length, dim]; positions is [length] or anything that broadcasts to x's leading axes.
    """
    dim = x.shape[-1]
    frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = positions.to(torch.float64)[..., None] * frequency
    cos, sin = angle.cos().float(), angle.sin().float()
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class Llama:
    def __init__(self, path):
        reader = GGUFReader(path)
        value = lambda key: reader.fields["llama." + key].contents()
        self.layers = value("block_count")
        self.heads = value("attention.head_count")
        self.kv_heads = value("attention.head_count_kv")
        self.group = self.heads // self.kv_heads
        self.eps = value("attention.layer_norm_rms_epsilon")
        self.base = value("rope.freq_base")
        self.dim = value("embedding_length") // self.heads
        self.weight = {
            tensor.name.removesuffix(".weight"): torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            for tensor in reader.tensors
        }
        self.output = self.weight.get("output", self.weight["token_embd"])

    def norm(self, x, name):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight[name]

    def hidden(self, tokens, attend):
        """The normed last hidden state of each of `tokens` [n], as [n, embedding].

        attend(layer, q [n, heads, dim], k [n, kvHeads, dim], v likewise) -> [n, heads, dim]; q and k come un-rotated.
        """
        w = self.weight
        x = w["token_embd"][tokens]
        n = len(tokens)
        for layer in range(self.layers):
            block = f"blk.{layer}."
            h = self.norm(x, block + "attn_norm")
            q = (h @ w[block + "attn_q"].T).view(n, self.heads, self.dim)
            k = (h @ w[block + "attn_k"].T).view(n, self.kv_heads, self.dim)
            v = (h @ w[block + "attn_v"].T).view(n, self.kv_heads, self.dim)
            x = x + attend(layer, q, k, v).reshape(n, -1) @ w[block + "attn_output"].T
            h = self.norm(x, block + "ffn_norm")
            gate = torch.nn.functional.silu(h @ w[block + "ffn_gate"].T)
            x = x + (gate * (h @ w[block + "ffn_up"].T)) @ w[block + "ffn_down"].T
        return self.norm(x, "output_norm")

    def causal(self, layer, q, k, v):
        """Ordinary causal attention over one whole text: an `attend` for hidden()."""
        n = q.shape[0]
        positions = torch.arange(n)
        q = rotate(q.transpose(0, 1), positions, self.base)
        k = rotate(k.transpose(0, 1), positions, self.base).repeat_interleave(self.group, 0)
        v = v.transpose(0, 1).repeat_interleave(self.group, 0)
        logits = q @ k.transpose(1, 2) / self.dim**0.5
        logits = logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        return (logits.softmax(-1) @ v).transpose(0, 1)
