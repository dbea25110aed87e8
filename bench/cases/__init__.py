"""Every case: importing this package registers them, in the order of the table."""

from fastssl.bench.cases import losses, ranks, kernels, patches, optim, data, train  # noqa: F401, I001
