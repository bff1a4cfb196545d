#!/usr/bin/env bash
# Generates the Python stubs of protos/ into DIR (default client/): message and service code with their types.
# The generator is the oldest supported one (requirements/proto.txt, in .venv/proto): stubs run with the grpcio and
# protobuf of their generator or any later one, so its version is the floor in pyproject.toml.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-client}
proto=.venv/proto/bin
[ -x "$proto/python" ] || { echo "generate.sh: $proto is missing: run 'make setup'" >&2; exit 2; }
PATH="$proto:$PATH" "$proto/python" -m grpc_tools.protoc -I protos \
  --python_out="$out" --grpc_python_out="$out" --mypy_out="$out" --mypy_grpc_out="$out" \
  protos/carnet/v1/*.proto
