#!/usr/bin/env bash
# A Ray cluster of several nodes on this machine, to try what otherwise needs several machines.
#   cluster/local.sh up [WORKERS]   a head and this many worker nodes (default 2)
#   cluster/local.sh env            print the variables by which the verbs and jobs/submit.sh find it
#   cluster/local.sh down           stop them
# CPUS sets the CPUs of each worker node, PORT and DASHBOARD_PORT the head's ports.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
PATH=$here/.venv/bin:$PATH
export RAY_AUTH_MODE=token   # as the nodes have it; clients by default send no token
state=${TMPDIR:-/tmp}/srr-local-cluster-$(id -u)
port=${PORT:-6379}
dashboard=${DASHBOARD_PORT:-8265}

start() { # NAME OPTIONS…: a node that lives until its process is told to end; returns when it runs
    local log=$state/$1.log pid
    nohup ray start --block --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 \
        --object-store-memory=$((512 * 1024 * 1024)) "${@:2}" >"$log" 2>&1 &
    pid=$!
    echo "$pid" >"$state/$1.pid"
    until grep -q 'Ray runtime started' "$log"; do
        kill -0 "$pid" 2>/dev/null || { cat "$log" >&2; down; exit 1; }
        sleep 0.5
    done
}

up() {
    [[ ! -d $state ]] || { echo "a cluster is up (its state is in $state); first: $0 down" >&2; exit 1; }
    mkdir -p "$state"
    start head --head --disable-usage-stats --port="$port" --dashboard-port="$dashboard" --num-cpus=0
    for ((worker = 1; worker <= $1; worker++)); do
        start "worker-$worker" --address="127.0.0.1:$port" --num-cpus="${CPUS:-1}"
    done
    environment | tee "$state/environment"
}

environment() { # what clients of the cluster need to know
    cat <<EOF
export RAY_AUTH_MODE=token
export RAY_ADDRESS=127.0.0.1:$port
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard
EOF
}

down() {
    for file in "$state"/*.pid; do
        pid=$(<"$file")
        kill "$pid" 2>/dev/null || continue
        while kill -0 "$pid" 2>/dev/null; do sleep 0.2; done
    done
    rm -rf "$state"
}

case ${1:-} in
    up) up "${2:-2}" ;;
    env) cat "$state/environment" ;;
    down) [[ ! -d $state ]] || down ;;
    *) sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
