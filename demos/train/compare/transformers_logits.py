#!/usr/bin/env python3
"""Compares logits with those of Hugging Face transformers, on the CPU in float32.

    pip install torch transformers
    gatedelta-train logits --model DIR --text FILE --out logits.safetensors
    python demos/train/compare/transformers_logits.py DIR logits.safetensors ...

DIR is a checkpoint as `gatedelta-train agent` exports it. For every file: the ids must be those of transformers' own tokenizer,
and all logits together within a relative L2 error of --bound. Exits with 1 if one is not.
"""

import argparse
import sys
from pathlib import Path

try:
    import torch
    import transformers
    from safetensors import safe_open
except ImportError as missing:
    sys.exit(f"{missing.name} is missing: pip install torch transformers")


def compare(model, tokenizer, path, bound):
    """Prints one line; gives whether all is well."""
    with safe_open(path, "pt") as file:
        text, ids, ours = file.metadata()["text"], file.get_tensor("ids").long(), file.get_tensor("logits")
    theirs_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    same_ids = theirs_ids == ids.tolist()
    with torch.no_grad():
        theirs = model(ids[None]).logits[0]  # [T, vocab]
    whole = ((ours - theirs).norm() / theirs.norm()).item()
    worst = ((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max().item()
    top = (ours.argmax(1) == theirs.argmax(1)).float().mean().item()
    print(
        f"{path}: {len(ids)} tokens, {'the same' if same_ids else 'OTHER'} ids; relative L2 {whole:.2e}, "
        f"worst token {worst:.2e}; the same best token in {100 * top:.2f} %"
    )
    # A comparison with NaN is false.
    return same_ids and whole <= bound


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the checkpoint's directory")
    parser.add_argument("logits", type=Path, nargs="+", help="files of gatedelta-train logits")
    parser.add_argument("--bound", type=float, default=1e-5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            sys.exit(f"{kind}: {report[kind]}")
    count = sum(x.numel() for x in model.parameters())
    print(f"{type(model).__name__}, {count} parameters; transformers {transformers.__version__}, torch {torch.__version__}")
    if not all([compare(model.eval(), tokenizer, path, args.bound) for path in args.logits]):
        sys.exit(1)


if __name__ == "__main__":
    main()
