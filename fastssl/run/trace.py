"""What torch does in a few steps, on a time line: for chrome://tracing, or ui.perfetto.dev."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.profiler import profile, schedule

SKIPPED, RECORDED = 3, 3  # steps: the first ones compile, allocate and warm up


def traced(batches: Iterator[Any], path: Path | None) -> Iterator[Any]:
    """The batches as they are; of the RECORDED steps after SKIPPED a trace is written to `path`.

    path: None for no trace.  A run that ends before has none.
    """
    if path is None:
        yield from batches
        return
    which = schedule(wait=SKIPPED - 1, warmup=1, active=RECORDED, repeat=1)
    with profile(
        schedule=which, on_trace_ready=lambda done: done.export_chrome_trace(str(path))
    ) as recording:
        for batch in batches:
            yield batch
            recording.step()
