#!/bin/sh
# The whole comparison on one NVIDIA GPU, the most important part first, within a number of seconds.
#
#   sh gpu.sh OUT SECONDS [PART...]
#
# OUT gets results.jsonl (every row of every side, as it comes), tables.md and log.txt. Parts, in their order; all of them without:
#
#   machine   copy rate and matrix rate                             ours     gatedelta, kernels for Hopper where they are
#   warm      kernels of the Python libraries compiled, in parallel;    flash_qla, flashinfer, fla
#             float64 answers                                       model    a whole model beside transformers
#   general   gatedelta, the kernels for every GPU                  webgpu   gatedelta through Vulkan
#   start     first call of a fresh process
#
# A part gets at most its share of the time; what it leaves goes to those after it. What does not run is named in log.txt, and
# says "not yet run" in the tables.
#
#   HEADLESS   the program (target/release/gatedelta-headless)      PYTHON   python3 with torch and the libraries (python3)
#   ANSWERS    where float64 answers are kept between runs (a temporary directory)
#   EACH       seconds to measure each row (0.1)                    WARM     libraries that `warm` compiles (flash_qla fla)
set -u

if [ $# -lt 2 ]; then
    echo "usage: sh gpu.sh OUT SECONDS [PART...]" >&2
    exit 64
fi
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1" || exit 1
out=$(cd "$1" && pwd)
total=$2
shift 2
case $total in
'' | *[!0-9]*)
    echo "SECONDS $total: expected a whole number" >&2
    exit 64
    ;;
esac
parts=${*:-machine warm ours flash_qla flashinfer model fla webgpu general start}
python=${PYTHON:-python3}
headless=${HEADLESS:-$here/../../../target/release/gatedelta-headless}
answers=${ANSWERS:-$(mktemp -d)}
each=${EACH:-0.1}
rows=$here/rows.json
results=$out/results.jsonl
log=$out/log.txt
begin=$(date +%s)
export PYTHONUNBUFFERED=1 FLA_FLASH_QLA=0 TOKENIZERS_PARALLELISM=false

left() { echo $((total - $(date +%s) + begin)); }
note() { echo "[$(($(date +%s) - begin)) s] $*" | tee -a "$log" >&2; }

# share PERCENT: seconds of this part, at most what is left.
share() {
    part=$((total * $1 / 100))
    rest=$(left)
    [ "$part" -lt "$rest" ] || part=$rest
    echo "$part"
}

# limited SECONDS COMMAND...: standard output to the results, complaints to the log.
limited() {
    seconds=$1
    shift
    if [ "$seconds" -lt 5 ]; then
        note "not run, no time is left: $*"
        return 1
    fi
    timeout -k 5 "$seconds" "$@" 2>>"$log" >>"$results"
    code=$?
    if [ $code -ne 0 ]; then
        note "ended with $code: $*"
        printf '{"bench": "part", "part": "%s", "code": %d}\n' "$part_name" $code >>"$results"
    fi
    return $code
}

peers() { "$python" "$here/peers_cuda.py" --rows "$rows" --answers "$answers" "$@"; }

# ours SECONDS ARGUMENT...: gatedelta over the rows.
ours() {
    seconds=$1
    shift
    limited $((seconds + 10)) "$headless" bench --json --rows "$rows" --answers "$answers" --seconds "$each" \
        --within "$seconds" "$@"
}

peer() {
    seconds=$(share "$2")
    limited $((seconds + 15)) "$python" "$here/peers_cuda.py" --rows "$rows" --answers "$answers" --peers "$1" \
        --seconds "$seconds" --each "$each" --kinds "$3"
}

run() {
    case $1 in
    machine) limited 60 "$python" "$here/peers_cuda.py" --machine ;;
    warm)
        # Nothing is timed here, so everything may run at once. What FLA tunes meanwhile is not kept: it tunes again alone.
        seconds=$(share 30)
        peers --peers float64 --seconds "$seconds" >>"$out/warm.log" 2>&1 &
        float64=$!
        forward="16-32 16-64 16-16 2-8 32-32 16-48 4-16 8-32 8-24"
        backward="16-32 8-16 4-8 2-4"
        decode="16-32 16-64 16-16"
        lengths='(1x32768|16384.16384|1x8192|1x2048|2048x4|1024x8|4096x8|8k_1seq|8k_8seq|batch.1)$'
        for library in ${WARM:-flash_qla fla}; do
            for head in $forward; do echo "$library ^forward/$head/.*$lengths"; done
            for head in $backward; do echo "$library ^backward/$head/.*$lengths"; done
            [ "$library" = flash_qla ] || for head in $decode; do echo "$library ^decode/$head/.*$lengths"; done
        done | FLA_CACHE_RESULTS=0 timeout -k 5 "$seconds" xargs -P "$(nproc)" -L 1 sh -c \
            '"$0" "$1" --rows "$2" --warm --seconds "$3" --peers "$4" --match "$5"' \
            "$python" "$here/peers_cuda.py" "$rows" "$seconds" >>"$out/warm.log" 2>&1
        wait $float64
        grep '"bench": "row"' "$out/warm.log" | grep '"failed"' | cut -c1-400 >>"$log"
        note "warm: $(ls "$answers" | wc -l) answers, $(grep -c warm_s "$out/warm.log") calls"
        # Whole logs are long, and what failed is in the log already.
        tail -c 200000 "$out/warm.log" >"$out/warm.tail" && mv "$out/warm.tail" "$out/warm.log"
        ;;
    ours) ours "$(share 28)" --device cuda --store bf16 --scratch 8192 ;;
    general) GATEDELTA_HOPPER=0 ours "$(share 12)" --device cuda --store bf16 --scratch 8192 ;;
    webgpu) ours "$(share 10)" --device nvidia --store bf16 ;;
    # The first rows of each kind compile; those of the other kind shall not use their time up.
    flash_qla) peer flash_qla 27 forward; peer flash_qla 8 backward ;;
    flashinfer) peer flashinfer 26 forward,decode ;;
    fla) peer fla 16 forward,backward,decode ;;
    model)
        limited "$(share 24)" "$python" "$here/model_transformers.py"
        limited "$(share 8)" "$headless" bench --json --device cuda --shape 0.8b --prompt 8192 --seconds 1
        ;;
    start)
        if "$headless" bench --help 2>>"$log" | grep -q -e '--start'; then
            limited "$(share 8)" "$headless" bench --json --device cuda --start --runs 2
        fi
        for library in flashinfer fla flash_qla; do
            COMPARE_CACHE=filled limited "$(share 6)" "$python" "$here/peers_cuda.py" --first-call --peers $library
        done
        for library in flashinfer fla flash_qla; do
            empty=$(mktemp -d)
            COMPARE_CACHE=empty TRITON_CACHE_DIR=$empty/triton TILELANG_CACHE_DIR=$empty/tilelang \
                FLASHINFER_WORKSPACE_BASE=$empty XDG_CACHE_HOME=$empty CUDA_CACHE_PATH=$empty/cuda \
                limited "$(share 12)" "$python" "$here/peers_cuda.py" --first-call --peers $library
        done
        ;;
    *)
        note "part $1: expected machine, warm, ours, flash_qla, flashinfer, model, fla, webgpu, general or start"
        return 64
        ;;
    esac
}

for part_name in $parts; do
    if [ "$(left)" -lt 10 ]; then
        note "$part_name: not run, no time is left"
        continue
    fi
    note "$part_name"
    run "$part_name"
    # After each part, so that a run that is cut off has tables too.
    "$python" "$here/table.py" --ours "gatedelta-cuda hopper" "$rows" "$results" >"$out/tables.part" 2>>"$log" &&
        mv "$out/tables.part" "$out/tables.md"
done
note "done"
