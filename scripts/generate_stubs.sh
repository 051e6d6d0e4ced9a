#!/usr/bin/env bash
# Makes every generated file from proto/: envoy/descriptors.binpb (the one artefact), the Python stubs in gen/, and the
# description of the REST interface, envoy/openapi.json and envoy/docs/index.html.
# Run through `make gen`; `make check-gen` shows whether the committed files are what this makes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
bin=$(dirname "$python")

rm -rf gen
mkdir gen
"$bin/buf" build --as-file-descriptor-set -o envoy/descriptors.binpb

# google/* comes from googleapis-common-protos; buf/validate has no wheel with _pb2 stubs, so it is made here.
sources=$(cd proto && find genmesh -name "*.proto" | LC_ALL=C sort; echo ext_authz/external_auth.proto)
# shellcheck disable=SC2086
PATH="$bin:$PATH" "$python" -m grpc_tools.protoc --descriptor_set_in=envoy/descriptors.binpb \
  --python_out=gen --grpc_python_out=gen --mypy_out=quiet:gen --mypy_grpc_out=quiet:gen $sources
"$python" -m grpc_tools.protoc --descriptor_set_in=envoy/descriptors.binpb --python_out=gen --pyi_out=gen buf/validate/validate.proto
find gen -type d -exec touch {}/__init__.py \;
rm gen/__init__.py
# Files without services still get an empty *_pb2_grpc.py.
for file in $(find gen -name '*_pb2_grpc.py' | LC_ALL=C sort); do
  grep -q 'Servicer' "$file" || rm "$file" "${file}i"
done

# With the stubs that were just made, wherever others may be installed.
PYTHONPATH="$PWD:$PWD/gen" "$python" -m edge.openapi
