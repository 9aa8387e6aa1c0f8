#!/usr/bin/env bash
# Makes .venv of this checkout hold what requirements.lock lists, and the checkout itself. Costs nothing the second time.
#
#   scripts/setup.sh            uv where it is there, pip otherwise
#   SETUP_WITH=pip scripts/setup.sh    (or uv) insists on one of them
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "setup: $*" >&2; }
fail() { say "$1"; say "next: $2"; exit 5; }

root_install() { # PACKAGES: with Debian's client, only where we are root; says what it does
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
  say "installing $* (apt-get)"
  { apt-get install -y --no-install-recommends "$@" || { apt-get update && apt-get install -y --no-install-recommends "$@"; }; } \
    >/dev/null 2>&1 </dev/null
}

python_that_fits() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3 python3.12 python3.13 python; do
    [ -n "$candidate" ] && command -v "$candidate" >/dev/null || continue
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

PYTHON="$(python_that_fits)" || { root_install python3 && PYTHON="$(python_that_fits)"; } ||
  fail "Python = none · 3.11 or newer is needed" "apt-get install python3 python3-venv"
export PYTHON

wanted="$({ cat requirements.lock pyproject.toml scripts/setup.sh; "$PYTHON" -V; pwd; } | sha256sum | cut -d' ' -f1)"
stamp=.venv/.sfumato-setup
if [ -x .venv/bin/sfumato ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi

# two `make` at once would spoil each other's environment
if command -v flock >/dev/null; then
  exec 9>.setup.lock
  flock 9
  if [ -x .venv/bin/sfumato ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi
fi
rm -f "$stamp"
# a moved environment still has a Python that runs, but scripts that point to where it was
place=.venv/.sfumato-place
if [ -e .venv ] && { ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  { [ -f "$place" ] && [ "$(cat "$place")" != "$PWD" ]; }; }; then
  say ".venv does not work any more (moved, or its Python is gone): made anew"
  rm -rf .venv
fi

with="${SETUP_WITH:-}"
if [ -z "$with" ]; then if command -v uv >/dev/null; then with=uv; else with=pip; fi; fi
say "packages of requirements.lock into .venv, with $with (some minutes the first time)"

case "$with" in
uv)
  . scripts/registry.sh
  [ -x .venv/bin/python ] || uv venv --quiet --python "$PYTHON" .venv
  install() { uv pip install --quiet --python .venv/bin/python "$@"; }
  ;;
pip)
  if [ ! -x .venv/bin/python ]; then
    # Debian keeps ensurepip in a package of its own; without it `venv` fails half way
    if ! "$PYTHON" -m venv .venv >/dev/null 2>&1; then
      rm -rf .venv
      if root_install python3-venv && "$PYTHON" -m venv .venv >/dev/null 2>&1; then
        :
      elif rm -rf .venv && "$PYTHON" -m pip --version >/dev/null 2>&1; then
        "$PYTHON" -m venv --without-pip .venv # the outer pip serves it, see below
      else
        rm -rf .venv
        fail "python3 -m venv = fails (no ensurepip, no pip) · a Python that can make environments is needed" \
          "apt-get install python3-venv, or install uv; then run make again"
      fi
    fi
  fi
  if .venv/bin/python -m pip --version >/dev/null 2>&1; then
    install() { .venv/bin/python -m pip install -qq --disable-pip-version-check "$@"; }
  elif "$PYTHON" -m pip --python .venv/bin/python --version >/dev/null 2>&1; then
    install() { "$PYTHON" -m pip --python .venv/bin/python install -qq --disable-pip-version-check "$@"; }
  else
    fail ".venv has no pip, and $PYTHON has none that can serve it" "apt-get install python3-venv; rm -rf .venv; run make again"
  fi
  ;;
*) fail "SETUP_WITH = $with · must be uv or pip" "Leave it unset." ;;
esac

pwd >"$place"
install -r requirements.lock || fail "packages = not all could be installed (above) · a package index must answer" \
  "Check the network and pip's configuration, then run make again."
install --no-deps --no-build-isolation -e .
echo "$wanted" >"$stamp"
say "done: .venv/bin/sfumato"
