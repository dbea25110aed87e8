"""Every case: importing this package registers them, in the order of the table."""

from fastssl.bench.cases import losses, correlation, ranks, kernels, patches, tokens  # noqa: F401, I001
from fastssl.bench.cases import optim, data, jpegs, train  # noqa: F401
