"""A method shown two samples before anything is written, so that what it does wrongly is named.

It runs once on the data's first two items, on the CPU, forward alone, and is left as it was.  Only
what is wrong of any batch is refused: a name that is not there, leaves that do not share their
rows, a loss that is none.  What else fails may do so for want of samples, or of a GPU: the run's
first step will tell, and leaves nothing behind either.
"""

from collections.abc import Callable
from typing import Any

import torch

from fastssl.config import ConfigError
from fastssl.data.loader import PretrainLoader
from fastssl.engine.engine import loss_of
from fastssl.engine.large_batch import check_rows
from fastssl.methods import Method
from fastssl.models import Buffers
from fastssl.run.build import LARGE
from fastssl.run.summary import count_parameters

ROWS = 2
_MISTAKES = (AttributeError, KeyError, NameError, TypeError)


class _Unknown(Exception):
    """It failed, and may not in the run."""


def rehearse(method: Method, loader: PretrainLoader) -> None:
    """Raise ConfigError or EngineError where `method` cannot train on these data whatever comes."""
    if count_parameters(method) > LARGE or len(loader.source) < ROWS:
        return
    batch = loader.first(ROWS)
    del batch["bad"]
    before = Buffers(method)
    try:
        with torch.random.fork_rng(devices=[]):
            _once(method.train(), batch)
    except _Unknown:
        pass
    finally:
        before.restore()


def _once(method: Method, batch: Any) -> None:
    batch = _called(method.prepare, batch)
    encoded = _called(method.encode, batch)
    check_rows(method, "encode", encoded, ROWS)
    with torch.no_grad():
        targets = _called(method.targets, batch)
    if targets is not None:
        check_rows(method, "targets", targets, ROWS)
        batch = {**batch, "targets": targets}
    loss_of(method, _called(method.loss, encoded, batch))


def _called(half: Callable[..., Any], *given: Any) -> Any:
    try:
        return half(*given)
    except _MISTAKES as error:
        owner: Any = half.__self__  # type: ignore[attr-defined]
        name = f"{type(owner).__name__}.{half.__name__}"
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(f"{name} fails on {ROWS} samples: {said}") from error
    except Exception as error:
        raise _Unknown from error
