#!/usr/bin/env python3
"""Times a whole model of the Qwen3.5 family with random weights in Hugging Face transformers, with FLA's kernels.

The shape is that of `gatedelta-headless bench --shape 0.8b`: reading a prompt at once, then an answer id by id, one sequence,
eager mode as `generate` has it. Before anything is timed a short prompt is read at once and again id by id: the logits must agree.

That FLA's kernels are what runs is counted, not assumed: its functions are wrapped before transformers picks them up.
Prints one JSON line; what fails is in it.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time
import traceback

os.environ.setdefault("FLA_FLASH_QLA", "0")

# hidden, ffn, layers, heads, kv heads, value heads, tied: the released text models.
SHAPES = {
    "0.8b": (1024, 3584, 24, 8, 2, 16, True),
    "2b": (2048, 6144, 24, 8, 2, 16, True),
    "4b": (2560, 9216, 32, 16, 4, 32, True),
    "9b": (4096, 12288, 32, 16, 4, 32, False),
}
# The largest relative difference of logits between the two ways to read a prompt: what is wrong is off by all of it, what
# bf16 activations lose over 24 layers of random weights is not.
BOUND = 0.2


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="0.8b", help="size (0.8b)")
    add("--vocab", type=int, default=248_320, help="ids of the vocabulary (248320)")
    add("--layers", type=int, help="cut to so many layers, a multiple of 4")
    add("--prompt", type=int, default=8192, help="ids of the prompt (8192)")
    add("--answer", type=int, default=64, help="ids of the answer that are timed (64)")
    add("--runs", type=int, default=7, help="timed prompts (7)")
    add("--device", default="cuda", help="cuda, or cpu to try the script")
    add("--out", help="file to append the result to")
    args = parser.parse_args()
    for name in ["vocab", "prompt", "answer", "runs"]:
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected 1 or more")
    return args


def count_fla():
    """Wraps FLA's two functions so that their calls are counted; empty if it is not there."""
    calls = {}
    try:
        import fla.ops.gated_delta_rule as ops
    except ImportError:
        return calls
    for name in ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"]:
        calls[name] = 0

        def counted(*args, inner=getattr(ops, name), name=name, **kwargs):
            calls[name] += 1
            return inner(*args, **kwargs)

        # transformers asks the signature which arguments it may pass.
        setattr(ops, name, functools.wraps(getattr(ops, name))(counted))
    return calls


def run(args):
    calls = count_fla()
    import torch
    import transformers
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    hidden, ffn, layers, heads, kv_heads, hv, tied = SHAPES[args.shape]
    config = Qwen3_5TextConfig(
        vocab_size=args.vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=args.layers or layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=hv,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        tie_word_embeddings=tied,
        max_position_embeddings=262_144,
    )
    torch.manual_seed(7)
    with torch.device(args.device):
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen3_5ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    # The configuration's own start is far too small for a model of random numbers: a product keeps the size of its input.
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.normal_(0, p.shape[1] ** -0.5)
    model.eval()
    wait = torch.cuda.synchronize if args.device == "cuda" else (lambda: None)
    ids = torch.randint(args.vocab, (1, args.prompt), device=args.device)

    @torch.inference_mode()
    def read(ids, cache=None):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1], out.past_key_values

    few = ids[:, : min(24, args.prompt)]
    at_once, _ = read(few)
    cache = None
    for t in range(few.shape[1]):
        one_by_one, cache = read(few[:, t : t + 1], cache)
    at_once, one_by_one = at_once.double(), one_by_one.double()
    difference = ((at_once - one_by_one).norm() / at_once.norm()).item()
    if not difference <= BOUND:
        raise RuntimeError(f"logits read at once and id by id differ by {difference:.1e}, at most {BOUND:.0e} expected")

    def timed(work):
        wait()
        begin = time.perf_counter()
        result = work()
        wait()
        return time.perf_counter() - begin, result

    prefill, cache = [], None
    for i in range(args.runs + 2):
        del cache
        seconds, (logits, cache) = timed(lambda: read(ids))
        prefill += [seconds] if i >= 2 else []
    decode = []
    for i in range(args.answer + 4):
        token = logits.argmax().view(1, 1)
        seconds, (logits, cache) = timed(lambda: read(token, cache))
        decode += [seconds] if i >= 4 else []
    p, d = statistics.median(prefill), statistics.median(decode)
    weights = sum(x.numel() * x.element_size() for x in model.parameters())
    try:
        import causal_conv1d

        conv = causal_conv1d.__version__
    except ImportError:
        conv = None
    return {
        "model": f"{args.shape}, random weights", "vocab": args.vocab, "weight_bytes": weights,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "torch": torch.__version__, "transformers": transformers.__version__, "causal_conv1d": conv,
        "fla_calls": calls or "FLA is not installed: transformers ran its own formula in PyTorch",
        "prompt_tokens": args.prompt, "prefill_tokens_per_s": args.prompt / p,
        "prefill_median_s": p, "prefill_min_s": min(prefill), "prefill_max_s": max(prefill), "prefill_runs": len(prefill),
        "decode_tokens_per_s": 1 / d,
        "decode_median_s": d, "decode_min_s": min(decode), "decode_max_s": max(decode), "decode_runs": len(decode),
        "relative_difference": difference,
    }  # fmt: skip


def main():
    args = arguments()
    line = {"bench": "model_transformers"}
    try:
        line |= run(args)
    except Exception as error:
        line |= {"model": args.shape, "failed": f"{type(error).__name__}: {error}"[:500], "trace": traceback.format_exc()[-1500:]}
    text = json.dumps(line)
    print(text)
    if args.out:
        with open(args.out, "a") as file:
            file.write(text + "\n")
    sys.exit("failed" in line)


if __name__ == "__main__":
    main()
