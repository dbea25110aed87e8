"""The command `python -m fastssl.bench.tune`; compiler/tune.py says what it does."""

import sys

from fastssl.bench.compiler.tune import main

if __name__ == "__main__":
    sys.exit(main())
