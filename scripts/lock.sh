#!/usr/bin/env bash
# Resolves pyproject.toml (core + dev) into requirements.lock. Pins that still fit are kept; `scripts/lock.sh --upgrade`
# takes newer ones, `scripts/lock.sh -c FILE` follows a set of constraints. Needs uv.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/registry.sh
fresh="$(mktemp)"
trap 'rm -f "$fresh"' EXIT
grep -v '^torch==' requirements.lock >"$fresh" # the other pins are kept where they still fit
uv pip compile pyproject.toml --extra dev --python-version 3.11 --no-header --no-annotate --quiet \
  --constraint <(echo "torch==2.13.0") --output-file "$fresh" "$@" >/dev/null
{
  cat <<'HEADER'
# What `make` and CI install: one set that was tried together, on Python 3.11. Made by scripts/lock.sh.
# torch is pinned without its build tag, so that a CPU build is taken where one is offered.
HEADER
  # what only a build for graphics cards needs comes with that build, not from here
  grep -vE '^(#|nvidia-|cuda-|triton==)' "$fresh" | sed 's/^torch==\([0-9.]*\).*/torch==\1/'
} >requirements.lock
