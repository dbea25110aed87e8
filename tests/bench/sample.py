"""A made-up run with every kind of row: nothing in it was ever measured."""

from fastssl.bench.record import Ceiling, Published, Result, Run, Spread

EVIL = "<script>alert('&')</script>"
CEILINGS = [
    Ceiling("copy", 4000.0, "GB/s", 4800.0, "made-up datasheet"),
    Ceiling("matmul float32", 50.0, "TFLOP/s", 67.0, "made-up datasheet"),
    Ceiling("matmul bfloat16", 700.0, "TFLOP/s", 989.5, "made-up datasheet"),
]
CONDITIONS = {
    "device": "Imaginary GPU",
    "type": "cuda",
    "arch": "sm_90",
    "driver": "999.1",
    "cuda": "13.0",
    "threads": 8,
    "float32_products": "highest",
    "python": "3.12.1",
    "versions": {"torch": "2.15.0", "triton": "3.9.0", "lightly": "1.5.26"},
    "commit": "0123456789ab",
    "command": "python -m fastssl.bench ntxent 'clip*'",
    "time": "2026-11-20T12:00:00+00:00",
}


STEP = {"fwd": 1 / 3, "bwd": 2 / 3, "step": 1.0}


def timed(case, shape, rival, ms, *, dtype="float32", x=None, parts=STEP, **rest):
    """A row with a time: forward a third of it, quantiles 5 % to either side."""
    spreads = {
        part: Spread(0.95 * share * ms, share * ms, 1.05 * share * ms)
        for part, share in parts.items()
    }
    ends = {} if x is None else {"x": x, "x_low": 0.97 * x, "x_high": 1.04 * x}
    fields = {"ms": spreads, "rounds": 31, "noise": 0.01, "peak": 12_000_000, **ends, **rest}
    fields["gate"] = f"tests/test_{case}.py; live at N=64"
    return Result(case, dict(shape), dtype, rival, **fields)


def untimed(case, shape, rival, status, why, dtype="float32"):
    """A row without a time."""
    return Result(case, dict(shape), dtype, rival, status=status, why=why)


def work(flops, bytes_moved, floor):
    """The fields that say what the problem needs."""
    return {
        "flops": {"fwd": flops / 3, "bwd": 2 * flops / 3},
        "bytes_moved": {"fwd": bytes_moved / 2, "bwd": bytes_moved / 2},
        "floor": floor,
    }


def fixed_rows():
    """Measurements at one shape: faster, tie, slower, alone, and no time for ours."""
    shape = {"N": 8192, "D": 128}
    heavy = work(8e10, 1.7e7, 1.6)
    rows = [
        timed("ntxent", shape, "fastssl", 2.0, x=1.0, **heavy),
        timed("ntxent", shape, "reference", 11.0, x=5.5, **heavy | {"peak": 1_600_000_000}),
        timed("ntxent", shape, "lightly", 9.0, x=4.5, **heavy | {"peak": 800_000_000}),
        untimed("ntxent", shape, "compile", "out of memory", "CUDA out of memory. Tried 32 GiB"),
        untimed("ntxent", shape, "pytorch-metric-learning", "wrong", "gradient 0 is off by 0.1"),
        untimed("ntxent", shape, "authors", "absent", "pip install authors " + 12 * "really "),
    ]
    tied, lost = {"B": 512, "D": 512}, {"B": 64, "D": 512}
    images = {"parts": {"run": 1.0}, "items": 256, "unit": "images"}
    light = work(1e9, 4e7, 0.01)
    rows += [
        timed("clip", tied, "fastssl", 0.5, x=1.0, **light),
        timed("clip", tied, "reference", 0.9, x=1.8, **light),
        timed("clip", tied, "open_clip", 0.505, x=1.01, tie=True, **light),
        timed("clip", lost, "fastssl", 0.2, x=1.0, **light),
        timed("clip", lost, "open_clip", 0.1, x=0.5, **light),
        timed("clip", lost, "reference", 0.3, x=1.5, **light),
        untimed("siglip", lost, "fastssl", "wrong", "value is off by 1e-2"),
        timed("siglip", lost, "siglip-kernel", 0.4, **light),
        timed("train-mae", {"batch": 256}, "fastssl", 300.0, x=1.0, **images),
    ]
    half = {"dtype": "bfloat16", **work(8e10, 8.5e6, 0.12)}
    return rows + [
        timed("ntxent", shape, "fastssl", 0.4, x=1.0, **half),
        timed("ntxent", shape, "reference", 2.0, x=5.0, **half),
    ]


def sweep_rows():
    """Ours grows like N**2 in time and N in memory, the reference like N**2 in both, then fails."""
    rows = []
    for n in (256, 512, 1024, 2048, 4096, 8192, 16384):
        shape = {"N": n, "D": 128}
        need = work(1e3 * n**2, 1e3 * n, 2e-8 * n**2)
        mine, theirs = 0.2 + 3e-8 * n**2, 0.3 + 2e-7 * n**2
        rest = {"sweep": "N", **need}
        rows.append(timed("ntxent", shape, "fastssl", mine, x=1.0, **rest | {"peak": 1024 * n}))
        if n < 16384:
            peak = {"peak": 12 * n**2}
            rows.append(timed("ntxent", shape, "reference", theirs, x=theirs / mine, **rest | peak))
        else:
            gone = Result("ntxent", shape, "float32", "reference", "out of memory", sweep="N")
            rows.append(gone)
    return rows


def run(**change):
    """The whole run; `change` replaces fields of Run."""
    quoted = Published(
        "clip", "Inf", "8 GPUs", "B=64k", "float16", "0.36 GB", "https://x.org/1?a=b&c"
    )
    fields = {
        "conditions": dict(CONDITIONS),
        "ceilings": list(CEILINGS),
        "results": fixed_rows() + sweep_rows(),
        "published": [quoted],
        "seconds": 75.0,
    }
    return Run(**{**fields, **change})
