#!/usr/bin/env bash
# The case: four hospitals train one model and show nobody a record; it is attacked, released with the ledgers of all four, and verified
# as a stranger would. Then the same with one of them hostile.
#   scripts/case.sh [PATIENTS [--set path=value ...]]
set -euo pipefail
cd "$(dirname "$0")/.."
patients="${1:-30000}"

.venv/bin/sfumato federate hospitals --set "data.units=$patients" "${@:2}"
honest="$(readlink -f runs/hospitals-federated/last)"
echo
echo "attacked, as an insider with the model could, beside a model without noise:"
.venv/bin/sfumato audit "$honest"
echo
.venv/bin/sfumato release "$honest"
.venv/bin/sfumato verify "$honest/bundle"
echo
echo "hostile: the heart centre sends -5 times what it learnt (benchmarks/hostile.py; no recipe can ask for that)"
.venv/bin/python benchmarks/hostile.py hospitals --site heart --factor -5 --set "data.units=$patients" "${@:2}"

for run in "$honest" "$(readlink -f runs/hospitals-federated-hostile/last)"; do
  echo
  echo "report  $run/reports/report.html"
  echo "rounds  $run/reports/federation.json"
done
echo "bundle  $honest/bundle"
