#!/usr/bin/env python3
"""Joins the results of all sides into markdown tables, and judges them by the figures that the project set itself.

    table.py rows.json results/*.jsonl > tables.md

Times are medians in milliseconds, of the last file that has them. A ratio is the other side's time over ours: above 1 we are faster. A file is a
run: where that of the other side has a time of ours, it is the one that counts. What was not run says so, and what failed says why. A verdict
over rows that are not all there says how many it is about.

The roof of a row is the larger of operations over the matrix rate and bytes over the copy rate, both as measured on the machine
(without that, 790 TFLOP/s and 4.3 TB/s). Per chunk of 64 tokens and value head, with C = 64 and K = V = 128:

    forward     K K^T, its inverse, 3 products C K V, 3 products C C D        10.62 MFLOP
    backward    7 products C K V, 10 products C C D, 2 C C C, and the states again    31.46 MFLOP

Bytes are those of inputs and outputs, each moved once.
"""

import argparse
import json
import math
import pathlib
import sys

CHUNK = 64
MFLOP = {"forward": 10.62, "backward": 31.46}
DEFAULT = {"bf16_flop_per_s": 790e12, "copy_byte_per_s": 4.3e12}
PEERS = ["flash_qla", "flashinfer", "fla"]
NAMES = {"flash_qla": "FlashQLA", "flashinfer": "FlashInfer", "fla": "FLA", "gatedelta-cuda": "CUDA", "gatedelta-wgpu": "WGSL"}


def cost(row):
    """Operations, and bytes that must be moved."""
    hk, hv, d, kind = row["hk"], row["hv"], 128, row["kind"]
    tokens, sequences = sum(row["seqlens"]), len(row["seqlens"])
    state = hv * d * d * 4
    if kind == "decode":
        return 7.0 * sequences * hv * d * d, sequences * (2 * state + (2 * hk + 2 * hv) * d * 2 + 8 * hv)
    chunks = sum(math.ceil(n / CHUNK) for n in row["seqlens"])
    wide, states = ((2 * hk + 2 * hv, 2), 2) if kind == "forward" else ((4 * hk + 3 * hv, 4), 3)
    return chunks * hv * MFLOP[kind] * 1e6, tokens * (wide[0] * d * 2 + wide[1] * hv * 4) + states * sequences * state


class Results:
    """Lines of all sides: by side and row, and the rest as they are; also by run, which is a file."""

    def __init__(self, rows, runs):
        self.rows, self.by, self.by_run, self.other, self.machine = rows, {}, {}, [], None
        known = {r["id"] for r in rows}
        for run, line in ((run, line) for run, lines in enumerate(runs) for line in lines):
            if line.get("bench") == "row" and line["id"] in known:
                side = side_of(line)
                line["run"] = run
                if line.get("right"):
                    self.by_run[run, side, line["id"]] = line
                old = self.by.get((side, line["id"]))
                # A time is not replaced by a failure of a later run.
                if old is None or "median_s" in line or "median_s" not in old:
                    self.by[side, line["id"]] = line
            elif line.get("bench") == "machine":
                self.machine = line
            else:
                self.other.append(line)
        self.sides = sorted({side for side, _ in self.by})

    def line(self, side, row):
        return self.by.get((side, row["id"]))

    def time(self, side, row):
        """Seconds, where there is a time of a right answer."""
        line = self.line(side, row)
        return line["median_s"] if line and line.get("right") else None

    def ratio(self, side, ours, row):
        """A side's time over ours, of the same run if there is one."""
        other, own = self.time(side, row), self.time(ours, row)
        if other is None:
            return None
        beside = self.by_run.get((self.line(side, row)["run"], ours, row["id"]))
        own = beside["median_s"] if beside else own
        return other / own if own is not None else None

    def roof(self, row):
        """Seconds, and what bounds them."""
        rates = self.machine or DEFAULT
        flop, byte = cost(row)
        compute, memory = flop / rates["bf16_flop_per_s"], byte / rates["copy_byte_per_s"]
        return (compute, "arithmetic") if compute >= memory else (memory, "memory")


def side_of(line):
    """A side, and how it was asked to compute where that is not the default."""
    options = line.get("options") or {}
    asked = ["hopper"] if options.get("hopper") else []
    asked += [f"cut {options['cut']}"] if options.get("cut") is not None else []
    asked += [f"hopper cut {options['hopper_cut']}"] if options.get("hopper_cut") is not None else []
    asked += ["exact"] if options.get("exact") else []
    return " ".join([line["side"], *asked])


def name_of(side):
    first, *rest = side.split(" ")
    return " ".join([NAMES.get(first, first), *rest])


def ms(seconds):
    if seconds is None:
        return "-"
    x = seconds * 1e3
    return f"{x:.4f}" if x < 0.1 else f"{x:.3f}" if x < 10 else f"{x:.1f}"


def cell(results, side, row, notes):
    """A time with its range, or why there is none."""
    line = results.line(side, row)
    if line is None:
        return "not yet run"
    if "unsupported" in line:
        return "none"
    if "median_s" not in line:
        notes.setdefault(f"{name_of(side)}: {line.get('failed', 'no time')}", []).append(row["id"])
        return "failed"
    text = f"{ms(line['median_s'])} ({ms(line['min_s'])}..{ms(line['max_s'])})"
    if not line.get("right"):
        notes.setdefault(f"{name_of(side)}: wrong, relative error {line.get('relative_error')}", []).append(row["id"])
        return f"wrong: {text}"
    if "why_no_graph" in line and line["why_no_graph"] != "no GPU":
        notes.setdefault(f"{name_of(side)}: no graph, launches are in the time: {line['why_no_graph']}", []).append(row["id"])
        return f"{text} *"
    return text


def times(x):
    return "-" if x is None else f"{x:.2f}"


def geomean(values):
    values = [v for v in values if v is not None]
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def better(results, ours, row):
    """The ratio of the faster of FlashQLA and FlashInfer, if FlashInfer could be compared at all."""
    both = [results.ratio(side, ours, row) for side in PEERS[:2]]
    both = [x for x in both if x is not None]
    return min(both) if both else None


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def section(results, kind, ours, gates):
    rows = [r for r in results.rows if r["kind"] == kind and r["gates"] == gates]
    if not rows:
        return ""
    # In the order of the table, not of importance.
    order = {}
    for r in results.rows:
        order.setdefault((r["hk"], r["hv"]), len(order))
    rows.sort(key=lambda r: (order[r["hk"], r["hv"]], -sum(r["seqlens"]), len(r["seqlens"]), r["seqlens"]))
    sides = [ours, *(s for s in results.sides if s.startswith("gatedelta") and s != ours), *PEERS]
    peers = [p for p in PEERS if kind != "backward" or p != "flashinfer"]
    sides = [s for s in sides if s in peers or s not in PEERS]
    head = ["heads", "lengths", *map(name_of, sides), "x FlashQLA", "x better of two", "x roof", "error"]
    if kind == "decode":
        head[-3:] = ["% of copy rate", "error"]
    notes, body = {}, []
    for row in rows:
        own, line = results.time(ours, row), results.line(ours, row)
        cells = [f"{row['hk']}/{row['hv']}", row["lengths"], *(cell(results, side, row, notes) for side in sides)]
        seconds, bound = results.roof(row)
        cells.append(times(results.ratio("flash_qla", ours, row)))
        if kind == "decode":
            rates = results.machine or DEFAULT
            cells.append("-" if own is None else f"{cost(row)[1] / own / rates['copy_byte_per_s'] * 100:.0f}")
        else:
            cells.append(times(better(results, ours, row)))
            cells.append("-" if own is None else f"{own / seconds:.1f} ({bound})")
        error = line.get("relative_error") if line else None
        cells.append("-" if error is None else f"{error:.1e}")
        body.append(cells)
    text = f"\n### {kind.capitalize()}, gates \"{gates}\"\n\n" + table(head, body)
    for why, ids in notes.items():
        text += f"\n{why}: {len(ids)} rows, the first {ids[0]}.\n"
    return text


def verdict(good, seen, total):
    if not seen:
        return "not yet run"
    whole = "" if seen == total else f", over {seen} of {total} rows"
    return ("met" if good else "missed") + whole


def verdicts(results, ours):
    def of(kind):
        return [r for r in results.rows if r["kind"] == kind and r["gates"] == "table"]

    lines = []

    def judge(what, figure, good, seen, total):
        lines.append([what, figure, verdict(good, seen, total)])

    for kind, least in [("forward", 1.3), ("backward", 1.3)]:
        rows = of(kind)
        found = {r["id"]: results.ratio("flash_qla", ours, r) for r in rows}
        seen = {k: v for k, v in found.items() if v is not None}
        slower = [k for k, v in seen.items() if v < 1]
        worst = min(seen, key=seen.get) if seen else None
        figure = "-" if not seen else f"{len(slower)} slower; worst {seen[worst]:.2f}x at {worst}"
        judge(f"{kind}: no row slower than FlashQLA", figure, not slower, len(seen), len(rows))
        mean = geomean(seen.values())
        judge(f"{kind}: geometric mean >= {least}x FlashQLA", times(mean), bool(mean and mean >= least), len(seen), len(rows))
    rows = of("forward")
    found = [better(results, ours, r) for r in rows]
    # Only rows at which both had a chance to be the better one.
    found = [x for x, r in zip(found, rows) if x and results.line("flash_qla", r) and results.line("flashinfer", r)]
    mean = geomean(found)
    judge("forward: geometric mean >= 1.0x the better of FlashQLA and FlashInfer", times(mean), bool(mean and mean >= 1),
          len(found), len(rows))  # fmt: skip
    for heads in ["16-16", "16-32", "16-64"]:
        row = next(r for r in rows if r["id"] == f"forward/{heads}/1x32768")
        own, roof = results.time(ours, row), results.roof(row)[0]
        figure = "-" if own is None else f"{own / roof:.2f}x"
        judge(f"1x32768 at {heads.replace('-', '/')}: <= 2.5x the roof", figure, own is not None and own <= 2.5 * roof,
              int(own is not None), 1)  # fmt: skip
    rates = results.machine or DEFAULT
    for lengths in ["8192x4", "4096x8"]:
        row = next(r for r in rows if r["id"] == f"forward/16-64/{lengths}")
        own = results.time(ours, row)
        share = None if own is None else cost(row)[0] / own / rates["bf16_flop_per_s"]
        judge(f"{lengths} at 16/64: at least 53 % of peak", "-" if share is None else f"{share * 100:.0f} %",
              share is not None and share >= 0.53, int(own is not None), 1)  # fmt: skip
    rows = [r for r in results.rows if r["kind"] == "decode" and len(r["seqlens"]) >= 32]
    shares = [cost(r)[1] / t / rates["copy_byte_per_s"] for r in rows if (t := results.time(ours, r))]
    judge("decode, batch 32 and up: >= 80 % of the copy rate", "-" if not shares else f"{min(shares) * 100:.0f} % at least",
          bool(shares) and min(shares) >= 0.8, len(shares), len(rows))  # fmt: skip
    return "\n### Verdicts\n\n" + table(["figure", "measured", "verdict"], lines)


def means(results, ours):
    lines = []
    for kind in ["forward", "backward", "decode"]:
        rows = [r for r in results.rows if r["kind"] == kind and r["gates"] in ("table", "raw")]
        for side in [*PEERS, *(s for s in results.sides if s.startswith("gatedelta") and s != ours)]:
            found = {r["id"]: x for r in rows if (x := results.ratio(side, ours, r))}
            if found:
                worst, best = min(found, key=found.get), max(found, key=found.get)
                lines.append([kind, name_of(side), times(geomean(found.values())), f"{found[worst]:.2f} at {worst}",
                              f"{found[best]:.2f} at {best}", f"{len(found)} of {len(rows)}"])  # fmt: skip
    head = ["kind", "against", "geometric mean", "worst row", "best row", "rows"]
    return "\n### Ratios: their time over ours\n\n" + table(head, lines) if lines else ""


def disagreements(results):
    """Rows of which not all sides had the same inputs."""
    found = []
    for row in results.rows:
        sums = {side: results.by[side, row["id"]].get("inputs") for side in results.sides if (side, row["id"]) in results.by}
        if len({s for s in sums.values() if s}) > 1:
            found.append(f"{row['id']}: {sums}")
    return found


def rest(results):
    """Start-up, whole models, self-checks and sides that did not run."""
    text = ""
    first = [x for x in results.other if x.get("bench") == "first_call"]
    if first:
        columns = ["import_torch_s", "cuda_s", "import_library_s", "first_call_s", "second_call_s"]
        body = [[NAMES.get(x["side"], x["side"]), x.get("cache", ""), *(f"{x[c]:.3f}" if c in x else x.get("failed", "-")[:60] for c in columns)]
                for x in first]  # fmt: skip
        text += "\n### First call of a fresh process, seconds\n\n" + table(["side", "cache", *(c[:-2] for c in columns)], body)
    models = [x for x in results.other if x.get("bench") in ("model", "model_transformers")]
    if models:
        body = []
        for x in models:
            who = "transformers" if x["bench"] == "model_transformers" else "gatedelta"
            if "failed" in x:
                body.append([who, x.get("model", "-"), x["failed"][:120], "-", "-"])
                continue
            body.append([who, str(x.get("model")), str(x.get("prompt_tokens")), f"{x['prefill_tokens_per_s']:.0f}",
                         f"{x['decode_tokens_per_s']:.1f}"])  # fmt: skip
        head = ["program", "model", "prompt", "prefill tokens/s", "decode tokens/s"]
        text += "\n### Whole model\n\n" + table(head, body)
    checks = [x for x in results.other if x.get("bench") == "self_check"]
    if checks:
        body = []
        for x in checks:
            errors = x.get("errors")
            found = ", ".join(f"{k} {v:.1e}" for k, v in errors.items()) if errors else x.get("failed") or x.get("unsupported")
            body.append([NAMES.get(x["side"], x["side"]), x["kind"], found.replace("|", "/").replace("\n", " ")[:200]])
        text += "\n### Self-check of each library on a small ragged batch\n\n" + table(["side", "kind", "relative errors"], body)
    for x in results.other:
        if x.get("bench") == "part":
            text += f"\nThe part {x['part']} ended with {x['code']}; 124 is a part whose time was over.\n"
        elif x.get("bench") == "peer" and "failed" in x:
            text += f"\n{NAMES.get(x['side'], x['side'])} did not run: {x['failed']}.\n"
        elif x.get("bench") == "left":
            text += f"\n{NAMES.get(x['side'], x['side'])}: {len(x['rows'])} rows were not reached, the first {x['rows'][0]}.\n"
    return text


def read(path):
    lines = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError:
            # The last line of a run that was cut off; a warning of a library.
            print(f"{path}:{number}: not JSON, left out", file=sys.stderr)
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=pathlib.Path, help="rows.json")
    parser.add_argument("results", type=pathlib.Path, nargs="+", help="JSON lines of any sides")
    parser.add_argument("--ours", default="gatedelta-cuda", help="the side that is judged, as its column is called in the results (gatedelta-cuda)")
    args = parser.parse_args()
    rows = json.loads(args.rows.read_text())["rows"]
    results = Results(rows, [read(path) for path in args.results])
    wrong = disagreements(results)
    if wrong:
        sys.exit("not the same inputs: " + "; ".join(wrong[:5]))
    print("## Beside other kernel libraries\n")
    facts = results.machine
    if facts:
        copy, matrix = facts["copy_byte_per_s"] / 1e12, facts["bf16_flop_per_s"] / 1e12
        print(f"{facts['device']}: copies {copy:.2f} TB/s, bf16 products {matrix:.0f} TFLOP/s, torch {facts['torch']}.")
    for x in results.other:
        if x.get("bench") == "peer" and "failed" not in x:
            told = x.get("versions") or {"driver": x.get("driver")}
            named = ", ".join(f"{k} {v}" for k, v in told.items())
            print(f"- {NAMES.get(x['side'], x['side'])}: {x.get('device')}; {named}")
    print(verdicts(results, args.ours))
    print(means(results, args.ours))
    for kind, gates in [("forward", "table"), ("forward", "spread"), ("backward", "table"), ("decode", "raw")]:
        print(section(results, kind, args.ours, gates))
    print(rest(results))


if __name__ == "__main__":
    main()
