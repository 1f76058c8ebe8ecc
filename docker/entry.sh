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
    # Docker makes an empty directory where there is none to mount.
    if [ ! -e "$model/manifest.json" ]; then
        echo "error: $model has no manifest.json: mount a directory written by asymtrack-export, by its absolute path" >&2
        exit 2
    fi
    # Exports for different --batch have the same networks. Building engines rewrites the copy's manifest, so the
    # export's own is kept beside it.
    if ! cmp -s "$model/manifest.json" "$own/exported.json" ||
        ! cmp -s "$model/search.onnx" "$own/search.onnx" || ! cmp -s "$model/template.onnx" "$own/template.onnx"; then
        rm -rf "$own.new" "$own"
        cp -rL "$model" "$own.new" # not the links: asymtrack-build refuses them
        chmod -R u+w "$own.new"
        cp "$own.new/manifest.json" "$own.new/exported.json"
        mv "$own.new" "$own"
    fi
    asymtrack-build "$own" &
    builder=$!
    # This shell is process 1, which a signal without a trap does not end.
    trap 'kill "$builder"; exit 143' HUP INT TERM
    wait "$builder"
    model=$own
fi

# The command line's own options come last, so they win.
if [ -n "$model" ]; then set -- --model "$model" "$@"; fi
if [ -n "${ASYMTRACK_BACKEND:-}" ]; then set -- --backend "$ASYMTRACK_BACKEND" "$@"; fi
if [ -n "${ASYMTRACK_PRECISION:-}" ]; then set -- --precision "$ASYMTRACK_PRECISION" "$@"; fi
exec asymtrack-track "$@"
