#!/usr/bin/env bash
# The main job on the phantom clinic: train privately, measure, attack, report, release, and verify as a stranger would.
#   scripts/demo.sh [PATIENTS [--set path=value ...]]
set -euo pipefail
cd "$(dirname "$0")/.."
patients="${1:-30000}"
sfumato=.venv/bin/sfumato

answer="$("$sfumato" train clinic --set "data.units=$patients" "${@:2}" --json | tail -n 1)"
field() { .venv/bin/python -c 'import json, sys; print(json.loads(sys.argv[1]).get(sys.argv[2]) or "")' "$answer" "$1"; }
run="$(field run)"
bundle="$(field bundle)"

echo
echo "report: $run/reports/report.html"
echo "images: $run/samples"
if [ -z "$bundle" ]; then
  echo "bundle: none; the release gate refused (reasons above, and in the report)"
  exit 3
fi
echo "bundle: $bundle"
"$sfumato" verify "$bundle"
