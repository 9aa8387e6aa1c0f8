#!/usr/bin/env bash
# The main job on the phantom clinic: train privately, measure, attack, report, release, and verify as a stranger would.
#   scripts/demo.sh [PATIENTS [--set path=value ...]]
set -euo pipefail
cd "$(dirname "$0")/.."
patients="${1:-30000}"
sfumato=.venv/bin/sfumato

"$sfumato" train clinic --set "data.units=$patients" "${@:2}"

run="$(readlink -f runs/clinic/last)"
echo
echo "report  $run/reports/report.html"
echo "images  $run/samples"
if [ ! -f "$run/bundle/manifest.json" ]; then
  echo "bundle  none: the gate refused, for the reasons above"
  exit 3
fi
echo "bundle  $run/bundle"
echo
"$sfumato" verify "$run/bundle"
