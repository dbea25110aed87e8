"""Pictures of a run and one self-contained HTML page that gathers them."""

from fastssl.report.curves import plot_curves
from fastssl.report.embedding import plot_embedding
from fastssl.report.html import write_report
from fastssl.report.reconstructions import plot_reconstructions
from fastssl.report.run_files import read_metrics
from fastssl.report.views import PICTURED, plot_views

__all__ = [
    "PICTURED",
    "plot_curves",
    "plot_embedding",
    "plot_reconstructions",
    "plot_views",
    "read_metrics",
    "write_report",
]
