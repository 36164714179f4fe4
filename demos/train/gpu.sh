#!/bin/sh
# Makes the agent's model on one GPU or several, in so many seconds: data, as many steps as fit, scores.
#
#   sh gpu.sh OUT SECONDS
#
# OUT gets a directory for each GPU: run/model as --model takes it, replaced whole at each checkpoint, its loss.svg and log.txt, and in the
# end score.md and score.json. Runs differ in their seed and what TOKENS says. The same settings and number of steps (first line of log.txt)
# give the same model on the same device.
#
#   TRAIN   the program, built with --features burn-gpu,burn/vulkan (target/release/gatedelta-train)
#   GPUS    names of devices, a run each (gpu); gpu:0 gpu:1 for the first two
#   TOKENS  tokens in a step, one number for each run in turn (24576)
#   RATE    the highest rate of them (3e-3)
#   TALKS   conversations to make (1200 for each core)
#   START   weights to begin with (the agent's model); none for random ones
#   SEED    of the first run (1)
#   SCORE   requests of each kind in the scores (50)
#   KEEP    seconds kept back for the scores (60)
set -u

if [ $# -ne 2 ]; then
    echo "usage: sh gpu.sh OUT SECONDS" >&2
    exit 64
fi
case $2 in
'' | *[!0-9]*)
    echo "SECONDS $2: expected a whole number" >&2
    exit 64
    ;;
esac
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1" || exit 1
out=$(cd "$1" && pwd)
begin=$(date +%s)
end=$((begin + $2))
train=${TRAIN:-$here/../../target/release/gatedelta-train}
gpus=${GPUS:-gpu}
rate=${RATE:-3e-3}
start=${START:-$here/../agent/model}
seed=${SEED:-1}
keep=${KEEP:-60}
cores=$(nproc)
work=$(mktemp -d "${TMPDIR:-/tmp}/gatedelta-train.XXXXXX") || exit 1
runs=
# shellcheck disable=SC2086
trap '[ -z "$runs" ] || kill $runs 2>/dev/null; wait; rm -rf "$work"' EXIT
trap 'exit 143' TERM INT
# Conversations live in folders of many small files, which need no disk.
[ -d /dev/shm ] && export TMPDIR=/dev/shm

note() { echo "[$(($(date +%s) - begin)) s] $*" >&2; }
failed() {
    note "$*"
    exit 1
}

# Weights go on with the tokenizer that they were trained with, where they have one.
if [ -e "$start/tokenizer.json" ]; then
    cp -r "$start" "$work/tokenizer"
    : >"$work/log"
else
    "$train" tokenizer --vocab 2048 --conversations 2000 --out "$work/tokenizer" >"$work/log" 2>&1 || failed "$(cat "$work/log")"
fi
note "tokenizer"
data() { "$train" data --tokenizer "$work/tokenizer" "$@" >>"$work/log" 2>&1 || failed "$(tail -n 3 "$work/log")"; }
data --conversations 200 --held-out --out "$work/held"
data --conversations 1500 --seed "$((seed + 1000))" --out "$work/few"
note "first data"

# agent NAME GPU TOKENS SEED ARGUMENT...: a run of that name, in the place of this shell.
agent() {
    name=$1 gpu=$2 tokens=$3 own=$4
    shift 4
    case $start in
    none) set -- --drill 150 --embedding-range 0.1 --residual-scale 0.3 "$@" ;;
    *) set -- --start "$start" "$@" ;;
    esac
    exec "$train" agent --device "$gpu" --held "$work/held" --tokenizer "$work/tokenizer" --drill-share 0.1 \
        --tokens "$tokens" --rate "$rate" --last-rate 0.03 --seed "$own" --out "$work/$name" "$@"
}

# one NUMBER GPU TOKENS SEED: how long a step takes, then as many as fit, then the score.
one() {
    dir=$out/$1
    mkdir -p "$dir"
    # What runs is ended with this shell.
    running=
    trap '[ -z "$running" ] || kill "$running" 2>/dev/null; wait; exit 143' TERM
    agent "try$1" "$2" "$3" "$4" --data "$work/few" --steps 40 >"$work/try$1.log" 2>&1 &
    running=$!
    wait $running || {
        cat "$work/try$1.log" >&2
        return 1
    }
    each=$(sed -n 's/.*minutes, \([0-9.]*\) s a step.*/\1/p' "$work/try$1.log")
    note "$2: $each s a step of $3 tokens"
    while [ ! -e "$work/data" ]; do sleep 1; done
    # Kernels are compiled again: what the try took beside its steps.
    beside=$(sed -n 's/^it took \([0-9.]*\) minutes.*/\1/p' "$work/try$1.log")
    left=$((end - keep - $(date +%s)))
    steps=$(awk -v left="$left" -v each="$each" -v beside="$beside" 'BEGIN {
        steps = (left - 60 * beside + 40 * each) / (each * 1.03); printf "%d", (steps > 50 ? steps / 10 : 5) }')0
    echo "$steps steps of $3 tokens, rate $rate, seed $4, from $start, $2" >"$dir/log.txt"
    note "$(cat "$dir/log.txt")"
    agent "run$1" "$2" "$3" "$4" --data "$work/data" --steps "$steps" --save 200 >>"$dir/log.txt" 2>&1 &
    running=$!
    while kill -0 $running 2>/dev/null; do
        sleep 5
        kept "$1"
    done
    wait $running
    code=$?
    kept "$1"
    note "$2: training ended with $code: $(tail -n 2 "$dir/log.txt" | head -n 1)"
    [ $code -eq 0 ] || return $code
    left=$((end - $(date +%s)))
    if [ "$left" -le 10 ]; then
        note "$2: no time is left for the score"
        return 0
    fi
    timeout "$left" "$train" eval --device cpu --model "$dir/run/model" --per-kind "${SCORE:-50}" \
        --threads "$((cores > 8 ? 8 : cores))" --json "$dir/score.json" >"$dir/score.part" 2>>"$dir/log.txt" || {
        note "$2: the score ended with $?"
        return 1
    }
    mv "$dir/score.part" "$dir/score.md"
    note "$2: score"
}

# The file of a checkpoint's model that is written last.
last=model/chat_template.jinja

# kept NUMBER: the newest checkpoint's model, whole or not at all.
kept() {
    from=$work/run$1
    to=$out/$1/run
    [ -e "$from/$last" ] || return 0
    [ ! -e "$to/$last" ] || [ "$from/$last" -nt "$to/$last" ] || return 0
    rm -rf "$to.part"
    mkdir -p "$to.part"
    cp -pr "$from/model" "$from/loss.svg" "$to.part/" && rm -rf "$to" && mv "$to.part" "$to"
}

number=0
# shellcheck disable=SC2086
set -- ${TOKENS:-24576}
for gpu in $gpus; do
    one "$number" "$gpu" "$1" "$((seed + number))" &
    runs="$runs $!"
    number=$((number + 1))
    [ $# -gt 1 ] && shift
done
data --conversations "${TALKS:-$((1200 * cores))}" --seed "$seed" --threads "$((cores > 16 ? 16 : cores))" --out "$work/data.part"
mv "$work/data.part" "$work/data"
note "data: $(tail -n 1 "$work/log")"
code=0
for run in $runs; do wait "$run" || code=1; done
runs=
note "done"
exit $code
