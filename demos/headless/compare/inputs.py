"""Inputs of the comparison, the same to the bit on every side: the Rust program makes them by the same rules.

Every number is a function of its tensor and its place in it, so that a shorter batch of the same heads is a prefix of a longer
one, and no side has to hold what another made.

    mix(z)       z ^= z >> 30;  z *= 0xbf58476d1ce4e5b9;  z ^= z >> 27;  z *= 0x94d049bb133111eb;  z ^= z >> 31
    word(t, i)   mix(mix(16 seed + t) + (i + 1) 0x9e3779b97f4a7c15)                               (SplitMix64, modulo 2^64)
    count(t, i)  the sum of the four 16-bit parts of word(t, i), less 131070                      (an integer, mean 0)
    normal(t, i) count / 37837, in float64: nearly normal, variance 1, never above 3.47

| tensor | t | shape | values |
| --- | --- | --- | --- |
| q, k | 0, 1 | [T, Hk, K] bf16 | the row's counts over the root of the sum of their squares: a unit vector |
| v | 2 | [T, Hv, V] bf16 | normal |
| g | 3 | [T, Hv] f32 | by the row's gates, from x = normal, see rows.json |
| beta | 4 | [T, Hv] f32 | sigmoid(normal) |
| h0 | 5 | [N, Hv, K, V] f32 | normal |
| do | 6 | [T, Hv, V] bf16 | normal |
| dht | 7 | [N, Hv, K, V] f32 | normal / 8 |
| a, b | 8, 9 | [T, Hv] bf16 | normal; only for gates "raw", whose g and beta come from them |

All arithmetic is float64 and rounded once to f32 and, for bf16, from there again. exp and log may differ in their last bit from
machine to machine, which after rounding to f32 is a rare last bit of g or beta.
"""

import torch

GOLDEN = 0x9E3779B97F4A7C15
TENSORS = {"q": 0, "k": 1, "v": 2, "g": 3, "beta": 4, "h0": 5, "do": 6, "dht": 7, "a": 8, "b": 9}
# Numbers that are made at once: bounds the memory that is taken on the way.
SLICE = 1 << 25


def signed(x):
    """The int64 with the bits of an unsigned one."""
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x


def shifted(z, bits):
    """z >> bits of unsigned words."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def mix(z):
    z = (z ^ shifted(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ shifted(z, 27)) * signed(0x94D049BB133111EB)
    return z ^ shifted(z, 31)


def counts(tensor, seed, start, end, device):
    """count(t, i) of start <= i < end, int64."""
    key = int(mix(torch.tensor(signed(16 * seed + TENSORS[tensor]), dtype=torch.int64)))
    z = torch.arange(start + 1, end + 1, dtype=torch.int64, device=device)
    z = mix(z * signed(GOLDEN) + key)
    return (z & 0xFFFF) + (shifted(z, 16) & 0xFFFF) + (shifted(z, 32) & 0xFFFF) + shifted(z, 48) - 131070


def fill(tensor, seed, shape, dtype, device, form):
    """A tensor of the shape, its rows of the last dimension made from their counts."""
    out = torch.empty(shape, dtype=dtype, device=device)
    flat = out.view(-1, shape[-1])
    step = max(1, SLICE // shape[-1])
    for row in range(0, flat.shape[0], step):
        end = min(row + step, flat.shape[0])
        n = counts(tensor, seed, row * shape[-1], end * shape[-1], device).view(-1, shape[-1])
        flat[row:end] = form(n).float().to(dtype)
    return out


def normal(n):
    return n.double() / 37837.0


def unit(n):
    return n.double() / (n * n).sum(-1, keepdim=True).double().sqrt()


def softplus(x):
    return torch.clamp(x, min=0) + torch.log1p(torch.exp(-x.abs()))


def gates(kind, seed, tokens, hv, device):
    """g and beta, f32, and for "raw" the bf16 numbers a and b they come from."""
    shape = (tokens, hv)
    if kind == "raw":
        a, b = (fill(name, seed, shape, torch.bfloat16, device, normal) for name in "ab")
        return (-softplus(a.double())).float(), (1 / (1 + torch.exp(-b.double()))).float(), a, b
    head = torch.arange(hv, device=device)
    if kind == "table":
        open_head = head % 4 != 3
        form = lambda n: torch.where(open_head, -softplus(-normal(n)) / 16, 0.0)
    elif kind == "spread":
        rate = 16.0 * head.double() / max(hv - 1, 1)
        form = lambda n: -rate * softplus(normal(n) / 2 + 1)
    else:
        raise ValueError(f"gates {kind!r}: expected table, spread or raw")
    g = fill("g", seed, shape, torch.float32, device, form)
    beta = fill("beta", seed, shape, torch.float32, device, lambda n: 1 / (1 + torch.exp(-normal(n))))
    return g, beta, None, None


class Inputs:
    """The inputs of one row; those of the heads' longest row are kept and cut."""

    def __init__(self, row, head, device, kept=None):
        hk, hv, k, v, seed = row["hk"], row["hv"], head["k"], head["v"], head["seed"]
        tokens, sequences = sum(row["seqlens"]), len(row["seqlens"])
        backward = row["kind"] == "backward"
        kept = {} if kept is None else kept
        if kept.get("heads") != (hk, hv):
            kept.clear()
            kept["heads"] = (hk, hv)

        def rows(name, count, rest, dtype, form):
            """The first `count` of a tensor of which more may have been made before."""
            if name not in kept or kept[name].shape[0] < count:
                kept.pop(name, None)
                kept[name] = fill(name, seed, (count, *rest), dtype, device, form)
            return kept[name][:count]

        self.q = rows("q", tokens, (hk, k), torch.bfloat16, unit)
        self.k = rows("k", tokens, (hk, k), torch.bfloat16, unit)
        self.v = rows("v", tokens, (hv, v), torch.bfloat16, normal)
        self.h0 = rows("h0", sequences, (hv, k, v), torch.float32, normal)
        self.g, self.beta, self.a, self.b = gates(row["gates"], seed, tokens, hv, device)
        self.do = rows("do", tokens, (hv, v), torch.bfloat16, normal) if backward else None
        self.dht = rows("dht", sequences, (hv, k, v), torch.float32, lambda n: normal(n) / 8) if backward else None
        self.seqlens = row["seqlens"]
        ends = torch.tensor([0, *self.seqlens]).cumsum(0)
        self.cu_cpu = ends
        self.cu = ends.to(device)
        self.scale = k**-0.5

    def checksum(self):
        """Tells whether another side has the same q, k and v: sums of their bits, in hexadecimal."""
        bits = lambda x: int(x.contiguous().view(torch.int16).long().sum())
        return f"{(bits(self.q) + 3 * bits(self.k) + 5 * bits(self.v)) & ((1 << 64) - 1):016x}"
