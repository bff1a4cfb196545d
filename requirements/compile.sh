#!/usr/bin/env bash
# Makes the pinned requirements of this folder from pyproject.toml. Needs uv (https://docs.astral.sh/uv/) on the PATH.
# Run it after a change to the dependencies; add --upgrade to move all pins to the newest releases.
set -euo pipefail
cd "$(dirname "$0")/.."

# Without header and annotations the files name no address and no path of the machine that made them.
compile() {
  local output=$1
  shift
  uv pip compile --quiet --generate-hashes --no-header --no-annotate --python-version 3.11 \
    --output-file "requirements/$output" "$@"
}

compile dev.txt pyproject.toml --extra broker --group dev "$@"
# What goes into the image is what was tested: the same versions.
compile broker.txt pyproject.toml --extra broker --constraints requirements/dev.txt
compile build.txt --group build --constraints requirements/dev.txt
compile proto.txt --group proto "$@"
