#!/usr/bin/env bash
# Makes .venv from the complete lock, then installs the project itself. `deploy/setup.sh lock` makes the lock anew.
#
# torch must be its CPU build: it comes from the find-links folder that pip is configured with; if it is not there, from $TORCH_INDEX.
# uv is used for speed (the one on PATH, or one that pip can fetch into .venv); without it, or with NO_UV=1, pip does the
# same more slowly.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
lock=deploy/requirements/cpu.txt
torch=$(grep -E '^torch==' "$lock" 2>/dev/null || echo 'torch==2.13.0+cpu')
started=$SECONDS

find_python() {
  for candidate in ${PYTHON:-} python3.11 python3.12 python3; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "dpo-loop needs Python 3.11 or 3.12; name one with PYTHON=... make setup" >&2
  exit 2
}

python=$(find_python)
[ -x .venv/bin/python ] || { echo "setup: .venv with $("$python" --version)"; "$python" -m venv .venv; }
pip=(.venv/bin/python -m pip --disable-pip-version-check -q)

# uv does not read pip's configuration: hand the find-links folder on.
find_links=${PIP_FIND_LINKS:-$("${pip[@]}" config get global.find-links 2>/dev/null || true)}
export UV_FIND_LINKS=${UV_FIND_LINKS:-$(echo "$find_links" | tr '\n' ' ' | sed 's/ *$//')}
export VIRTUAL_ENV=$PWD/.venv UV_COMPILE_BYTECODE_TIMEOUT=600 UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180}
uv=
if [ -z "${NO_UV:-}" ]; then
  uv=$(command -v uv || true)
  if [ -z "$uv" ] && "${pip[@]}" install 'uv>=0.8' 2>/dev/null; then uv=.venv/bin/uv; fi
fi

if [ "${1:-}" = lock ]; then
  "$uv" pip compile pyproject.toml --extra cpu --extra dev --python-version 3.11 --no-header \
    --override deploy/requirements/overrides.txt --output-file "$lock" --quiet
  echo "lock: $(grep -c '^[a-z0-9]' "$lock") packages in $lock"
  exit 0
fi

if [ -n "$uv" ]; then
  # Bytecode now, not at every start: vLLM alone would compile for ten seconds a stage where caches are off.
  install=("$uv" pip install -q --no-deps --compile-bytecode)
  torch_index=(--extra-index-url "$TORCH_INDEX" --index-strategy unsafe-best-match)
  has_torch() { "${install[@]}" --dry-run "$torch" >/dev/null 2>&1; }
else
  install=("${pip[@]}" install --no-deps)
  torch_index=(--extra-index-url "$TORCH_INDEX")
  has_torch() { "${pip[@]}" download --no-deps -d .venv/torch "$torch" >/dev/null 2>&1; }
fi
if has_torch; then torch_index=(); else echo "setup: $torch is not in pip's find-links folder; taking it from $TORCH_INDEX"; fi

echo "setup: $(grep -c '^[a-z0-9]' "$lock") packages of $lock, by $([ -n "$uv" ] && echo uv || echo pip)"
"${install[@]}" "${torch_index[@]}" -r "$lock"
"${install[@]}" --editable .
echo "setup: done in $((SECONDS - started)) s"
