"""A small transformer whose attention is to be chosen."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, attention, width=64, heads=4):
        super().__init__()
        self.attention, self.heads = attention, heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads).unbind(2)
        x = x + self.out(self.attention(q, k, v).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


def transformer(attention, device, dtype, layers=2):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(attention) for _ in range(layers))).to(device=device, dtype=dtype).eval()
