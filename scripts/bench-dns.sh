#!/bin/bash
# Look-ups of a Service's address by cluster DNS, by dnsmasq and by unbound, one after the other in the same run and with the
# same clients, and writes the figures to docs/bench/dns.json. The others are given the name as a fixed one, which is the least
# that they can have to do.
#
# usage: scripts/bench-dns.sh     SEAWALL_BIN: the binary (target/release/seawall); ROUNDS: how often (3), of which the median
#                                 is written down; further flags of `seawall bench dns` in BENCH_FLAGS
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

bin=${SEAWALL_BIN:-target/release/seawall}
[ -x "$bin" ] || fail "there is no $bin" "make build"
for one in jq:jq dnsmasq:dnsmasq-base unbound:unbound; do
    command -v "${one%:*}" >/dev/null || fail "${one%:*} is missing" "apt-get install --no-install-recommends ${one#*:}"
done
name=kubernetes.default.svc.cluster.local
api=26470
dir=$(mktemp -d)
pids=()
cleanup() {
    [ ${#pids[@]} -eq 0 ] || kill "${pids[@]}" 2>/dev/null || true
    wait || true
    rm -rf "$dir"
}
trap cleanup EXIT

"$bin" --log warn server --disable "agent,proxy,controllers,scheduler,gossip,relay" --port $api \
    --data-dir "$dir/data" --run-dir "$dir/run" >"$dir/server.log" 2>&1 &
pids+=($!)
for _ in $(seq 300); do
    curl -skf "https://127.0.0.1:$api/readyz" >/dev/null && break
    sleep 0.1
done

declare -A server=([seawall]=26471 [dnsmasq]=26472 [unbound]=26473) pid=()
"$bin" --log warn dns --kubeconfig "$dir/data/admin.kubeconfig" --listen 127.0.0.1:26471 --http 127.0.0.1:26474 \
    >"$dir/dns.log" 2>&1 &
pid[seawall]=$!
dnsmasq --keep-in-foreground --conf-file=/dev/null --port=26472 --listen-address=127.0.0.1 --bind-interfaces --no-resolv \
    --no-hosts --pid-file= --user=root --address="/$name/10.96.0.1" >"$dir/dnsmasq.log" 2>&1 &
pid[dnsmasq]=$!
cat >"$dir/unbound.conf" <<END
server:
  interface: 127.0.0.1@26473
  num-threads: 2
  so-reuseport: yes
  username: ""
  chroot: ""
  directory: "$dir"
  pidfile: ""
  use-syslog: no
  module-config: "iterator"
  local-zone: "cluster.local." static
  local-data: "$name. 30 IN A 10.96.0.1"
remote-control:
  control-enable: no
END
unbound -d -c "$dir/unbound.conf" >"$dir/unbound.log" 2>&1 &
pid[unbound]=$!
pids+=("${pid[@]}")

ask() { # server seconds
    # shellcheck disable=SC2086 # several flags
    "$bin" bench dns --json --server "127.0.0.1:${server[$1]}" --name "$name" --seconds "$2" --pid "${pid[$1]}" ${BENCH_FLAGS:-}
}
for one in seawall dnsmasq unbound; do
    for _ in $(seq 100); do
        ask $one 1 | jq -e '.[] | select(.name == "answered by a failure" and .value == 0)' >/dev/null 2>&1 && break
        kill -0 "${pid[$one]}" 2>/dev/null || fail "$one ended: $(tail -3 "$dir/$one.log" 2>/dev/null)" "look at its configuration in $0"
        sleep 0.2
    done
done
rounds=${ROUNDS:-3}
for _ in $(seq "$rounds"); do
    for one in seawall dnsmasq unbound; do ask $one 5 >>"$dir/$one.figures"; done
done
for one in seawall dnsmasq unbound; do
    jq -s --arg server $one 'add | group_by(.name) | map({server: $server, name: .[0].name, unit: .[0].unit,
        value: (map(.value) | sort | .[length / 2 | floor])})' "$dir/$one.figures"
done | jq -s --arg commit "$(git rev-parse --short HEAD)" --arg date "$(date -u +%F)" --arg cpus "$(nproc)" --arg rounds "$rounds" \
    --arg others "$(dnsmasq --version | head -1 | cut -d' ' -f1-3), unbound $(unbound -V | head -1 | cut -d' ' -f2)" \
    '{about: "scripts/bench-dns.sh: medians of \($rounds) rounds, release build of \($commit), \($others), \($cpus) CPUs; clients on the same machine",
      date: $date, figures: add}' >docs/bench/dns.json
jq -r '.figures[] | "\(.server): \(.name): \(.value * 1000 | round / 1000) \(.unit)"' docs/bench/dns.json
