#!/bin/bash
# Every check and every test of the workspace, with all that they need installed first.
#
# usage: scripts/test.sh [arguments of the test runner, e.g. a test's name]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

scripts/setup.sh --tests

export PATH="$PATH:$HOME/.cargo/bin"
export KUBECTL="$PWD/.venv/bin/kubectl"
export CARGO_TERM_COLOR="${CARGO_TERM_COLOR:-auto}"
target="$(cargo metadata --format-version 1 --no-deps --offline 2>/dev/null | sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')"

if [ $# -eq 0 ]; then
    title "Format"
    cargo fmt --all --check
    title "Lints"
    cargo clippy --workspace --all-targets --locked -- -D warnings
fi

# One build of all that is run: the end-to-end tests run the very binary that is built here. Examples were looked at above.
targets=(--workspace --lib --bins --tests --locked)
title "Build"
cargo build "${targets[@]}"
export SEAWALL_BIN="${target:-$PWD/target}/debug/seawall"

title "Tests"
if cargo nextest --version >/dev/null 2>&1; then
    exec cargo nextest run "${targets[@]}" --no-fail-fast "$@"
else
    exec cargo test "${targets[@]}" --no-fail-fast "$@"
fi
