"""A watched child, without torch, whose cases go wrong as a GPU's may: python faulty.py CASE ..."""

import os
import signal
import sys
import time

from fastssl.bench.gpu.watched import Watch, run


def fine():
    return {"found": 7}


def wrong():
    return {"why": "off by 2"}


def raises():
    raise ValueError("first\n\n  second\nthird\nfourth")


def lost():
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")


def dies():
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs():
    Watch.told().write("note", hanging=True)
    time.sleep(600)


if __name__ == "__main__":
    if sys.argv[1:] == ["never"]:
        sys.exit("ModuleNotFoundError: No module named 'torch'")
    sys.exit(run([(f"{n} {name}", globals()[name]) for n, name in enumerate(sys.argv[1:])]))
