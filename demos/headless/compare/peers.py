"""How each of the other libraries is called: layouts, gates and what it does not have.

A peer makes of a row's inputs a `Call`: `run` is what is timed and gives raw tensors, `named` shows them in our layouts
(tokens first, states [N, Hv, K, V]) without moving a number, `reset` undoes what a run does to its own inputs.

| peer | q, k, v | g | states | q/k norm |
| --- | --- | --- | --- | --- |
| fla (`fla-core`) | [1, T, H, D] | log | [N, Hv, K, V] f32 | off; inputs are unit already |
| flash_qla | [1, T, H, D] | log | [N, Hv, K, V] f32 | outside of the function called |
| flashinfer | [T, H, D] | linear, exp(g), as documented | [N, Hv, V, K] f32 | off |

FLA takes FlashQLA in its own place where that is installed: `FLA_FLASH_QLA=0` keeps them apart. On Hopper with Triton below 3.7.1
its backward pass needs `tilelang`. The backward passes of both take what their forward pass saved (g summed by chunks, A, and of
FlashQLA what it cut) and compute the states again; that forward pass is not timed.
"""

import os
from importlib import metadata

os.environ.setdefault("FLA_FLASH_QLA", "0")

import torch


class Unsupported(Exception):
    """A library does not have what a row asks for."""


class Call:
    def __init__(self, run, named, reset=None):
        self.run, self.named = run, named
        # With one, outputs are inputs too: they cannot be filled with NaN before a run.
        self.in_place, self.reset = reset is not None, reset or (lambda: None)


def versions(*packages):
    found = {"torch": torch.__version__}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def batch(x):
    """[T, ...] as [1, T, ...]."""
    return x.unsqueeze(0)


class Chunked:
    """Not a library: the formula in PyTorch in float32, for machines without a GPU and as the plainest thing to beat."""

    name = "chunked"

    def versions(self):
        return versions()

    def prepare(self, inputs, kind):
        import reference

        if kind == "decode":
            raise Unsupported("the chunked formula has no decode")
        return Call(lambda: reference.answers(inputs, dtype=torch.float32), lambda out: out)


class Fla:
    name = "fla"

    def versions(self):
        return versions("flash-linear-attention", "fla-core", "triton", "tilelang")

    def prepare(self, inputs, kind):
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

        if os.environ["FLA_FLASH_QLA"] != "0":
            raise Unsupported("FLA_FLASH_QLA is not 0: FLA would time FlashQLA")
        q, k, v, g, beta = (batch(x) for x in (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta))
        h0, cu, scale = inputs.h0, inputs.cu, inputs.scale
        states = {"initial_state": h0, "output_final_state": True}
        if kind == "decode":
            # One token each: sequences are the batch.
            one = lambda x: x[0].unsqueeze(1)
            run = lambda: fused_recurrent_gated_delta_rule(
                q=one(q), k=one(k), v=one(v), g=one(g), beta=one(beta), scale=scale, **states
            )
            return Call(run, lambda out: {"o": out[0][:, 0], "ht": out[1]})
        if kind == "forward":

            def run():
                with torch.no_grad():
                    return chunk_gated_delta_rule(
                        q=q, k=k, v=v, g=g, beta=beta, scale=scale, cu_seqlens=cu, cu_seqlens_cpu=inputs.cu_cpu, **states
                    )

            return Call(run, lambda out: {"o": out[0][0], "ht": out[1]})
        from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_bwd, chunk_gated_delta_rule_fwd
        from fla.ops.utils.index import prepare_chunk_indices

        indices = prepare_chunk_indices(cu, 64, cu_seqlens_cpu=inputs.cu_cpu)
        common = {"scale": scale, "cu_seqlens": cu, "chunk_indices": indices}
        with torch.no_grad():
            summed, _, a, *_ = chunk_gated_delta_rule_fwd(q=q, k=k, v=v, g=g, beta=beta, **states, **common)
        do, dht = batch(inputs.do), inputs.dht
        run = lambda: chunk_gated_delta_rule_bwd(
            q=q, k=k, v=v, g=summed, beta=beta, A=a, initial_state=h0, do=do, dht=dht, **common
        )
        return Call(run, gradients)


def gradients(out):
    """Both libraries give dq, dk, dv, dbeta, dg, dh0 in this order, tokens behind a batch of one."""
    dq, dk, dv, dbeta, dg, dh0 = out[:6]
    return {"dq": dq[0], "dk": dk[0], "dv": dv[0], "dbeta": dbeta[0], "dg": dg[0], "dh0": dh0}


class FlashQla:
    name = "flash_qla"

    def versions(self):
        return versions("flash-qla", "tilelang", "apache-tvm-ffi")

    def prepare(self, inputs, kind):
        from flash_qla import chunk_gated_delta_rule_bwd, chunk_gated_delta_rule_fwd

        if kind == "decode":
            raise Unsupported("FlashQLA has no decode")
        q, k, v, g, beta = (batch(x) for x in (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta))
        common = {"scale": inputs.scale, "initial_state": inputs.h0, "cu_seqlens": inputs.cu.int(), "auto_cp": True}
        if kind == "forward":
            run = lambda: chunk_gated_delta_rule_fwd(q, k, v, g, beta, output_final_state=True, output_h=False, **common)
            return Call(run, lambda out: {"o": out[2][0], "ht": out[4]})
        summed, a, _, _, _, cuts = chunk_gated_delta_rule_fwd(
            q, k, v, g, beta, output_final_state=True, output_h=False, enable_fwd_cp_cache=True, is_train=True, **common
        )
        do, dht = batch(inputs.do), inputs.dht
        run = lambda: chunk_gated_delta_rule_bwd(q, k, v, summed, beta, a, do, dht, cp_cache=cuts, **common)
        return Call(run, gradients)


class FlashInfer:
    name = "flashinfer"

    def versions(self):
        return versions("flashinfer-python", "nvidia-cutlass-dsl", "apache-tvm-ffi")

    def prepare(self, inputs, kind):
        turned = lambda x: x.transpose(-1, -2)
        if kind == "backward":
            raise Unsupported("FlashInfer's gated delta rule has no backward pass on this architecture")
        if kind == "decode":
            from flashinfer.gdn_decode import gated_delta_rule_decode_pretranspose

            # Takes what the gates are made from: g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b), states in place.
            one = lambda x: x.unsqueeze(1)
            zeros = torch.zeros(inputs.v.shape[1], dtype=torch.float32, device=inputs.q.device)
            start = turned(inputs.h0).contiguous()
            state, o = start.clone(), torch.empty_like(one(inputs.v))
            run = lambda: gated_delta_rule_decode_pretranspose(
                q=one(inputs.q),
                k=one(inputs.k),
                v=one(inputs.v),
                state=state,
                A_log=zeros,
                a=one(inputs.a),
                dt_bias=zeros,
                b=one(inputs.b),
                scale=inputs.scale,
                output=o,
                use_qk_l2norm=False,
            )
            named = lambda out: {"o": out[0][:, 0], "ht": turned(out[1])}
            return Call(run, named, lambda: state.copy_(start))
        from flashinfer.gdn_prefill import chunk_gated_delta_rule

        q, k, v = inputs.q.contiguous(), inputs.k.contiguous(), inputs.v.contiguous()
        alpha, beta, h0 = inputs.g.exp(), inputs.beta.contiguous(), turned(inputs.h0).contiguous()
        o, ht = torch.empty_like(v), torch.empty_like(h0)
        # int32 offsets on the device, as its own benchmark has them; the longest sequence is known to every caller.
        cu, longest = inputs.cu.int(), max(inputs.seqlens)
        run = lambda: chunk_gated_delta_rule(
            q=q,
            k=k,
            v=v,
            g=alpha,
            beta=beta,
            scale=inputs.scale,
            initial_state=h0,
            output_final_state=True,
            cu_seqlens=cu,
            output=o,
            output_state=ht,
            max_seqlen=longest,
        )
        return Call(run, lambda out: {"o": out[0], "ht": turned(out[1])})


PEERS = {peer.name: peer for peer in (Fla(), FlashQla(), FlashInfer(), Chunked())}
