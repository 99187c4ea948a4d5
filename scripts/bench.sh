#!/bin/bash
# Measures the API server, alone on this machine, and writes the figures to docs/bench/: api-embedded.json on its own store,
# api-etcd.json on a member of etcd that it runs (whose CPU time and memory are counted too).
#
# usage: scripts/bench.sh [embedded|etcd]     SEAWALL_BIN: the binary (target/release/seawall); further flags of
#                                             `seawall bench api` in BENCH_FLAGS
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

bin=${SEAWALL_BIN:-target/release/seawall}
[ -x "$bin" ] || fail "there is no $bin" "make build"
command -v jq >/dev/null || fail "jq is missing" "apt-get install jq"
port=26460

measure() { # store
    local store=$1 dir pids log
    dir=$(mktemp -d)
    log=$dir/log
    local flags=(--disable "agent,proxy,controllers,scheduler,gossip,relay" --port "$port" --data-dir "$dir/data" --run-dir "$dir/run")
    [ "$store" = embedded ] || flags+=(--cluster-init)
    "$bin" --log warn server "${flags[@]}" >"$log" 2>&1 &
    local server=$!
    for _ in $(seq 300); do
        curl -skf "https://127.0.0.1:$port/readyz" >/dev/null && break
        kill -0 "$server" 2>/dev/null || fail "the server ended: $(tail -5 "$log")" "see $log"
        sleep 0.1
    done
    pids=("$server")
    mapfile -t -O 1 pids < <(pgrep -P "$server" -x etcd || true)
    title "The API on the store '$store'"
    local out="docs/bench/api-$store.json"
    # shellcheck disable=SC2086 # several flags
    "$bin" bench api --json --kubeconfig "$dir/data/admin.kubeconfig" "${pids[@]/#/--pid=}" ${BENCH_FLAGS:-} >"$dir/figures"
    kill "$server"
    wait "$server" || true
    jq --arg store "$store" --arg commit "$(git rev-parse --short HEAD)" --arg date "$(date -u +%F)" --arg cpus "$(nproc)" \
        '{about: "scripts/bench.sh \($store): the API server alone, release build of \($commit), \($cpus) CPUs; clients on the same machine",
          date: $date, figures: .}' "$dir/figures" >"$out"
    jq -r '.figures[] | "\(.name): \(.value * 1000 | round / 1000) \(.unit)"' "$out"
    rm -rf "$dir"
}

for store in "${@:-embedded etcd}"; do
    for one in $store; do measure "$one"; done
done
