"""Every case: importing this package registers them, in the order of the table."""

from fastssl.bench.cases import (  # noqa: F401
    correlation,
    data,
    jpegs,
    kernels,
    losses,
    matryoshka,
    optim,
    patches,
    ranks,
    teachers,
    tokens,
    train,
)  # noqa: F401, I001
from fastssl.bench.measure import memory
from fastssl.bench.registry import all_cases as all_cases
from fastssl.bench.registry import select as select

memory.PRELOAD.append(__name__)  # children of a measurement find the cases imported
