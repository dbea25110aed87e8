"""The command `python -m fastssl.bench.precision`; cases/precision.py says what it does."""

from fastssl.bench.cases.precision import main

if __name__ == "__main__":
    main()
