#!/bin/sh
# Starts asymtrack-track with the arguments given. Where ASYMTRACK_MODEL names an export directory and
# ASYMTRACK_ENGINES a volume, the export is copied there and its TensorRT engines are built first:
# minutes on the first start, nothing on the next unless the export or JetPack has changed.
set -eu

case "${1:-}" in
asymtrack-*) exec "$@" ;;
-h | --help | --version) exec asymtrack-track "$@" ;;
esac

model=${ASYMTRACK_MODEL:-}
if [ -n "$model" ] && [ -n "${ASYMTRACK_ENGINES:-}" ]; then
    own=$ASYMTRACK_ENGINES/$(basename "$model")
    # The models decide, not the manifest: building engines rewrites that one.
    if ! cmp -s "$model/search.onnx" "$own/search.onnx" || ! cmp -s "$model/template.onnx" "$own/template.onnx"; then
        rm -rf "$own.new" "$own"
        cp -r "$model" "$own.new"
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
