# Sourced. uv does not read pip's configuration; this hands over where packages are looked for and which certificates
# are trusted, whatever pip was told (its file or its environment). Nothing is set where pip was told nothing.
pip_setting() { # NAME: pip's value from the environment, else from its files
  local variable="PIP_$(echo "$1" | tr 'a-z-' 'A-Z_')"
  if [ -n "${!variable:-}" ]; then
    echo "${!variable}"
  else
    "${PYTHON:-python3}" -m pip config get "global.$1" 2>/dev/null || true
  fi
}
hand_over() { # NAME VARIABLE
  local value
  value="$(pip_setting "$1")"
  if [ -n "$value" ] && [ -z "${!2:-}" ]; then export "$2=$value"; fi
}
hand_over find-links UV_FIND_LINKS
hand_over index-url UV_DEFAULT_INDEX
hand_over extra-index-url UV_INDEX
hand_over cert SSL_CERT_FILE
# pip takes the best version from all indexes; uv by default the first index that has the name
if [ -n "${UV_INDEX:-}" ] && [ -z "${UV_INDEX_STRATEGY:-}" ]; then export UV_INDEX_STRATEGY=unsafe-best-match; fi
