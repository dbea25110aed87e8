"""Where the packages live: kernels/ and bench/ stand at the top level of the tree, because they are
what people come to read, and install as fastssl.kernels and fastssl.bench, because a top-level
`kernels` would collide with the PyPI package of that name."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["fastssl", "fastssl.*"]),
        "fastssl.recipes",
        *("fastssl." + name for name in find_packages(include=["kernels*", "bench*"])),
    ],
    package_dir={"fastssl.kernels": "kernels", "fastssl.bench": "bench"},
    package_data={
        "fastssl": ["py.typed"],
        "fastssl.config": ["keys.json"],
        "fastssl.report": ["templates/*.j2"],
        "fastssl.recipes": ["*.yaml"],
        "fastssl.kernels.common": ["tuned.json"],
        "fastssl.bench.report": ["templates/*.j2"],
    },
)
