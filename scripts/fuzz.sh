#!/bin/bash
# Runs each target of fuzz/ for a while. An input that breaks one is left in fuzz/artifacts/; the others still have their turn,
# and the last lines say what broke and how to run it again.
#
# usage: scripts/fuzz.sh [TARGET...]     FUZZ_SECONDS: how long each (60)
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

export PATH="$PATH:$HOME/.cargo/bin"
cargo +nightly --version >/dev/null 2>&1 ||
    fail "fuzzing needs a nightly toolchain of Rust beside the stable one" "rustup toolchain install nightly --profile minimal"
if ! cargo fuzz --version >/dev/null 2>&1; then
    title "Installing cargo-fuzz"
    cargo install cargo-fuzz --locked </dev/null || fail "cargo-fuzz could not be installed"
fi

cd fuzz
targets=("$@")
[ $# -gt 0 ] || mapfile -t targets < <(cargo +nightly fuzz list)
# All of it is safe Rust, so there is nothing for a sanitizer to find.
flags=(--sanitizer none)
title "Building ${targets[*]}"
cargo +nightly fuzz build "${flags[@]}" || fail "the targets of fuzz/ could not be built" "what the compiler says is above"

broken=()
started=$(mktemp)
trap 'rm -f "$started"' EXIT
for target in "${targets[@]}"; do
    title "$target, ${FUZZ_SECONDS:-60} s"
    # What is found new goes to a directory that git does not keep; corpus/ has the few that were written by hand.
    mkdir -p "found/$target"
    cargo +nightly fuzz run "${flags[@]}" "$target" "found/$target" "corpus/$target" -- \
        -max_total_time="${FUZZ_SECONDS:-60}" -timeout=10 -rss_limit_mb=2048 -max_len=16384 -verbosity=0 -print_final_stats=1 ||
        broken+=("$target")
done
[ ${#broken[@]} -gt 0 ] || exit 0
hints=()
for target in "${broken[@]}"; do
    mapfile -t inputs < <(find "artifacts/$target" -type f -newer "$started" 2>/dev/null)
    [ ${#inputs[@]} -gt 0 ] || hints+=("$target ended without leaving an input behind: what it said is above")
    for input in "${inputs[@]}"; do
        hints+=("again: (cd fuzz && cargo +nightly fuzz run ${flags[*]} $target $input)")
    done
done
fail "broken by an input: ${broken[*]}" "${hints[@]}"
