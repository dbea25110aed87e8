"""A run's results in words and in human units."""

import math
from typing import Any

_METHODS = {
    **{"simclr": "SimCLR", "dcl": "DCL", "mocov3": "MoCo v3", "nnclr": "NNCLR", "clip": "CLIP"},
    **{"cmc": "CMC"},
    **{"barlow_twins": "Barlow Twins", "mixed_barlow_twins": "Mixed Barlow Twins"},
    **{"ssl_ey": "SSL-EY", "groco": "GroCo", "mochi": "MoCHi", "isogclr": "iSogCLR"},
    **{"matryoshka": "Matryoshka", "sla": "SLA", "sit": "SiT", "cae": "CAE"},
    **{"selfie": "Selfie"},
    **{"vicreg": "VICReg", "sie": "SIE", "mae": "MAE", "simmim": "SimMIM", "gmml": "GMML"},
    **{"ijepa": "I-JEPA", "tjepa": "T-JEPA", "cropmae": "CropMAE", "videomae": "VideoMAE V2"},
    **{"signal_mae": "MAE of signals", "point_mae": "Point-MAE", "point_cmae": "Point-CMAE"},
    **{"global_local": "Global-local contrast", "byol": "BYOL", "directpred": "DirectPred"},
    **{"simsiam": "SimSiam", "mocov2": "MoCo v2", "swav": "SwAV", "msn": "MSN"},
}
PRETRAINED, RANDOM, RAW = "pretrained", "random initialization", "raw input"


def method_name(results: dict[str, Any]) -> str:
    """The method as its paper writes it.

    >>> method_name({"method": "barlow_twins"})
    'Barlow Twins'
    """
    name = str(results.get("method", ""))
    return _METHODS.get(name, name)


def title(results: dict[str, Any]) -> str:
    """What was pretrained on what.

    >>> title({"method": "mae", "source": "digits"})
    'MAE on digits'
    """
    method, source = method_name(results), str(results.get("source", ""))
    return " on ".join(word for word in (method, source) if word) or "A pretraining run"


def items(results: dict[str, Any]) -> str:
    """What the run's data are, in the plural.

    >>> items({"items": "clips"}), items({})
    ('clips', 'images')
    """
    return str(results.get("items") or "images")


def number(value: Any) -> bool:
    """Whether `value` is a finite number (a bool is none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def percent(share: float) -> str:
    """A share in [0, 1] with one decimal; the space does not break.

    >>> percent(0.97531)
    '97.5\xa0%'
    """
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def duration(seconds: float) -> str:
    """
    >>> [duration(s) for s in (3.21, 75, 7260, 180000)]
    ['3.2 s', '1 min 15 s', '2 h 1 min', '2 d 2 h']
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, big, small, name in ((86400, "d", "h", 3600), (3600, "h", "min", 60)):
        if whole >= unit:
            return f"{whole // unit} {big} {whole % unit // name} {small}"
    return f"{whole // 60} min {whole % 60} s"


def scaled(value: float, unit: str = "") -> str:
    """Three significant digits with a decimal prefix.

    >>> scaled(2_670_000), scaled(1.5e9, "B"), scaled(812), scaled(0.4312)
    ('2.67 M', '1.5 GB', '812', '0.431')
    """
    prefix = ""
    for factor, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor * 0.9995:
            value, prefix = value / factor, name
            break
    return f"{value:.3g} {prefix}{unit}".strip()


def headline(results: dict[str, Any]) -> str:
    """The result in one sentence, the unpleasant one included; "" when nothing was measured.

    >>> headline({"method": "mae", "rows": [{"encoder": "pretrained", "rankme": 61.2}]})
    'The MAE features use about 61 dimensions (RankMe).'
    """
    rows = {row["encoder"]: row for row in rows_of(results) if "encoder" in row}
    ours = rows.get(PRETRAINED, {})
    name = method_name(results) or "pretrained"
    measures = {"linear": "A linear probe on", "knn": "A nearest-neighbor vote among"}
    for key, measure in measures.items():
        if not number(ours.get(key)):
            continue
        sentence = (
            f"{measure} the {name} features is right for {percent(ours[key])} "
            f"of the held-out {items(results)}"
        )
        others = {RANDOM: "the same encoder before training", RAW: "the raw input"}
        against = [
            (rows[encoder][key], words)
            for encoder, words in others.items()
            if number(rows.get(encoder, {}).get(key))
        ]
        if against:
            listed = " and ".join(f"{percent(value)} for {words}" for value, words in against)
            sentence += f", against {listed}"
        sentence += "."
        beaten = [words for value, words in against if value >= ours[key]]
        if beaten:
            sentence += f" It does not beat {' or '.join(beaten)}."
        return sentence
    if number(ours.get("rankme")):
        return f"The {name} features use about {ours['rankme']:.0f} dimensions (RankMe)."
    return ""


def rows_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the results that are objects: one for each encoder that was measured."""
    rows = results.get("rows")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
