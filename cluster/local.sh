#!/usr/bin/env bash
# A Ray cluster of several nodes, and an S3 server, on this machine, to try what otherwise needs several machines.
#   cluster/local.sh up [WORKERS]   the server with its bucket "runs", a head, and worker nodes (default 2)
#   cluster/local.sh env            print the variables by which the verbs and jobs/submit.sh find them
#   cluster/local.sh kill NODE      end head, worker-1, worker-2, … or s3 at once, as a power cut would
#   cluster/local.sh down           stop everything and remove what it left
# CPUS sets the CPUs of each worker node (default 1); PORT, DASHBOARD_PORT and S3_PORT the ports (6379 and the next two,
# 8265, 8333 and the next four and those 10000 above). With other ports and another TMPDIR there can be a second cluster.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
PATH=$here/.venv/bin:$PATH
state=${TMPDIR:-/tmp}/srr-$(id -u)
port=${PORT:-6379}
dashboard=${DASHBOARD_PORT:-8265}
s3=${S3_PORT:-8333}
patience=120   # seconds that a part may take to start

up() { # WORKERS
    check_ports "$port" $((port + 1)) $((port + 2)) "$dashboard" "$s3" $((s3 + 1)) $((s3 + 2)) $((s3 + 3)) $((s3 + 4))
    ((${#state} <= 34)) || fail "$state is too long a path for Ray's sockets below it; set a shorter TMPDIR"
    (umask 077 && mkdir -p "$state")
    trap down EXIT
    (umask 077 && secret >"$state/token" && environment "$(secret)" >"$state/environment")
    # shellcheck disable=SC1091  # written just now
    source "$state/environment"   # the nodes have the token and the credentials from here, jobs have them from the nodes
    unset RAY_ADDRESS RAY_API_SERVER_ADDRESS

    launch s3 weed mini -dir="$state/s3" -bucket=runs -ip=127.0.0.1 -ip.bind=127.0.0.1 \
        -s3.port="$s3" -master.port=$((s3 + 1)) -volume.port=$((s3 + 2)) -filer.port=$((s3 + 3)) \
        -admin.port=$((s3 + 4)) -admin.ui=false -webdav=false -s3.port.iceberg=0 -s3.port.lance=0 \
        -s3.localSocket="$state/s3/s3.sock" -filer.localSocket="$state/s3/filer.sock" -master.telemetry=false
    # With a fixed port of the agent, Ray's client server need not find the node first, which on a busy machine it gives
    # up after 30 seconds, and the head with it.
    launch head node --head --disable-usage-stats --num-cpus=0 --port="$port" --dashboard-port="$dashboard" \
        --ray-client-server-port=$((port + 1)) --runtime-env-agent-port=$((port + 2))
    await s3 "$s3"
    await head "$dashboard"
    for ((worker = 1; worker <= $1; worker++)); do
        launch "worker-$worker" node --address="127.0.0.1:$port" --num-cpus="${CPUS:-1}"
    done
    for ((worker = 1; worker <= $1; worker++)); do await "worker-$worker" "$port"; done
    trap - EXIT
    cat "$state/environment"
}

environment() { # SECRET: what clients need to know
    cat <<EOF
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=$state/token
export RAY_ADDRESS=127.0.0.1:$port
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard
export AWS_ENDPOINT_URL=http://127.0.0.1:$s3
export AWS_ACCESS_KEY_ID=local
export AWS_SECRET_ACCESS_KEY=$1
export AWS_DEFAULT_REGION=us-east-1
EOF
}

secret() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

node() { # OPTIONS: run a Ray node that shares with the others nothing but the network
    exec ray start --block --temp-dir="$PWD" --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 \
        --object-store-memory=$((512 * 1024 * 1024)) "$@"
}

launch() { # NAME COMMAND: start it as a session of its own, in a folder of its own
    local folder=$state/$1
    mkdir "$folder"
    cd "$folder"
    : >"$folder.log"
    TMPDIR=$folder setsid nohup bash -c "$(declare -f node); \"\$@\"" "$1" "${@:2}" >>"$folder.log" 2>&1 &
    echo $! >"$folder.pid"
}

await() { # NAME PORT: until it says that it runs and the port answers
    local pid log=$state/$1.log deadline=$((SECONDS + patience))
    pid=$(<"$state/$1.pid")
    until grep -qE 'Ray runtime started|S3 +ready' "$log" && answers "$2"; do
        if ! kill -0 "$pid" 2>/dev/null || ((SECONDS > deadline)); then
            tail -n 20 "$log" >&2
            fail "$1 did not start; the last lines of its log are above"
        fi
        sleep 0.2
    done
}

answers() { (: <"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

check_ports() { # PORTS
    for wanted in "$@"; do
        ! answers "$wanted" || fail "port $wanted is taken; set PORT, DASHBOARD_PORT or S3_PORT to one that is free"
    done
}

fail() { # MESSAGE
    echo "$0: $1" >&2
    return 1
}

kill_node() { # NAME
    [[ -f $state/$1.pid ]] || fail "no node '$1'; there are: $(cd "$state" && echo *.pid | sed 's/\.pid//g')"
    pkill -KILL --session "$(<"$state/$1.pid")"
}

down() {
    local file
    for file in "$state"/*.pid; do
        if ours "$(<"$file")"; then kill "$(<"$file")" 2>/dev/null || true; else rm "$file"; fi
    done
    for file in "$state"/*.pid; do
        [[ -f $file ]] || continue
        for ((tick = 0; tick < 100; tick++)); do
            kill -0 "$(<"$file")" 2>/dev/null || break
            sleep 0.1
        done
        pkill -KILL --session "$(<"$file")" || true   # what did not end when it was asked to
    done
    rm -rf "$state"
}

ours() { pgrep --session "$1" --full "$state" >/dev/null; } # PID: the number may belong to another's process by now

case ${1:-} in
    up)
        [[ ! -d $state ]] || fail "a cluster is up (its state is in $state); first: $0 down"
        up "${2:-2}"
        ;;
    env | kill)
        [[ -f $state/environment ]] || fail "no cluster is up; first: $0 up"
        if [[ $1 == env ]]; then cat "$state/environment"; else kill_node "${2:-}"; fi
        ;;
    down) [[ ! -d $state ]] || down ;;
    *)
        sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
esac
