#!/usr/bin/env bash
# Installs fastssl into a virtual environment over a Python that may have a torch of its own.
#
#   docker/install.sh VENV EXTRAS [arguments of pip install ...]
#
#   VENV    made with $PYTHON (default: python3) when it is not there; it sees that Python's packages
#   EXTRAS  of pyproject.toml: train, or train,dev
#
# What the Python has of torch, triton, numpy, apex and DALI stays as it is: NVIDIA's image builds
# them for each other, and a wheel from PyPI would bring another CUDA.  Their versions are
# constraints, so that pip stops at a conflict.  A constraint does not see another package with the
# same module in it (pytorch-triton and triton), so what Python finds is compared as well.
set -euo pipefail

venv=${1:?"usage: docker/install.sh VENV EXTRAS [arguments of pip install ...]"}
extras=${2:?"EXTRAS is missing: train, or train,dev"}
shift 2
source=$(cd "$(dirname "$0")/.." && pwd)
python=$venv/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

found() { # module and file, one a line, of what is to stay
    "$python" -I - <<'END'
from importlib.util import find_spec

for name in ("torch", "torchvision", "triton", "numpy", "apex", "nvidia.dali"):
    try:
        spec = find_spec(name)
    except ModuleNotFoundError:  # the package that holds it
        continue
    if spec is not None:
        print(name, spec.origin)
END
}

# pip of the Python underneath serves; Debian's and Ubuntu's venv could not bring one anyway.
[ -e "$python" ] || "${PYTHON:-python3}" -m venv --system-site-packages --without-pip "$venv"
"$python" -m pip list --format=freeze >"$work/all"
grep -iE '^(torch|triton|pytorch-triton|numpy|apex|nvidia)' "$work/all" >"$work/stays" || true
found | LC_ALL=C sort >"$work/before"
"$python" -m pip install --constraint "$work/stays" "$@" "${source}[$extras]"
found | LC_ALL=C sort >"$work/after"
if ! LC_ALL=C comm -23 "$work/before" "$work/after" >"$work/lost" || [ -s "$work/lost" ]; then
    echo "install.sh: these were to stay, and another would be imported now:" >&2
    cat "$work/lost" >&2
    exit 1
fi
