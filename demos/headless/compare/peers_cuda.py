#!/usr/bin/env python3
"""Times other libraries' Gated DeltaNet over the rows of rows.json: same inputs, same gates, answers checked first.

Every row: the library's call is captured as a CUDA graph; its outputs are filled with NaN, the graph runs once, and what comes
out is compared with float64 (reference.py) at sampled tokens and states, and must be finite everywhere. Then the graph is
timed: the L2 cache is overwritten, an event, one replay, an event; the median of as many as `--each` seconds allow.

A process of its own runs each peer. One that dies or hangs costs the row it was at, which is reported as failed, and is started
again behind it. What is not there or does not work is in the results with its error; nothing is left out in silence.

Results are JSON lines, written as they come: to standard output, and to the end of `--out`.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import select
import signal
import statistics
import subprocess
import sys
import time
import traceback

BEGIN = time.perf_counter()
HERE = pathlib.Path(__file__).resolve().parent
# What FlashQLA's own tests allow: above it an answer counts as wrong. The bound that we hold ourselves to is 5e-3.
WRONG = 2e-2
MIN_RUNS, MAX_RUNS = 10, 400


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--peers", default="flash_qla,flashinfer,fla", help="fla, flash_qla, flashinfer, chunked, or float64 for the answers alone")
    add("--rows", type=pathlib.Path, default=HERE / "rows.json", help="the rows (rows.json beside this)")
    add("--answers", type=pathlib.Path, help="directory of the float64 answers, made where missing; other sides read them")
    add("--out", type=pathlib.Path, help="file to append the results to")
    add("--kinds", default="forward,backward,decode", help="kinds of rows")
    add("--match", default="", help="only rows whose id this expression is found in")
    add("--seconds", type=float, default=600, help="time for each peer; rows that are not reached are named")
    add("--each", type=float, default=0.15, help="seconds to measure each row")
    add("--stuck", type=float, default=240, help="seconds after which a row without a result has failed")
    add("--device", default="cuda", help="cuda, or cpu for the chunked peer")
    add("--warm", action="store_true", help="run every row once, to have its kernels compiled, and time nothing")
    add("--first-call", action="store_true", help="time the first call of this process instead, once for each peer")
    add("--machine", action="store_true", help="measure copy bandwidth and bf16 matrix products instead")
    add("--child", help=argparse.SUPPRESS)
    add("--after", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in ["seconds", "each", "stuck"]:
        if not getattr(args, name) >= 0:
            parser.error(f"--{name} {getattr(args, name)}: expected a time of 0 or more")
    return args


def say(line, out):
    text = json.dumps(line)
    print(text, flush=True)
    if out:
        with open(out, "a") as file:
            file.write(text + "\n")


def selected(args):
    head = json.loads(args.rows.read_text())
    kinds = args.kinds.split(",")
    rows = [r for r in head["rows"] if r["kind"] in kinds and re.search(args.match, r["id"])]
    if not rows:
        sys.exit(f"--kinds {args.kinds} --match {args.match!r}: no row of {args.rows} is left")
    return head, rows


def answer_path(args, row):
    return args.answers / (re.sub("[/ ]", "_", row["id"]) + ".safetensors")


# The parent: one child for each peer.


def supervise(args, peer):
    end = time.monotonic() + args.seconds
    _, rows = selected(args)
    left = [r["id"] for r in rows]
    after, deaths = None, 0
    while left:
        budget = end - time.monotonic()
        if budget <= 0 or deaths > 20:
            break
        command = [sys.executable, __file__, *sys.argv[1:], "--child", peer, "--seconds", f"{budget:.1f}"]
        command += ["--after", after] if after else []
        # What libraries print on the way is not a result; their complaints go where ours go.
        child = subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0)
        # Whoever ends this process ends the child too: nothing may run on the GPU while others are timed.
        signal.signal(signal.SIGTERM, lambda *_: (child.kill(), os._exit(143)))
        heard, buffer, stuck = time.monotonic(), b"", False
        at = None
        while True:
            ready, _, _ = select.select([child.stdout], [], [], 1.0)
            if ready:
                data = os.read(child.stdout.fileno(), 1 << 16)
                if not data:
                    break
                heard = time.monotonic()
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    try:
                        line = json.loads(line)
                    except ValueError:
                        continue
                    if not isinstance(line, dict) or "bench" not in line:
                        continue
                    if line["bench"] == "begin":
                        at = line["id"]
                        continue
                    if line["bench"] == "row" and line["id"] in left:
                        left.remove(line["id"])
                        at = None
                    say(line, args.out)
            now = time.monotonic()
            # A row that has begun may end; one that hangs may not.
            if now - heard > args.stuck or now > end + args.stuck / 4:
                stuck = True
                child.kill()
                break
        code = child.wait()
        if code == 0 and not stuck:
            break
        deaths += 1
        why = f"no result in {args.stuck:.0f} s" if stuck else f"the process ended with {code}"
        if at is None:
            say({"bench": "peer", "side": peer, "failed": why}, args.out)
            break
        if at in left:
            left.remove(at)
            say({"bench": "row", "side": peer, "id": at, "failed": why}, args.out)
        after = at
    if left and not args.warm and peer != "float64":
        say({"bench": "left", "side": peer, "rows": left}, args.out)


# The child: one peer, row after row.


def device_facts(torch, device):
    if device != "cuda":
        return {"device": "cpu", "torch": torch.__version__}
    p = torch.cuda.get_device_properties(0)
    return {"device": p.name, "multiprocessors": p.multi_processor_count, "l2_bytes": p.L2_cache_size, "torch": torch.__version__,
            "cuda": torch.version.cuda}  # fmt: skip


class Clock:
    """Times a call: on a GPU as a replayed graph between events, L2 overwritten before; on the CPU by the clock on the wall."""

    def __init__(self, torch, device):
        self.torch, self.cuda = torch, device == "cuda"
        if self.cuda:
            size = max(256 << 20, 4 * torch.cuda.get_device_properties(0).L2_cache_size)
            self.flush = torch.empty(size // 4, dtype=torch.int32, device="cuda")
            self.read = torch.ones(size // 4, dtype=torch.float32, device="cuda")

    def wait(self):
        if self.cuda:
            self.torch.cuda.synchronize()

    def capture(self, run):
        """The call as a graph and the tensors that its replays write, or the call itself and why there is no graph."""
        if not self.cuda:
            return run, run(), "no GPU"
        cuda = self.torch.cuda
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            for _ in range(3):
                run()
        cuda.current_stream().wait_stream(side)
        cuda.synchronize()
        try:
            graph = cuda.CUDAGraph()
            with cuda.graph(graph):
                out = run()
            graph.replay()
            cuda.synchronize()
            return graph.replay, out, None
        except Exception as error:  # what a library cannot capture is timed without, and says so
            with contextlib.suppress(Exception):
                cuda.synchronize()
            return run, run(), f"{type(error).__name__}: {error}"[:300]

    def sample(self, replay, seconds):
        """Seconds of single runs."""
        times, end = [], time.perf_counter() + seconds
        while len(times) < MIN_RUNS or (time.perf_counter() < end and len(times) < MAX_RUNS):
            if not self.cuda:
                begin = time.perf_counter()
                replay()
                times.append(time.perf_counter() - begin)
                continue
            # Some at a time, so that the GPU always has work waiting and no launch is timed.
            events = []
            for _ in range(5):
                # Read as well: what was only written would go to memory while the call runs.
                self.flush.zero_()
                self.read.sum()
                pair = [self.torch.cuda.Event(enable_timing=True) for _ in range(2)]
                pair[0].record()
                replay()
                pair[1].record()
                events.append(pair)
            self.torch.cuda.synchronize()
            times += [a.elapsed_time(b) * 1e-3 for a, b in events]
        return times


def tensors(x, torch):
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, dict):
        return [t for y in x.values() for t in tensors(y, torch)]
    return [t for y in x for t in tensors(y, torch)] if isinstance(x, (tuple, list)) else []


def answers_of(args, row, inputs):
    """The sampled float64 answers of a row: read, or made and kept."""
    import reference
    from safetensors.torch import load_file, save_file

    path = answer_path(args, row) if args.answers else None
    if path and path.exists():
        return load_file(path)
    found = reference.answers(inputs)
    if row["kind"] == "backward":
        found = {name: x for name, x in found.items() if name not in ("o", "ht")}
    kept = {name: x.cpu() for name, x in reference.sample(found, row["seqlens"]).items()}
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: others read it.
        part = path.with_suffix(f".{os.getpid()}")
        save_file(kept, part, metadata={"id": row["id"], "inputs": inputs.checksum(), "tokens": str(reference.sampled(row["seqlens"]))})
        part.rename(path)
    return kept


def run_row(args, torch, peer, clock, head, row, kept):
    import inputs as made
    import reference

    inputs = made.Inputs(row, head, args.device, kept)
    base = {"bench": "row", "side": peer.name if peer else "float64", "id": row["id"]}
    begin = time.perf_counter()
    if peer is None:
        answers_of(args, row, inputs)
        clock.wait()
        return base | {"answer_s": time.perf_counter() - begin}
    call = peer.prepare(inputs, row["kind"])
    if args.warm:
        call.run()
        clock.wait()
        return base | {"warm_s": time.perf_counter() - begin}
    call.run()
    clock.wait()
    first = time.perf_counter() - begin
    wanted = answers_of(args, row, inputs)
    replay, out, why = clock.capture(call.run)
    call.reset()
    own = {t.data_ptr() for t in vars(inputs).values() if isinstance(t, torch.Tensor)}
    if why is None:
        for t in [] if call.in_place else tensors(out, torch):
            if t.is_floating_point() and t.data_ptr() not in own:
                t.fill_(float("nan"))
        replay()
        clock.wait()
    else:
        out = call.run()
        clock.wait()
    named = call.named(out)
    named = {name: named[name] for name in wanted}
    finite = all(bool(torch.isfinite(x).all()) for x in named.values())
    found = reference.sample(named, row["seqlens"])
    errors = {name: reference.error(found[name].cpu(), wanted[name]) for name in wanted}
    del named, found
    times = clock.sample(replay, args.each)
    worst = max(errors.values())
    result = base | {
        "kind": row["kind"], "hk": row["hk"], "hv": row["hv"], "lengths": row["lengths"], "gates": row["gates"],
        "median_s": statistics.median(times), "min_s": min(times), "max_s": max(times), "runs": len(times),
        "graph": why is None, "first_call_s": first, "errors": errors, "relative_error": worst, "finite": finite,
        "right": finite and worst <= WRONG, "inputs": inputs.checksum(), "checked": "float64 at sampled tokens and states",
    }  # fmt: skip
    return result | ({} if why is None else {"why_no_graph": why})


SMALL = [
    {"id": "self/forward", "kind": "forward", "gates": "spread", "seqlens": [200, 64, 33]},
    {"id": "self/backward", "kind": "backward", "gates": "spread", "seqlens": [200, 64, 33]},
    {"id": "self/decode", "kind": "decode", "gates": "raw", "seqlens": [1] * 4},
]


def self_check(args, torch, peer, head, out):
    """Whether the peer is called as it wants to be: one small ragged batch of each kind, gates from none to total decay."""
    import inputs as made
    import reference

    for row in SMALL:
        row = row | {"hk": 16, "hv": 32, "lengths": "small"}
        if row["kind"] not in args.kinds.split(","):
            continue
        line = {"bench": "self_check", "side": peer.name, "kind": row["kind"]}
        try:
            inputs = made.Inputs(row, head, args.device)
            call = peer.prepare(inputs, row["kind"])
            found, wanted = call.named(call.run()), reference.answers(inputs)
            say(line | {"errors": {name: reference.error(x, wanted[name]) for name, x in found.items()}}, out)
        except Exception as error:
            say(line | failure(error), out)


def failure(error):
    from peers import Unsupported

    if isinstance(error, Unsupported):
        return {"unsupported": str(error)}
    failed = {"failed": f"{type(error).__name__}: {error}"[:500]}
    if not isinstance(error, ImportError):
        failed["trace"] = "".join(traceback.format_exception(error)[-6:])[-1500:]
    return failed


def child(args):
    end = time.perf_counter() + args.seconds
    import torch

    import reference
    from peers import PEERS

    out = None
    if args.device == "cuda" and not torch.cuda.is_available():
        say({"bench": "peer", "side": args.child, "failed": "torch finds no CUDA device"}, out)
        return
    peer = None if args.child == "float64" else PEERS[args.child]
    head, rows = selected(args)
    clock, kept = Clock(torch, args.device), {}
    if args.after:
        rows = rows[[r["id"] for r in rows].index(args.after) + 1 :]
    elif not args.warm:
        facts = device_facts(torch, args.device) | {"versions": peer.versions() if peer else {}}
        say({"bench": "peer", "side": args.child, "reference_self_check": reference.self_check(args.device)} | facts, out)
        if peer:
            self_check(args, torch, peer, head, out)
    for row in rows:
        if time.perf_counter() > end:
            return
        say({"bench": "begin", "id": row["id"]}, out)
        try:
            line = run_row(args, torch, peer, clock, head, row, kept)
        except Exception as error:
            line = {"bench": "row", "side": args.child, "id": row["id"]} | failure(error)
            if args.device == "cuda":
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    kept.clear()
                torch.cuda.empty_cache()
                try:
                    torch.cuda.synchronize()
                except Exception:
                    # The context is lost: this row is told, and the next process goes on behind it.
                    say(line, out)
                    os._exit(3)
        say(line, out)


def first_call(args, name):
    """What a program waits for before its first answer: import, CUDA, the first call, and the second for comparison."""
    stamps = {"process_to_main_s": time.perf_counter() - BEGIN}
    at = time.perf_counter()
    import torch

    stamps["import_torch_s"], at = time.perf_counter() - at, time.perf_counter()
    if args.device == "cuda":
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
    stamps["cuda_s"], at = time.perf_counter() - at, time.perf_counter()
    import inputs as made
    from peers import PEERS

    head = json.loads(args.rows.read_text())
    row = {"kind": "forward", "hk": 16, "hv": 32, "lengths": "4096", "seqlens": [4096], "gates": "table"}
    given = made.Inputs(row, head, args.device)
    wait = torch.cuda.synchronize if args.device == "cuda" else (lambda: None)
    wait()
    at = time.perf_counter()
    try:
        call = PEERS[name].prepare(given, "forward")
        stamps["import_library_s"], at = time.perf_counter() - at, time.perf_counter()
        for which in ["first_call_s", "second_call_s"]:
            call.run()
            wait()
            stamps[which], at = time.perf_counter() - at, time.perf_counter()
    except Exception as error:
        stamps |= failure(error)
    say({"bench": "first_call", "side": name, "cache": os.environ.get("COMPARE_CACHE", "as found")} | stamps, args.out)


def machine(args):
    """The ceilings that times are compared with."""
    import torch

    clock = Clock(torch, "cuda")
    x = torch.randint(-(1 << 30), 1 << 30, (1 << 30,), dtype=torch.int32, device="cuda")
    y = torch.empty_like(x)
    # Not as a graph: replayed as one, a copy reached 2.77 TB/s on an H200, and 4.24 without.
    copied = statistics.median(clock.sample(lambda: y.copy_(x), 0.2))
    del x, y
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product, _, _ = clock.capture(lambda: a @ b)
    multiplied = statistics.median(clock.sample(product, 0.2))
    facts = {"copy_byte_per_s": 2 * (4 << 30) / copied, "bf16_flop_per_s": 2 * 8192**3 / multiplied}
    say({"bench": "machine"} | device_facts(torch, "cuda") | facts, args.out)


def main():
    args = arguments()
    sys.path.insert(0, str(HERE))
    if args.child:
        child(args)
    elif args.machine:
        machine(args)
    else:
        for peer in args.peers.split(","):
            if peer not in ("float64", "fla", "flash_qla", "flashinfer", "chunked"):
                sys.exit(f"--peers {args.peers}: expected float64, fla, flash_qla, flashinfer or chunked, not {peer!r}")
            if args.first_call:
                first_call(args, peer)
            else:
                supervise(args, peer)


if __name__ == "__main__":
    main()
