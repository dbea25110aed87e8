"""What a run ends with: results.json, pictures and the report.

Three encoders stand side by side: the pretrained one, the same at random initialization (measured
by the run before its first step), and the raw input.
"""

import json
import platform
import resource
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastssl import __version__, distributed, pieces
from fastssl.config import RunConfig
from fastssl.files import write_atomically
from fastssl.report import write_report
from fastssl.run.evaluation import MEASURES
from fastssl.run.log import first_rank_writes

PACKAGES = ("torch", "deepspeed", "timm", "torchvision", "triton", "scikit-learn")


def summarize(
    cfg: RunConfig,
    encoders: Mapping[str, Mapping[str, Any]],
    progress: Mapping[str, Any],
    *,
    items: str,
    parameters: int,
    bad_images: int,
    command: str,
) -> dict[str, Any]:
    """What results.json holds.

    encoders: the measures of each, by name.  progress: the fields of the run's Progress.
    items: what the data are, in the plural.  bad_images: how many could not be read.
    """
    seconds = progress["seconds"]
    return {
        "method": cfg.method.name,
        "source": cfg.data.source.name,
        "items": items,
        "rows": [{"encoder": name, **_measures(row)} for name, row in encoders.items()],
        "train": {
            "loss": progress["last"].get("loss"),
            "images_per_s": progress["images"] / seconds if seconds else None,
            "data_wait": min(progress["waited"] / seconds, 1.0) if seconds else None,
            "peak_memory_bytes": peak_memory(),
            "seconds": seconds,
            "steps": progress["step"],
            "epochs": cfg.epochs,
            "parameters": parameters,
            "bad_images": bad_images,
            "skipped_steps": progress.get("skipped", 0),
        },
        "versions": versions(),
        "command": command,
    }


def write_summary(
    directory: Path, results: dict[str, Any], draw: Callable[[Path, list[dict[str, Any]]], None]
) -> None:
    """Write results.json, the pictures that `draw` makes beside baselines, and report.html.

    Collective.  Raises LogError, on every rank, where the disk refuses.
    """
    with first_rank_writes("the run is complete and saved, but its report is not written"):
        if distributed.rank() == 0:
            write_atomically(directory / "results.json", json.dumps(results, indent=1))
        draw(directory, results["rows"][1:])
        if distributed.rank() == 0:
            write_report(directory)


def count_parameters(module: torch.nn.Module) -> int:
    """Parameters of the whole module, also while an engine keeps only pieces here."""
    return sum(map(pieces.size, module.parameters()))


def peak_memory() -> int:
    """Bytes: the CUDA allocator's high-water mark, or the process's resident one on CPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "fastssl": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _measures(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: row[name] for name in MEASURES if name in row}
