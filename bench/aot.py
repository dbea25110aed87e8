"""The command `python -m fastssl.bench.aot`; compiler/aot.py says what it does."""

import sys

from fastssl.bench.compiler.aot import main

if __name__ == "__main__":
    sys.exit(main())
