"""Pretraining from Python: a data set, a module, and the configuration's keys.

fastssl.pretrain("simclr", encoder, dataset, "epochs=100", "data.image_size=32", name="mine")
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastssl.config import ConfigError, from_mapping
from fastssl.config.load import overridden
from fastssl.data.datasets import divided
from fastssl.data.errors import DataError
from fastssl.data.sources.given import DatasetItems
from fastssl.data.streams import chosen, each_part
from fastssl.run.build import Encoders, Given
from fastssl.section import Section


def pretrain(
    method: str | Mapping[str, Any] | Section,
    model: str | Mapping[str, Any] | nn.Module,
    data: Any,
    *overrides: str,
    name: str,
    labels: Sequence[Any] | Tensor | None = None,
    test: Any = None,
    test_labels: Sequence[Any] | Tensor | None = None,
) -> dict[str, Any]:
    """Pretrain an encoder and return the run's results, as `fastssl pretrain` does; RUN/ has them.

    method: a method's name, or its keys: {"name": "simclr", "temperature": 0.2}; one's own is
    registered first (`fastssl.register_method`).
    model: any module from views (B, ...) to features (B, F), trained in place; or the name or keys
    of one (timm's); for a method that reads several streams also {"image": module, "depth": ...}.
    data: any torch Dataset of images (PIL, arrays, tensors) or other items, alone or in a tuple
    (x, ...), or of several streams, {"image": ..., "depth": ...}, all of which are read unless
    data.streams names some; or the name or keys of a source.  labels: of its items, for the
    evaluation alone; a data set's own `targets` are taken.  test: another data set to evaluate on,
    of which a fifth of `data` is held out otherwise.
    overrides: "key=value", as on the command line: "epochs=100", "optim.lr=1e-3".
    name: of the run, a directory under `output`.
    Raises ConfigError, DataError and EngineError, one sentence each, before anything is written,
    and what `fastssl.run.train.pretrain` raises.
    """
    from fastssl.run.train import pretrain as run

    encoder, keys = _model(model)
    mapping: dict[str, Any] = {"name": name, "method": _keys("method", method), "model": keys}
    items = None
    if isinstance(data, str | Mapping | Section):
        mapping["data"] = {"source": _keys("data", data)}
    else:
        items = DatasetItems(data, labels)
        named = any(text.startswith("data.streams") for text in overrides)
        streams = () if named else items.streams
        mapping["data"] = {"source": {"name": "given"}, "streams": {one: {} for one in streams}}
    cfg = from_mapping(overridden(mapping, overrides))
    split = None
    if items is not None:
        held = None if test is None else DatasetItems(test, test_labels)
        split = divided((items,) if held is None else (items, held), cfg.data.source, cfg.seed)
        split = each_part(split, lambda part: chosen(part, tuple(cfg.data.streams)))
        if held is not None and held.channels != items.channels:
            raise DataError(f"test has {held.channels} channels, and data {items.channels}")
    elif labels is not None or test is not None:
        raise ConfigError("labels and test are of a data set; a source has its own")
    return run(cfg, given=Given(encoder, split))


def _model(model: Any) -> tuple[Encoders, dict[str, Any]]:
    """The modules in what was given as a model, and the keys that stand for it."""
    if isinstance(model, nn.Module) and not isinstance(model, nn.ModuleDict):
        return model, {"name": "given"}
    streams = dict(model.items()) if isinstance(model, nn.ModuleDict | Mapping) else {}
    modules = {key: own for key, own in streams.items() if isinstance(own, nn.Module)}
    if not modules:
        return None, _keys("model", model)
    others = {key: own for key, own in streams.items() if key not in modules}
    named = {key: _keys(f"model[{key!r}]", own) for key, own in others.items()}
    return modules, {key: named.get(key, {"name": "given"}) for key in streams}


def _keys(what: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, Section):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return dict(value)
    raise ConfigError(f"{what} must be a name or a mapping of keys, got {type(value).__name__}")
