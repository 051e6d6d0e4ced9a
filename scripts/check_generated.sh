#!/usr/bin/env bash
# Fails if gen/, envoy/descriptors.binpb, envoy/openapi.json or envoy/docs/index.html is not what proto/ makes. Works on a
# copy: the tree is not touched.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath --no-symlinks "${PYTHON:-.venv/bin/python}")

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
mkdir "$copy/envoy"
cp -r proto scripts edge buf.yaml "$copy"
PYTHON=$python "$copy/scripts/generate_stubs.sh"

differs=0
diff -rq --exclude=__pycache__ gen "$copy/gen" || differs=1
for file in descriptors.binpb openapi.json docs/index.html; do
  cmp "envoy/$file" "$copy/envoy/$file" || differs=1
done
if [ "$differs" = 1 ]; then
  echo "generated files differ from proto/: run \`make gen\` and commit the result" >&2
  exit 1
fi
