"""Every case: importing this package registers them, in the order of the table."""

from fastssl.bench.cases import losses, matryoshka, correlation, ranks, kernels, patches, tokens  # noqa: F401, I001
from fastssl.bench.cases import optim, data, jpegs, train  # noqa: F401
from fastssl.bench.measure import memory
from fastssl.bench.registry import all_cases as all_cases
from fastssl.bench.registry import select as select

memory.PRELOAD.append(__name__)  # children of a measurement find the cases imported
