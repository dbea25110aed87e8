"""Contact sheets of every augmentation: what a preset makes of four photographs, by both back ends.

    python docs/make_views.py docs/views

For each preset of images OUT/PRESET.png: a row a photograph, and for each kind of view up to two,
side by side as torchvision makes them, as DALI makes the same draws, and, where colors change, as
torchvision makes them one by one (the others in one linear map).  OUT/batch-ops.png has what is
done to whole batches, OUT/clips.png and OUT/volumes.png what is no single image, OUT/streams.png
two streams that share their places.  OUT/README.md shows them all.  The photographs are the two
that come with scikit-learn.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import TypeAdapter
from sklearn.datasets import load_sample_images
from torch import Tensor

from fastssl.data.batch.ops import AnyBatchOp, apply_batch_ops
from fastssl.data.loader import PretrainLoader
from fastssl.data.render.backend import Rendering, choose_backend
from fastssl.data.sources.base import Source
from fastssl.data.sources.folder import scan_folder
from fastssl.data.streams import chosen
from fastssl.data.synthetic.clips import ClipsSource
from fastssl.data.synthetic.reliefs import ReliefsSource
from fastssl.data.synthetic.volumes import VolumesSource
from fastssl.data.views.image import View, Views, preset
from fastssl.data.views.presets import PRESETS
from fastssl.data.views.spec import ViewSpec, apply, view_spec
from fastssl.data.views.streams import StreamViews, of_stream
from fastssl.report.figure import new_figure, png_of

CELL, GAP, HEAD, SIDE = 88, 4, 54, 8  # pixels: of a cell, between them, above and beside all
DPI, COLORS = 100, 256  # of the palette that keeps a sheet small
SIZE, SEED = 224, 5
SAID = "one by one"
OPS = ("mixup", "noise", "style", "fields", "low_frequency")
OTHERS = {
    "batch-ops": "Operations on a batch, each alone and as it comes.",
    "clips": "Clips: eight frames of each as it is, and of a view of it.",
    "streams": "Two streams, generated surfaces lit and their depths: two views of each by both "
    "back ends. `data.streams.depth.shares=image` gives a depth the places of its image; the "
    "colors of the image alone change.",
    "volumes": "Volumes: eight slices of each as it is, and of a view of it.",
}


class Column(NamedTuple):
    """images: one a row, (C, H, W) in [0, 1].  group: what the columns next to it share."""

    label: str
    images: Sequence[Tensor]
    group: str = ""


def photographs(folder: Path) -> Source:
    """Four of them as JPEG files in `folder`: two whole, and a part of each."""
    whole = [Image.fromarray(x) for x in load_sample_images().images]
    parts = [whole[0].crop((150, 20, 470, 340)), whole[1].crop((220, 60, 520, 400))]
    for k, photo in enumerate([*whole, *parts]):
        photo.save(folder / f"{k}.jpg", quality=95)
    return scan_folder(folder)[0]


def views_of(source: Source, views: Views, *, dali: bool = False) -> list[Tensor]:
    """Every view of every photograph, (n, 3, size, size) in [0, 1] each, in the source's order."""
    rendering = Rendering(threads=2) if dali else None
    loader = PretrainLoader(source, views, batch_size=len(source), seed=SEED, rendering=rendering)
    batch = next(loader.stream(0, 1))
    order = batch["index"].argsort()
    return [views.shown(view.float())[order] for view in batch["views"]]


def preset_columns(source: Source, name: str) -> list[Column]:
    """The columns of a preset's sheet, the photographs first."""
    views = preset(name, SIZE, color="linear")
    made = {"torchvision": views_of(source, views)}
    if choose_backend("auto", views, source).backend == "dali":
        made["DALI"] = views_of(source, views, dali=True)
    if any(view.jitter for view in views.views):
        made[SAID] = views_of(source, preset(name, SIZE))
    columns = [Column("", [source.item(i) / 255 for i in range(len(source))], "photograph")]
    for v in _shown(views):
        group = f"view {v + 1} of {views.count}, {views.crops[v].size} pixels"
        columns += [Column(how, list(some[v]), group) for how, some in made.items()]
    return columns


def _shown(views: Views) -> Iterator[int]:
    """Of each kind of view the numbers of its first two."""
    first = 0
    for view in views.views:
        yield from range(first, first + min(view.count, 2))
        first += view.count


def batch_op_columns(source: Source) -> list[Column]:
    """A column an operation, on a batch of the photographs' centers."""
    views = preset("plain", SIZE)
    pixels = views_of(source, views)[0]
    norm = views.normalization(3)
    mean, std = (torch.tensor(v)[:, None, None] for v in norm)
    batch = {"views": [(pixels - mean) / std], "seeds": torch.arange(len(pixels)) + SEED}
    columns = [Column("as it is", list(pixels))]
    for name in OPS:
        op = TypeAdapter(AnyBatchOp).validate_python({"name": name})
        (changed,) = apply_batch_ops([op], batch, 0.0, norm)["views"]
        border = (SIZE - changed.shape[-1]) // 2  # of one that is smaller now
        shown = F.pad(views.shown(changed), 4 * [border], value=1.0)
        columns.append(Column(name, list(shown)))
    return columns


def stream_columns() -> list[Column]:
    """An image and its depth as they are, and two views of both, by either back end."""
    (source,) = ReliefsSource(per_class=1, size=160, seed=SEED).open()
    rows = chosen(source.select(np.array([1, 2, 3, 7])), source.streams)
    look = {"crop_scale": (0.2, 0.6), "rotate": 30, "color": "linear"}
    image = preset("simclr", 128, blur=0, grayscale=0, **look)
    depth = Views(views=(View(size=128, count=2),), mean=(0.5,), std=(0.25,))
    views = StreamViews({"image": image, "depth": depth}, {"depth": "image"})
    as_it_is = [rows.item(i) for i in range(len(rows))]
    columns = [Column(n, [item[n] / 255 for item in as_it_is], "as it is") for n in rows.streams]
    for how, rendering in (("torchvision", None), ("DALI", Rendering(threads=2))):
        loader = PretrainLoader(rows, views, batch_size=4, seed=SEED, rendering=rendering)
        batch = next(loader.stream(0, 1))
        order = batch["index"].argsort()
        for v in range(2):
            for name, own in batch["views"].items():
                shown = of_stream(views, name).shown(own[v].float())[order]
                columns.append(Column(name, list(shown), f"view {v + 1}, {how}"))
    return columns


def strip_columns(source: Source, views: ViewSpec, count: int = 3) -> list[Column]:
    """Eight columns: for each of `count` items a row of frames or slices, and a row of a view's."""
    rows: list[Tensor] = []
    for k in range(count):
        item = source.item(k * len(source) // count)
        whole = item.float() / 255 if item.dtype == torch.uint8 else item.float()
        view = apply(views, item, SEED + k)[0]
        rows += [whole, views.shown(view[None])[0]]
    frames = [[row[:, t] for t in _spread(row.shape[1])] for row in rows]
    return [Column(f"{t + 1}", [row[t] for row in frames]) for t in range(8)]


def _spread(length: int) -> list[int]:
    return np.linspace(0, length - 1, 8).round().astype(int).tolist()


def draw(
    columns: Sequence[Column],
    title: str,
    path: Path,
    *,
    row_labels: Sequence[str] = (),
    cell: int = CELL,
) -> None:
    """Write `path` (PNG, with a palette): the columns under their labels and the title."""
    rows, step = len(columns[0].images), cell + GAP
    lefts, x = [], SIDE + (44 if row_labels else 0)
    for before, column in zip([columns[0], *columns], columns, strict=False):
        x += 2 * GAP if column.group != before.group else 0
        lefts.append(x)
        x += step
    wide, high = max(x - GAP + SIDE, 3 * cell), HEAD + rows * step - GAP + SIDE
    figure = new_figure(wide / DPI, high / DPI, DPI)
    figure.set_layout_engine("none")  # every place is given

    def text(x: float, y: float, said: str, **how: Any) -> None:
        figure.text(x / wide, 1 - y / high, said, **{"fontsize": 6.5, **how})

    text(SIDE, 16, title, fontsize=9, weight="bold")
    for k, (left, column) in enumerate(zip(lefts, columns, strict=True)):
        for row, image in enumerate(column.images):
            top = HEAD + row * step
            figure.figimage(_cell(image, cell), left, high - top - cell, origin="upper")
        text(left + cell / 2, HEAD - 4, column.label, ha="center")
        if column.group and (k == 0 or columns[k - 1].group != column.group):
            text(left, HEAD - 18, column.group, color="#555")
    for row, label in enumerate(row_labels):
        text(SIDE, HEAD + row * step + cell / 2, label, va="center")
    drawn = Image.open(BytesIO(png_of(figure))).convert("RGB")
    _in_few_colors(drawn).save(path, optimize=True)


def _in_few_colors(picture: Image.Image) -> Image.Image:
    """The picture with a palette of its own, in which there are black and white for the words."""
    own = picture.quantize(COLORS - 2).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette([*own[: 3 * (COLORS - 2)], 0, 0, 0, 255, 255, 255])
    return picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


def _cell(image: Tensor, cell: int) -> np.ndarray:
    """(cell, cell, 3) uint8: the image shrunk or grown to fit, on white."""
    high, wide = image.shape[-2:]
    scale = cell / max(high, wide)
    size = [max(1, round(high * scale)), max(1, round(wide * scale))]
    image = image.expand(3, -1, -1)[None].float()
    image = F.interpolate(image, size, mode="bilinear", antialias=True)[0].clamp(0, 1)
    out = torch.ones(3, cell, cell)
    top, left = (cell - size[0]) // 2, (cell - size[1]) // 2
    out[:, top : top + size[0], left : left + size[1]] = image
    return (255 * out).round().byte().permute(1, 2, 0).numpy()


def about(name: str) -> str:
    """The first sentence that a preset's function says of itself."""
    said = (PRESETS[name].__doc__ or "").strip().split("\n\n")[0].replace("\n    ", " ")
    return said.replace(" (read)", "")


def page() -> str:
    """The README of the folder, in Markdown."""
    lines = [
        "# What the augmentations make",
        "",
        "Made by `python docs/make_views.py docs/views`. A row is a photograph. *torchvision* and "
        "*DALI* make the same draws with `color=linear`, and must look alike; *one by one* is "
        "the default of torchvision's, `color=sequential`.",
    ]
    for name in PRESETS:
        lines += ["", f"**{name}**: {about(name)}", "", f"![{name}]({name}.png)"]
    for name, said in OTHERS.items():
        lines += ["", f"**{name}**: {said}", "", f"![{name}]({name}.png)"]
    return "\n".join(lines) + "\n"


def write(out: Path, names: Sequence[str] = (*PRESETS, *OTHERS)) -> list[Path]:
    """Write the sheets of `names` and the page into `out`, and return the pictures' paths."""
    out.mkdir(parents=True, exist_ok=True)
    written = [out / f"{name}.png" for name in names]
    with tempfile.TemporaryDirectory() as folder:
        source = photographs(Path(folder))
        for name, path in zip(names, written, strict=True):
            if name in PRESETS:
                draw(preset_columns(source, name), name, path)
            elif name == "streams":
                draw(stream_columns(), name, path)
            elif name == "batch-ops":
                draw(batch_op_columns(source), name, path)
            else:
                made = {"clips": ClipsSource, "volumes": VolumesSource}[name]().open()[0]
                columns, labels = strip_columns(made, view_spec(name, 64)), ["as it is", "view"]
                draw(columns, name, path, row_labels=3 * labels, cell=60)
    (out / "README.md").write_text(page(), encoding="utf-8")
    return written


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("give one folder to write to: python docs/make_views.py OUT")
    for picture in write(Path(sys.argv[1])):
        print(picture)
