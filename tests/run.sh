#!/usr/bin/env bash
# The tests of `make test`, on two cores in about ten minutes. The first stage that fails ends it with its exit code.
#
# Tests that are marked `measured` want a machine that does little else, and wait most of the time. So those of the
# rules, which only compute, run beside them in what they leave over: with the lowest priority. Those of the whole come
# after that, by more workers than there are cores, since they wait for processes.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
rules=(tests/unit tests/property tests/vectors tests/contract)
whole=(tests/e2e tests/integration)
# Processes of ours are started by the hundred: with their byte code kept they start in half the time.
unset PYTHONDONTWRITEBYTECODE

.venv/bin/coverage erase
loads=(tests/e2e/test_acknowledged_rotation.py tests/e2e/test_rotation_under_load.py)
echo "== tests that put a load on, alone"
"$python" -m pytest "${loads[@]}"

log=$(mktemp)
COVERAGE_PROCESS_START=$PWD/pyproject.toml nice -n 19 \
  "$python" -m pytest "${rules[@]}" --numprocesses "${WORKERS:-2}" --dist worksteal >"$log" 2>&1 &
beside=$!
trap 'kill "$beside" 2>/dev/null || true; rm -f "$log"' EXIT

echo "== tests that measure a time or a load"
"$python" -m pytest "${whole[@]}" -m measured "${loads[@]/#/--ignore=}"

echo "== tests of the rules and of the ports, which began with the first"
code=0
wait "$beside" || code=$?
cat "$log"
[ "$code" = 0 ] || exit "$code"

echo "== branch coverage of the core and the verifier"
.venv/bin/coverage combine --quiet
.venv/bin/coverage report

echo "== tests of the whole"
"$python" -m pytest "${whole[@]}" -m "not measured" --numprocesses "${WAITING_WORKERS:-3}" --dist loadfile --no-loadscope-reorder
echo "tests: all passed"
