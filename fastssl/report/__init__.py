"""Pictures of a run and one self-contained HTML page that gathers them."""

from fastssl.report.curves import plot_curves as plot_curves
from fastssl.report.embedding import plot_embedding as plot_embedding
from fastssl.report.html import write_report as write_report
from fastssl.report.reconstructions import plot_reconstructions as plot_reconstructions
from fastssl.report.run_files import read_metrics as read_metrics
from fastssl.report.views import PICTURED as PICTURED
from fastssl.report.views import plot_views as plot_views
