#!/usr/bin/env bash
# Fails if gen/ or envoy/descriptors.binpb is not what proto/ makes. Works on a copy: the tree is not touched.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath --no-symlinks "${PYTHON:-.venv/bin/python}")

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
mkdir "$copy/envoy"
cp -r proto scripts buf.yaml "$copy"
PYTHON=$python "$copy/scripts/generate_stubs.sh"

if ! diff -rq --exclude=__pycache__ gen "$copy/gen" || ! cmp envoy/descriptors.binpb "$copy/envoy/descriptors.binpb"; then
  echo "generated code differs from proto/: run \`make gen\` and commit the result" >&2
  exit 1
fi
