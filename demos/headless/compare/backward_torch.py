#!/usr/bin/env python3
"""Times PyTorch's autograd of a chunked Gated DeltaNet on the CPU.

Per head, with a chunk's rows of q (scaled), k and v, its betas b, and G the running sum of its log decays g:

    D_ij = exp(G_i - G_j) for j <= i, else 0        A = strictly lower part of (diag(b) K K^T) o D
    (I + A) [U | W] = [diag(b) V | diag(b exp G) K]
    N = U - W S        O = diag(exp G) Q S + ((Q K^T) o D) N        S <- exp(G_last) S + (diag(exp(G_last - G)) K)^T N

(Yang et al., "Gated Delta Networks", 2024). What does not depend on S is computed for all chunks at once.

Before it is timed the float32 run is checked: its output and gradients against the same in float64, and that against the
recurrence token by token, over fewer tokens. Prints one line for people and one of JSON.
"""

import argparse
import json
import statistics
import sys
import time

try:
    import torch
except ImportError:
    sys.exit("PyTorch is missing. For the CPU: pip install torch")

BOUND = {"float32": 1e-5, "float64": 1e-12}
NAMES = ["dq", "dk", "dv", "dg", "dbeta", "dh0"]


def chunked(q, k, v, g, beta, h0, chunk):
    """q, k [H, T, K], v [H, T, V], g, beta [H, T], h0 [H, K, V]; gives o [H, T, V] and the last state."""
    heads, tokens, dk = q.shape
    rows = lambda x: x.reshape(heads, tokens // chunk, chunk, *x.shape[2:])
    q, k, v, g, beta = rows(q * dk**-0.5), rows(k), rows(v), rows(g), rows(beta)
    total = g.cumsum(-1)
    lower = torch.ones(chunk, chunk, dtype=torch.bool).tril()
    # The exponent is masked before exp: above the diagonal it is positive and may overflow.
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~lower, -torch.inf).exp()
    a = (beta[..., None] * (k @ k.mT) * decay).tril(-1)
    right = torch.cat([beta[..., None] * v, (beta * total.exp())[..., None] * k], -1)
    # unitriangular: the ones on the diagonal of I + A are implied.
    u, w = torch.linalg.solve_triangular(a, right, upper=False, unitriangular=True).split([v.shape[-1], dk], -1)
    p = (q @ k.mT) * decay
    faded_q = total.exp()[..., None] * q
    last = total[..., -1:]
    faded_k = (last - total).exp()[..., None] * k
    state, o = h0, []
    for i in range(tokens // chunk):
        n = u[:, i] - w[:, i] @ state
        o.append(faded_q[:, i] @ state + p[:, i] @ n)
        state = last[:, i, :, None].exp() * state + faded_k[:, i].mT @ n
    return torch.cat(o, 1), state


def recurrence(q, k, v, g, beta, h0, _):
    """The same token by token."""
    state, o = h0, []
    for t in range(q.shape[1]):
        state = g[:, t, None, None].exp() * state
        d = beta[:, t, None] * (v[:, t] - (state.mT @ k[:, t, :, None])[..., 0])
        state = state + k[:, t, :, None] * d[:, None, :]
        o.append(q.shape[2] ** -0.5 * (state.mT @ q[:, t, :, None])[..., 0])
    return torch.stack(o, 1), state


def make(heads, tokens, dk, dv):
    """Inputs as a model has them, in float64: unit keys and queries, a quarter of the heads hardly forget."""
    draw = torch.Generator().manual_seed(7)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)
    uniform = lambda *shape: torch.rand(*shape, generator=draw, dtype=torch.float64)
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)
    g = -3.0 * uniform(heads, tokens) ** 2
    g[::4] = -1e-3 * uniform(heads, tokens)[::4]
    inputs = [unit(normal(heads, tokens, dk)), unit(normal(heads, tokens, dk)), normal(heads, tokens, dv)]
    inputs += [g, uniform(heads, tokens), 0.3 * normal(heads, dk, dv)]
    # What both precisions see must be the same.
    inputs = [x.float().double() for x in inputs]
    return inputs, [normal(heads, tokens, dv).float().double(), normal(heads, dk, dv).float().double()]


def leaves(inputs, dtype):
    return [x.to(dtype).requires_grad_() for x in inputs]


def once(form, inputs, cotangents, chunk):
    """Outputs and gradients, and the seconds that forward and backward took."""
    begin = time.perf_counter()
    out = form(*inputs, chunk)
    middle = time.perf_counter()
    grads = torch.autograd.grad(out, inputs, cotangents)
    return (*out, *grads), middle - begin, time.perf_counter() - middle


def compare(found, wanted, bound):
    """The largest relative L2 error; ends the program if it is above the bound or not a number."""
    worst = 0.0
    for name, x, y in zip(["o", "ht", *NAMES], found, wanted):
        error = ((x.double() - y).norm() / y.norm()).item()
        if not error <= bound:
            sys.exit(f"{name} is wrong: relative error {error:.1e}, at most {bound:.0e} expected")
        worst = max(worst, error)
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value, what in [
        ("tokens", 2048, "tokens of the one sequence, a multiple of the chunk"),
        ("heads", 16, "heads, of q and k as of v"),
        ("size", 128, "K = V"),
        ("chunk", 64, "tokens per chunk"),
        ("threads", 2, "threads of PyTorch"),
        ("runs", 9, "timed runs, after two that are not"),
    ]:
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{what} ({value})")
    args = parser.parse_args()
    for name in ["tokens", "heads", "size", "chunk", "threads", "runs"]:
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected 1 or more")
    if args.tokens % args.chunk:
        parser.error(f"--tokens {args.tokens}: expected a multiple of {args.chunk}, the chunk")
    torch.set_num_threads(args.threads)

    few = 3 * args.chunk
    inputs, cotangents = make(min(args.heads, 4), few, args.size, args.size)
    chunk64 = once(chunked, leaves(inputs, torch.float64), cotangents, args.chunk)[0]
    token64 = once(recurrence, leaves(inputs, torch.float64), cotangents, args.chunk)[0]
    compare(chunk64, token64, BOUND["float64"])

    inputs, cotangents = make(args.heads, args.tokens, args.size, args.size)
    wanted = once(chunked, leaves(inputs, torch.float64), cotangents, args.chunk)[0]
    inputs, cotangents = leaves(inputs, torch.float32), [x.float() for x in cotangents]
    error = compare(once(chunked, inputs, cotangents, args.chunk)[0], wanted, BOUND["float32"])
    del wanted

    times = [once(chunked, inputs, cotangents, args.chunk)[1:] for _ in range(args.runs + 2)][2:]
    forward, backward = (statistics.median(column) for column in zip(*times))
    both = statistics.median(map(sum, times))
    spread = lambda column: f"{min(column) * 1e3:.0f}..{max(column) * 1e3:.0f}"
    print(
        f"PyTorch {torch.__version__}, chunk {args.chunk}, float32, {args.threads} threads, heads "
        f"{args.heads}/{args.heads}, K = V = {args.size}, T = {args.tokens}: forward {forward * 1e3:.0f} ms, backward "
        f"{backward * 1e3:.0f} ms ({spread([b for _, b in times])}), both {both * 1e3:.0f} ms; {args.runs} runs, "
        f"relative error {error:.1e}"
    )
    print(
        json.dumps(
            {
                "bench": "backward_torch",
                "torch": torch.__version__,
                "tokens": args.tokens,
                "hk": args.heads,
                "hv": args.heads,
                "k": args.size,
                "v": args.size,
                "chunk": args.chunk,
                "threads": args.threads,
                "runs": args.runs,
                "forward_s": forward,
                "backward_s": backward,
                "both_s": both,
                "relative_error": error,
            }
        )
    )


if __name__ == "__main__":
    main()
