#!/bin/sh
# Tests the images' install steps without a Docker engine or an ARM machine. debootstrap makes a Debian
# arm64 root, which qemu-user runs. There install.sh installs the package, asymtrack-track follows an
# object over ten frames on ONNX Runtime, and asymtrack-check compares OpenVINO with ONNX Runtime.
#
#   sudo docker/check-arm64.sh [MODEL] [ROOT]
#
# MODEL is an export directory (default: the bundled T). ROOT is where the system is made and kept for
# the next run (default: /var/cache/asymtrack-arm64). Needs debootstrap and qemu-user-static. Takes
# minutes, mostly for downloads. The Python is Debian's, not JetPack's.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
model=${1:-}
root=${2:-/var/cache/asymtrack-arm64} # not in /var/tmp: others could put a system there for root to run
mirror=${MIRROR:-http://deb.debian.org/debian}

say() { printf '== %s\n' "$*"; }

[ "$(id -u)" = 0 ] || { echo "error: run it as root (chroot, mount)" >&2; exit 2; }
for tool in debootstrap qemu-aarch64-static; do
    command -v "$tool" >/dev/null || { echo "error: $tool is missing: apt-get install debootstrap qemu-user-static" >&2; exit 2; }
done

# The kernel must know what runs ARM programs. If it does not, qemu is registered for this run only.
binfmt=/proc/sys/fs/binfmt_misc
registered=
[ -e $binfmt/register ] || mount -t binfmt_misc none $binfmt
if [ ! -e $binfmt/qemu-aarch64 ]; then
    printf '%s' ':qemu-aarch64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:/usr/bin/qemu-aarch64-static:F' > $binfmt/register
    registered=1
fi
finish() {
    umount "$root/sys" "$root/proc" 2>/dev/null || true
    if [ -n "$registered" ]; then echo -1 > $binfmt/qemu-aarch64; fi
}
trap finish EXIT INT TERM

if [ ! -e "$root/.complete" ]; then
    say "making a Debian arm64 root in $root"
    rm -rf "$root"
    debootstrap --arch=arm64 --variant=minbase \
        --include=python3,python3-venv,ca-certificates,libgl1,libglib2.0-0 bookworm "$root" "$mirror" >"$root.log" 2>&1 ||
        { tail -5 "$root.log" >&2; exit 1; }
    touch "$root/.complete"
fi
mountpoint -q "$root/proc" || mount -t proc proc "$root/proc"
mountpoint -q "$root/sys" || mount -t sysfs -o ro sysfs "$root/sys" # onnxruntime reads the processors from it
cp /etc/resolv.conf "$root/etc/resolv.conf"
# The root must trust the same certificates as this machine, for example those of a company proxy.
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
unset PIP_FIND_LINKS
# Emulates a core of the Jetsons' generation; qemu's default core has extensions that nothing here needs.
export QEMU_CPU="${QEMU_CPU:-cortex-a76}"

say "installing the package as the images do"
rm -rf "$root/src" "$root/opt/asymtrack"
mkdir -p "$root/src"
tar -C "$here" --exclude=./.git --exclude='./.venv*' --exclude=./build --exclude='*.egg-info' --exclude=./runs \
    --exclude=./exports -cf - setup.cfg pyproject.toml README.md LICENSE asymtrack_edge export runtime benchmarks docker |
    tar -C "$root/src" -xf -
chroot "$root" /bin/sh /src/docker/install.sh /src /opt/asymtrack openvino
chroot "$root" uname -m

say "tracking ten frames"
if [ -n "$model" ]; then
    rm -rf "$root/model"
    cp -r "$model" "$root/model"
fi
chroot "$root" /opt/asymtrack/bin/python - <<'PYTHON'
import os
import cv2
import numpy as np

os.makedirs("/frames", exist_ok=True)
random = np.random.RandomState(0)
scene = cv2.resize(random.randint(0, 120, (12, 16, 3)).astype(np.uint8), (320, 240))
patch = cv2.resize(random.randint(120, 256, (6, 6, 3)).astype(np.uint8), (48, 48))
for i in range(10):
    frame = scene.copy()
    frame[90 : 90 + 48, 60 + 4 * i : 108 + 4 * i] = patch
    cv2.imwrite(f"/frames/{i:02}.png", frame)
PYTHON
model=$([ -n "$model" ] && echo /model || echo T)
chroot "$root" /opt/asymtrack/bin/asymtrack-track /frames --box 60,90,48,48 --model "$model" --boxes /boxes.csv --json
test "$(wc -l < "$root/boxes.csv")" = 11
cat "$root/boxes.csv"
say "checking OpenVINO"
chroot "$root" /opt/asymtrack/bin/asymtrack-check "$model" --backend openvino --clip /frames --box 60,90,48,48
chroot "$root" /opt/asymtrack/bin/python -c "
import platform, sys, cv2, numpy, onnxruntime, openvino
print(platform.machine(), 'Python', sys.version.split()[0], 'numpy', numpy.__version__, 'OpenCV', cv2.__version__,
      'onnxruntime', onnxruntime.__version__, 'OpenVINO', openvino.__version__)"
say "passed"
