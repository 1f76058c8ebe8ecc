#!/bin/sh
# Starts asymtrack-track with the given arguments. If ASYMTRACK_MODEL names an export directory and
# ASYMTRACK_ENGINES a volume, the export is first copied there and its TensorRT engines are built. This takes
# minutes at the first start; later starts reuse the engines unless the export or JetPack has changed.
set -eu

case "${1:-}" in
asymtrack-*) exec "$@" ;;
-h | --help | --version) exec asymtrack-track "$@" ;;
esac

model=${ASYMTRACK_MODEL:-}
if [ -n "$model" ] && [ -n "${ASYMTRACK_ENGINES:-}" ]; then
    own=$ASYMTRACK_ENGINES/$(basename "$model")
    # Compare the models, not the manifest: building engines rewrites the manifest.
    if ! cmp -s "$model/search.onnx" "$own/search.onnx" || ! cmp -s "$model/template.onnx" "$own/template.onnx"; then
        rm -rf "$own.new" "$own"
        cp -rL "$model" "$own.new" # not the links: asymtrack-build refuses them
        chmod -R u+w "$own.new"
        mv "$own.new" "$own"
    fi
    asymtrack-build "$own"
    model=$own
fi

if [ -n "$model" ]; then set -- "$@" --model "$model"; fi
if [ -n "${ASYMTRACK_BACKEND:-}" ]; then set -- "$@" --backend "$ASYMTRACK_BACKEND"; fi
if [ -n "${ASYMTRACK_PRECISION:-}" ]; then set -- "$@" --precision "$ASYMTRACK_PRECISION"; fi
exec asymtrack-track "$@"
