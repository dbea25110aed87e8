"""fastssl: fast self-supervised pretraining in PyTorch.

fastssl.losses     drop-in losses, memory-lean and exact across ranks (torch alone)
fastssl.kernels    the primitives they are made of
fastssl pretrain   the engine, from the command line; fastssl.pretrain(...) from Python

fastssl.register_method, register_source, register_views, register_model, register_schedule and
register_batch_op add one's own, which a configuration then names: docs/extend.md.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastssl.data.batch.ops import register_batch_op as register_batch_op
    from fastssl.data.datasets import register_source as register_source
    from fastssl.data.views.spec import register_views as register_views
    from fastssl.methods import register_method as register_method
    from fastssl.models import register_model as register_model
    from fastssl.run.given import pretrain as pretrain
    from fastssl.schedules.config import register_schedule as register_schedule

__version__ = "0.1.0"

_FROM = {
    "pretrain": "fastssl.run.given",
    "register_method": "fastssl.methods",
    "register_source": "fastssl.data.datasets",
    "register_views": "fastssl.data.views.spec",
    "register_model": "fastssl.models",
    "register_schedule": "fastssl.schedules.config",
    "register_batch_op": "fastssl.data.batch.ops",
}


def __getattr__(name: str) -> Any:
    """Imported when it is first asked for, so that a user of the losses needs torch alone."""
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_FROM[name]), name)
