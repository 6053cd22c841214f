#!/usr/bin/env bash
# usage: tests/installation/run.sh PYTHON
#
# Builds the wheel and takes it through a new user's path, from empty folders in which nothing of this repository can be
# reached: once with the newest versions that the wheel admits, and once with the lowest on Python 3.11. Packages come
# from the package index.
set -euo pipefail
python=$1
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/tools"
"$work/tools/bin/python" -m pip --disable-pip-version-check install --quiet uv
uv=$work/tools/bin/uv

"$uv" build --quiet --wheel --out-dir "$work/dist" "$root"
wheel=$(echo "$work"/dist/*.whl)
# What runs in an installation must not need the scripts' own places either.
cp "$root"/tests/installation/{smoke.sh,load.py} "$work/"

install_and_smoke() {
  local name=$1 interpreter=$2
  shift 2
  echo "installed: $name"
  "$uv" venv --quiet --python "$interpreter" "$work/$name"
  "$uv" pip install --quiet --python "$work/$name/bin/python" "$@"
  mkdir "$work/$name-folder" "$work/$name-home"
  (
    cd "$work/$name-folder"
    unset PYTHONPATH VIRTUAL_ENV
    export HOME=$work/$name-home XDG_CACHE_HOME=$work/$name-home/cache PATH=$work/$name/bin:$PATH
    bash "$work/smoke.sh"
  )
}

install_and_smoke newest "$python" "$wheel" &
newest=$!
install_and_smoke lowest 3.11 --resolution lowest-direct "$wheel[datasets,optuna]" &
lowest=$!
# Both to their ends: the second says whether the first failed for its versions.
status=0
wait "$newest" || { echo "failed with the newest versions" >&2; status=1; }
wait "$lowest" || { echo "failed with the lowest versions" >&2; status=1; }
exit "$status"
