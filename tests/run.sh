#!/usr/bin/env bash
# Sets up everything and passes the tests: tests/run.sh [newest|kohya], a set of tested versions in constraints/.
set -euo pipefail
cd "$(dirname "$0")/.."
versions=${1:-newest}
[ -f "constraints/$versions.txt" ] || { echo "tests/run.sh: no constraints/$versions.txt: expected newest or kohya" >&2; exit 2; }
python=.venv-$versions/bin/python
[ -x "$python" ] || python3 -m venv ".venv-$versions"
"$python" -m pip install -q --disable-pip-version-check -c "constraints/$versions.txt" -e ".[test]"
exec "$python" -m pytest "${@:2}"
