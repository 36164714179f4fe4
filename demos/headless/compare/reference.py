"""What the answers are compared with: Gated DeltaNet in float64, by chunks, forward and backward.

Per value head, with a chunk's rows of q (scaled), k and v, its betas b, and G the running sum of its log decays g:

    D_ij = exp(G_i - G_j) for j <= i, else 0        A = strictly lower part of (diag(b) K K^T) o D
    (I + A) [U | W] = [diag(b) V | diag(b exp G) K]
    N = U - W S        O = diag(exp G) Q S + ((Q K^T) o D) N        S <- exp(G_last) S + (diag(exp(G_last - G)) K)^T N

(Yang et al., "Gated Delta Networks", 2024). What does not depend on S is computed for all chunks at once; sequences of one
length and heads go together as a batch, as many as `LIMIT` allows. The backward pass is torch's autograd through that.

Answers are kept as samples, the same for every side: rows of the tokens of `sampled`, and every 32nd row of states.
"""

import torch

CHUNK = 64
# Tokens times heads of one batch: about 12 GB with gradients.
LIMIT = 16 * 32768
# Tokens of a row of which the outputs are kept, beside the last one of each sequence.
SAMPLES = 24
STATE_STEP = 32


def chunked(q, k, v, g, beta, h0):
    """q (scaled), k [H, T, K], v [H, T, V], g, beta [H, T], h0 [H, K, V], all of one type; gives o [H, T, V] and the last state."""
    heads, tokens, dk = q.shape
    pad = -tokens % CHUNK
    if pad:
        # Tokens that change nothing: k, beta and g are zero.
        q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
        g, beta = (torch.nn.functional.pad(x, (0, pad)) for x in (g, beta))
    rows = lambda x: x.reshape(heads, -1, CHUNK, *x.shape[2:])
    q, k, v, g, beta = rows(q), rows(k), rows(v), rows(g), rows(beta)
    total = g.cumsum(-1)
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    # The exponent is masked before exp: above the diagonal it is positive and may overflow.
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~lower, -torch.inf).exp()
    a = (beta[..., None] * (k @ k.mT) * decay).tril(-1)
    right = torch.cat([beta[..., None] * v, (beta * total.exp())[..., None] * k], -1)
    # unitriangular: the ones on the diagonal of I + A are implied.
    u, w = torch.linalg.solve_triangular(a, right, upper=False, unitriangular=True).split([v.shape[-1], dk], -1)
    del a, right
    p = (q @ k.mT) * decay
    del decay
    faded_q = total.exp()[..., None] * q
    last = total[..., -1:]
    faded_k = (last - total).exp()[..., None] * k
    state, n, into = h0, [], []
    # unbind, and not an index each: the gradient of an index is as large as all chunks together.
    parts = (x.unbind(1) for x in (u, w, faded_k.mT, last[..., None].exp()))
    for u_i, w_i, k_i, fade in zip(*parts):
        into.append(state)
        n.append(torch.baddbmm(u_i, w_i, state, alpha=-1))
        state = torch.baddbmm(fade * state, k_i, n[-1])
    o = faded_q @ torch.stack(into, 1) + p @ torch.stack(n, 1)
    return o.reshape(heads, -1, v.shape[-1])[:, :tokens], state


def recurrence(q, k, v, g, beta, h0):
    """The same token by token."""
    state, o = h0, []
    for t in range(q.shape[1]):
        state = g[:, t, None, None].exp() * state
        d = beta[:, t, None] * (v[:, t] - (state.mT @ k[:, t, :, None])[..., 0])
        state = state + k[:, t, :, None] * d[:, None, :]
        o.append((state.mT @ q[:, t, :, None])[..., 0])
    return torch.stack(o, 1), state


def batches(seqlens, hk, group):
    """Sequences of one length times key heads: as many as go together; yields (length, [(sequence, first token)], heads)."""
    starts, at = {}, 0
    for n, length in enumerate(seqlens):
        starts.setdefault(length, []).append((n, at))
        at += length
    for length, all_of in starts.items():
        if length == 0:
            continue
        together = max(1, LIMIT // (length * group))
        keys = min(hk, together)
        each = max(1, together // keys)
        for i in range(0, len(all_of), each):
            for key in range(0, hk, keys):
                yield length, all_of[i : i + each], range(key, min(key + keys, hk))


def answers(inputs, form=chunked, dtype=torch.float64):
    """o [T, Hv, V], ht [N, Hv, K, V], and with a gradient of o and ht those of the inputs: computed in `dtype`, given as f32."""
    q, k, v = inputs.q, inputs.k, inputs.v
    (tokens, hk, dk), (hv, dv) = q.shape, v.shape[1:]
    group, device = hv // hk, q.device
    empty = lambda *shape: torch.zeros(shape, dtype=torch.float32, device=device)
    out = {"o": empty(tokens, hv, dv), "ht": inputs.h0.clone()}
    back = inputs.do is not None
    if back:
        out |= {"dq": empty(tokens, hk, dk), "dk": empty(tokens, hk, dk), "dv": empty(tokens, hv, dv)}
        out |= {"dg": empty(tokens, hv), "dbeta": empty(tokens, hv), "dh0": inputs.dht.clone()}
    for length, sequences, keys in batches(inputs.seqlens, hk, group):
        values = slice(keys.start * group, keys.stop * group)
        own_keys = slice(keys.start, keys.stop)
        spans = [slice(at, at + length) for _, at in sequences]
        which = [n for n, _ in sequences]

        def take(x, heads):
            """[sequences * heads, length, ...]."""
            x = torch.stack([x[span][:, heads] for span in spans])
            return x.transpose(1, 2).reshape(-1, length, *x.shape[3:]).to(dtype)

        def put(x, found, heads):
            found = found.reshape(len(spans), -1, length, *found.shape[2:]).transpose(1, 2)
            for span, one in zip(spans, found):
                x[span, heads] = one.float()

        own = [take(q, own_keys), take(k, own_keys), take(v, values), take(inputs.g, values), take(inputs.beta, values)]
        own.append(inputs.h0[which][:, values].reshape(-1, dk, dv).to(dtype))
        with torch.set_grad_enabled(back):
            for x in own if back else []:
                x.requires_grad_()
            spread = [x.repeat_interleave(group, 0) for x in own[:2]]
            o, ht = form(spread[0] * inputs.scale, spread[1], *own[2:])
        put(out["o"], o.detach(), values)
        out["ht"][which, values] = ht.detach().reshape(len(spans), -1, dk, dv).float()
        if back:
            dht = inputs.dht[which][:, values].reshape(-1, dk, dv).to(dtype)
            grads = torch.autograd.grad([o, ht], own, [take(inputs.do, values), dht])
            for name, found, heads in zip(["dq", "dk", "dv", "dg", "dbeta"], grads, [own_keys, own_keys, *[values] * 3]):
                put(out[name], found, heads)
            out["dh0"][which, values] = grads[5].reshape(len(spans), -1, dk, dv).float()
    return out


def sampled(seqlens):
    """The tokens whose outputs are kept: spread evenly, and the last of each sequence."""
    tokens, ends, at = sum(seqlens), [], 0
    for length in seqlens:
        at += length
        ends.append(at - 1)
    count = min(SAMPLES, tokens)
    even = [i * (tokens - 1) // max(count - 1, 1) for i in range(count)]
    return sorted({*even, *(t for t in ends if t >= 0)})


def sample(found, seqlens):
    """Of full tensors, what is kept and compared."""
    picked = torch.tensor(sampled(seqlens), device=next(iter(found.values())).device)
    states = lambda x: x[:, :, ::STATE_STEP]
    return {name: (states(x) if name in ("ht", "dh0") else x[picked]).float().contiguous() for name, x in found.items()}


def error(found, wanted):
    """Relative L2 error; infinite where the norm of the difference is no number."""
    found, wanted = found.double(), wanted.double()
    off, norm = (found - wanted).norm(), wanted.norm()
    value = (off / norm if norm > 0 else off).item()
    return value if value == value else float("inf")


def self_check(device):
    """The largest relative difference between chunks and recurrence, outputs and gradients, on a small ragged batch."""
    import inputs as made

    row = {"hk": 2, "hv": 4, "seqlens": [70, 1, 129], "gates": "spread", "kind": "backward"}
    small = made.Inputs(row, {"k": 128, "v": 128, "seed": 3}, device)
    found, wanted = answers(small), answers(small, recurrence)
    return max(error(found[name], wanted[name]) for name in wanted)
