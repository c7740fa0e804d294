#!/usr/bin/env bash
# Run a verb on a cluster:  jobs/submit.sh quantize --model 70B --output s3://bucket/llama-70b
# RAY_API_SERVER_ADDRESS names the cluster's dashboard (default http://127.0.0.1:8265).
# The same command again resumes an unfinished run, on this or any other cluster.
set -euo pipefail
verb=${1:?usage: jobs/submit.sh VERB [OPTIONS]}
shift
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH
exec ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python -m "srr_dist.$verb" "$@"
