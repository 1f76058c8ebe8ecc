#!/bin/sh
# Installs asymtrack-edge from the source tree in $1 into the virtual environment $2.
# Run by the images, and by check-arm64.sh on a Debian arm64 root: the same steps in both.
#
#   install.sh SOURCE VENV [EXTRAS]
#
# SYSTEM_PACKAGES=1 lets the environment see the system's packages: JetPack's tensorrt is there and
# nowhere else. CONSTRAINTS names a file of pinned versions (default: docker/constraints.txt).
set -eu

source=$1
venv=$2
extras=${3:-}

options=
if [ "${SYSTEM_PACKAGES:-0}" = 1 ]; then options=--system-site-packages; fi
# shellcheck disable=SC2086
python3 -m venv $options "$venv"
# JetPack 5's pip predates the wheel tags of today: it must come first.
"$venv/bin/pip" install --no-cache-dir --quiet "pip>=24" "setuptools>=64" wheel
"$venv/bin/pip" install --no-cache-dir --quiet \
    --constraint "${CONSTRAINTS:-$source/docker/constraints.txt}" \
    "$source${extras:+[$extras]}"
"$venv/bin/asymtrack-track" --version
