# `make demo` shows a cluster of five machines; `make demo-down` takes it away; `make test` runs every test.

SHELL := /bin/bash
# Where rustup puts cargo, for shells that were started before it was installed.
export PATH := $(PATH):$(HOME)/.cargo/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-down demo-single demo-single-down build test check fuzz

help: ## Say what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: ## Install what building and running needs (Debian 12)
	@scripts/setup.sh

demo: ## Five machines on this one: three servers, two nodes; then one loses its power
	@scripts/demo.sh up

demo-down: ## Take the demo's machines away, with all that belongs to them
	@scripts/demo.sh down

demo-single: ## A cluster of this machine alone, and what it does
	@scripts/demo-single.sh up

demo-single-down: ## Take that cluster away
	@scripts/demo-single.sh down

build: ## Build the optimised binary
	@cargo build --release -p seawall

check: ## Format and lint
	@cargo fmt --all --check
	@cargo clippy --workspace --all-targets -- -D warnings

test: ## Run all tests; installs what they need
	@scripts/test.sh

fuzz: ## Give random bytes to all that reads bytes, FUZZ_SECONDS (60) for each target
	@scripts/fuzz.sh
