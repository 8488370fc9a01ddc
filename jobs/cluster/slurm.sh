#!/bin/bash
# Builds or trains on the machines of one Slurm allocation. When its time is up it saves, is queued again and goes on.
#
#     sbatch jobs/cluster/slurm.sh build ella_sd15 --recaption.batch-size 32
#     sbatch --nodes=4 jobs/cluster/slurm.sh train ella_sd15
#
# A build gets a Ray cluster that lives as long as the job, with a token of its own. A training needs no Ray: srun starts
# a process for each GPU. Run it from the repository's root, which all machines see; so must dataset and runs.
#SBATCH --job-name=densebridge
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
set -euo pipefail
set -m # so that what runs in the background can be interrupted

fail() {
    echo "slurm.sh: $1" >&2
    exit 2
}

[ $# -ge 2 ] || fail "give a job and a recipe: sbatch jobs/cluster/slurm.sh build RECIPE [OPTIONS]"
[ -n "${SLURM_JOB_ID:-}" ] || fail "this is no Slurm job: start it with sbatch"
[ -f jobs/cli.py ] || fail "$PWD is not the repository's root: cd there and sbatch again"
[ ! -d .venv ] || PATH=$PWD/.venv/bin:$PATH

job=$1
shift
nodes=$SLURM_JOB_NUM_NODES
cpus=${SLURM_CPUS_PER_TASK:-1}
gpus=${SLURM_GPUS_ON_NODE:-0}
read -r host < <(scontrol show hostnames "$SLURM_JOB_NODELIST") # the first; this one
ip=${HEAD_IP:-$(hostname -I | awk '{print $1}')} # set HEAD_IP where the first network is not the machines' own
port=$((20000 + SLURM_JOB_ID % 10000))           # Ray keeps 10002 to 19999 for its workers
running='' asked=''

# Slurm's warning before the time is up: $1 is how the job is asked to stop.
ask() {
    asked=yes
    [ -z "$running" ] || kill -s "$1" "$running" || true
}

# Runs a command to its end; `wait` also returns when the warning comes. Sets `code`.
run() {
    "$@" &
    running=$!
    while true; do
        code=0
        wait "$running" || code=$?
        kill -0 "$running" 2>/dev/null || break
    done
    code=0
    wait "$running" || code=$? # its own, where it ended while the warning cut the wait above short
}

# One process a GPU, which find each other as torchrun's would. --wait: the first that ends must not take the others
# with it while they save.
train() {
    local each=$((gpus > 0 ? gpus : 1))
    export MASTER_ADDR=$ip MASTER_PORT=$port LOCAL_WORLD_SIZE=$each
    [ "$gpus" -gt 0 ] || export ACCELERATE_USE_CPU=true
    # shellcheck disable=SC2016 # expanded in each process
    run srun --nodes="$nodes" --ntasks-per-node="$each" --ntasks=$((nodes * each)) --cpus-per-task=$((cpus / each)) \
        --export=ALL --gpu-bind=none --kill-on-bad-exit=0 --wait=600 bash -c \
        'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec python -m jobs.cli train "$@"' \
        train "$@"
}

# A head on this machine, the first, and a worker on each other one. `ray symmetric-run` would do as much, but ends with
# `ray stop`, which also ends the clusters of one's other jobs on these machines. Only tickets go through the object store.
# Ray gives its own processes 15 s to come up, in which a cold network disk may not even have read them: thus again.
start_ray() {
    local log=ray-$SLURM_JOB_ID.log step=(srun --overlap --export=ALL --cpus-per-task="$cpus")
    local start='ray start "$@" || ray start "$@" || ray start "$@"'
    local own=(--num-cpus="$cpus" --num-gpus="$gpus" --object-store-memory=$((1 << 30)) --disable-usage-stats --block)
    RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
    trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
    : >"$log" # of an earlier sitting
    "${step[@]}" --nodes=1 --ntasks=1 --nodelist="$host" bash -c "$start" ray --head --node-ip-address="$ip" --port="$port" \
        --temp-dir="/tmp/ray-$SLURM_JOB_ID" --include-dashboard=false "${own[@]}" &>>"$log" &
    local head=$!
    until grep -q 'Ray runtime started' "$log"; do
        kill -0 $head 2>/dev/null || fail "the head did not start: see $log"
        sleep 1
    done
    if [ "$nodes" -gt 1 ]; then
        "${step[@]}" --nodes=$((nodes - 1)) --ntasks=$((nodes - 1)) --exclude="$host" \
            bash -c "$start" ray --address="$ip:$port" "${own[@]}" &>>"$log" &
    fi
    python - "$ip:$port" "$nodes" 2>>"$log" <<'PYTHON' || fail "not all machines came within five minutes: see $log"
import sys, time, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
end = time.monotonic() + 300
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]):
    time.sleep(1) if time.monotonic() < end else sys.exit(1)
PYTHON
}

case $job in
build)
    trap 'ask INT' USR1
    start_ray
    run python -m jobs.cli build "$@" --address "$ip:$port"
    ;;
train)
    trap 'ask USR1' USR1
    train "$@"
    ;;
*) fail "no job $job for several machines: build or train; others are run as they are, densebridge $job …" ;;
esac

# 75: a training was asked to stop and has saved. A build may be stopped anywhere.
if [ "$code" -eq 75 ] || { [ -n "$asked" ] && [ "$code" -ne 0 ]; }; then
    echo "slurm.sh: stopped with exit code $code; queued again to go on"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
