#!/usr/bin/env bash
# Run a verb on a cluster:  jobs/submit.sh [RAY_OPTIONS] VERB [OPTIONS]
#   jobs/submit.sh quantize --model 70B --output s3://bucket/llama-70b
#   jobs/submit.sh --no-wait --submission-id llama-1 quantize --model 70B --output s3://bucket/llama-70b
# What stands before the verb goes to `ray job submit`. RAY_API_SERVER_ADDRESS names the cluster's dashboard (default
# http://127.0.0.1:8265). The same verb and options again, with a new submission id, resume an unfinished run, on this
# or any other cluster. Paths are those of the nodes.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH

help() { sed -n '2,7s/^# \{0,1\}//p' jobs/submit.sh; }

ray_options=()
while (($#)); do
    case $1 in
        quantize | plan | status | evaluate | verify)
            exec ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml "${ray_options[@]}" -- \
                python -m "srr_dist.$1" "${@:2}"
            ;;
        -h | --help) help && exit ;;
        *) ray_options+=("$1") && shift ;;
    esac
done
help >&2
exit 2
