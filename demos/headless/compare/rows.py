#!/usr/bin/env python3
"""Writes rows.json: what both sides of the comparison run, in the order in which they run it.

Forward and backward are FlashQLA's own table: the head configurations and length lists of its benchmark
(benchmark/bench_gated_delta_rule.py at c18a486), 9 x 19 and 4 x 8. Its random lists are written out here. Head sizes are
128 x 128. `published_ms` is what that project measured on an H200 (benchmark/benchmark_results_H200.txt at the same commit:
FlashInfer 0.6.13 with gates it does not document, FLA 0.5.1); nothing is computed from it, it stands beside what is measured.

Decode has no table of theirs: one token for each of so many sequences, heads of the released models.

The order is that of importance, so that a run that is cut off has what the verdicts need: the long single sequences and full
batches first, then the rest of the table, the gates of training last.
"""

import argparse
import json
import pathlib
import re
import sys

FORWARD_HEADS = [
    ("397B/122B TP8", 2, 8),
    ("397B/122B TP4", 4, 16),
    ("397B/122B TP2", 8, 32),
    ("397B/122B TP1", 16, 64),
    ("35B/9B/4B TP1", 16, 32),
    ("27B TP2", 8, 24),
    ("27B TP1", 16, 48),
    ("2B/0.8B TP1", 16, 16),
    ("Sym h32", 32, 32),
]
FORWARD_LENGTHS = {
    "1x32768": [32768],
    "1x16384": [16384],
    "1x8192": [8192],
    "1x4096": [4096],
    "1x2048": [2048],
    "28672+4096": [28672, 4096],
    "24576+8192": [24576, 8192],
    "16384+16384": [16384, 16384],
    "8192+24576": [8192, 24576],
    "4096+28672": [4096, 28672],
    "12288+4096": [12288, 4096],
    "6144+2048": [6144, 2048],
    "4096+4096": [4096, 4096],
    "2048+6144": [2048, 6144],
    "1024+7168": [1024, 7168],
    "8192x4": [8192] * 4,
    "4096x8": [4096] * 8,
    "2048x4": [2048] * 4,
    "1024x8": [1024] * 8,
}
BACKWARD_HEADS = [("hk16_hv32", 16, 32), ("hk8_hv16", 8, 16), ("hk4_hv8", 4, 8), ("hk2_hv4", 2, 4)]
BACKWARD_LENGTHS = {
    "8k_1seq": [8192],
    "8k_2seq": [7053, 1139],
    "8k_4seq": [5809, 1244, 406, 733],
    "8k_8seq": [161, 1928, 3157, 563, 1244, 229, 177, 733],
    "32k_1seq": [32768],
    "32k_2seq": [7212, 25556],
    "32k_4seq": [7212, 7072, 13725, 4759],
    "32k_8seq": [3274, 1029, 2909, 5061, 2011, 3793, 9932, 4759],
}
DECODE_HEADS = [("35B/9B/4B TP1", 16, 32), ("2B/0.8B TP1", 16, 16), ("397B/122B TP1", 16, 64)]
DECODE_BATCHES = [1, 32, 128]

# Heads by how much hangs on them: the verdicts name 16/16, 16/32 and 16/64.
HEADS_FIRST = [(16, 32), (16, 64), (16, 16), (2, 8), (32, 32), (16, 48), (4, 16), (8, 32), (8, 24)]
# Lengths in three rounds: what the verdicts name, one of every kind, the rest.
LENGTHS_FIRST = [
    ["1x32768", "8192x4", "4096x8"],
    ["1x8192", "4096+28672", "1024x8", "1x2048", "16384+16384", "2048x4"],
]
BACKWARD_FIRST = [["32k_1seq", "8k_1seq", "32k_8seq", "8k_8seq"]]

MS = r"([\d.]+)ms"


def published(path):
    """Milliseconds by (kind, hk, hv, lengths' name), from FlashQLA's file of results."""
    found = {}
    for line in path.read_text().splitlines():
        forward = re.match(rf"(.{{16}}) (\S+) +(\d+) +(\d+) +{MS} +{MS} +{MS} ", line)
        backward = re.match(rf"(hk\S+) +(\S+) +(\d+) +(\d+) +\d+ +{MS} +{MS} ", line)
        if forward:
            _, lengths, hk, hv, qla, fi, fla = forward.groups()
            times = {"flash_qla": float(qla), "flashinfer": float(fi), "fla": float(fla)}
            found["forward", int(hk), int(hv), lengths] = times
        elif backward:
            _, lengths, hk, hv, qla, fla = backward.groups()
            found["backward", int(hk), int(hv), lengths] = {"flash_qla": float(qla), "fla": float(fla)}
    return found


def make(times):
    """All rows, the most important first."""

    def row(kind, label, hk, hv, name, lengths, gates):
        made = {
            "id": f"{kind}/{hk}-{hv}/{name}" + ("" if gates in ("table", "raw") else f"/{gates}"),
            "kind": kind,
            "model": label,
            "hk": hk,
            "hv": hv,
            "lengths": name,
            "seqlens": lengths,
            "gates": gates,
        }
        known = times.get((kind, hk, hv, name))
        if known and gates == "table":
            made["published_ms"] = known
        return made

    def rounds(kind, heads, lengths, first):
        """Rows in rounds over the heads; in a round, rows of the same heads follow each other."""
        left = [name for name in lengths if not any(name in some for some in first)]
        for names in [*first, left]:
            yield [
                row(kind, label, hk, hv, name, lengths[name], "table")
                for label, hk, hv in sorted(heads, key=lambda h: HEADS_FIRST.index(h[1:]) if h[1:] in HEADS_FIRST else 99)
                for name in names
            ]

    forward = list(rounds("forward", FORWARD_HEADS, FORWARD_LENGTHS, LENGTHS_FIRST))
    backward = list(rounds("backward", BACKWARD_HEADS, BACKWARD_LENGTHS, BACKWARD_FIRST))
    decode = [
        row("decode", label, hk, hv, f"batch {n}", [1] * n, "raw") for label, hk, hv in DECODE_HEADS for n in DECODE_BATCHES
    ]
    # Gates that forget between nothing and everything: how much the times depend on them.
    spread = [
        row("forward", label, hk, hv, name, FORWARD_LENGTHS[name], "spread")
        for label, hk, hv in FORWARD_HEADS
        if (hk, hv) in HEADS_FIRST[:3]
        for name in ["1x32768", "8192x4"]
    ]
    return [*forward[0], *decode, *backward[0], *forward[1], *forward[2], *backward[1], *spread]


def text(rows):
    """One row a line."""
    head = {
        "source": "rows.py",
        "k": 128,
        "v": 128,
        "seed": 7,
        "gates": {
            "table": "g = logsigmoid(x) / 16, and 0 for every fourth value head; x normal",
            "spread": "g = -A softplus(x / 2 + 1), A from 0 for the first value head to 16 for the last; x normal",
            "raw": "g = -softplus(a), beta = sigmoid(b); a and b normal, in bf16",
        },
    }
    lines = [json.dumps(head)[:-1] + ', "rows": [', ",\n".join("  " + json.dumps(row) for row in rows), "]}", ""]
    return "\n".join(lines)


def main():
    here = pathlib.Path(__file__).parent
    parser = argparse.ArgumentParser(description="Writes rows.json.")
    parser.add_argument("--published", type=pathlib.Path, help="FlashQLA's file of results; without it the times in rows.json stay")
    args = parser.parse_args()
    path = here / "rows.json"
    if args.published:
        times = published(args.published)
        if len(times) != 171 + 32:
            sys.exit(f"--published {args.published}: {len(times)} times found, 203 expected")
    else:
        old = json.loads(path.read_text())["rows"] if path.exists() else []
        times = {(r["kind"], r["hk"], r["hv"], r["lengths"]): r["published_ms"] for r in old if "published_ms" in r}
    rows = make(times)
    table = [r for r in rows if r["gates"] == "table"]
    counts = [sum(r["kind"] == kind for r in table) for kind in ("forward", "backward")]
    assert counts == [171, 32] and len({r["id"] for r in rows}) == len(rows), counts
    path.write_text(text(rows))


if __name__ == "__main__":
    main()
