#!/bin/sh
# Installs asymtrack-edge from the source tree in $1 into the virtual environment $2.
# The image builds run it, and so does check-arm64.sh in a Debian arm64 root.
#
#   install.sh SOURCE VENV [EXTRAS]
#
# SYSTEM_PACKAGES=1 lets the environment use the system's packages, the only source of JetPack's
# tensorrt. CONSTRAINTS names a file of pinned versions (default: docker/constraints.txt).
set -eu

source=$1
venv=$2
extras=${3:-}

options=
if [ "${SYSTEM_PACKAGES:-0}" = 1 ]; then options=--system-site-packages; fi
# shellcheck disable=SC2086
python3 -m venv $options "$venv"
# JetPack 5's pip does not know current wheel tags, so it is upgraded first.
"$venv/bin/pip" install --no-cache-dir --quiet "pip>=24" "setuptools>=64" wheel
"$venv/bin/pip" install --no-cache-dir --quiet \
    --constraint "${CONSTRAINTS:-$source/docker/constraints.txt}" \
    "$source${extras:+[$extras]}"
"$venv/bin/asymtrack-track" --version
