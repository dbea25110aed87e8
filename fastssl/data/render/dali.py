"""The views of images with NVIDIA's DALI, on a GPU or on the CPU.

    bytes -> decode the part that the views lie in -> for each view: crop, resize -> move -> color
    -> blur -> solarize -> flip, (v - mean) / std, to float32 or float16, channels first or last
    -> erase

Nothing is drawn here: the numbers of torchvision.draw_views come along with the bytes, so that a
view is the same function of (seed, epoch, image) by either back end, whatever the rank, and to
resume is to start at another step.  How near the two are is said, and tested, in
tests/data/test_dali.py:

    decoding            the same bytes
    crop and resize     within 2 of 255; DALI repeats the border where torchvision cuts its filter
                        off, which shows in the outermost pixels of a crop that shrinks
    color              `linear` always (image.py).  For `sequential` it stands in: the same where
                        nothing is clamped and the hue is not turned
    all else            within rounding: pixels are uint8 between operations

Every operation takes its numbers a sample, neutral ones where the draw leaves it out: no branches.
Only what the spec can ask of a view is in its graph at all.  The flip is the last but for the
erasing, being free there, unless pixels move: then it is one of the moves.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia import dali
from nvidia.dali import math as dali_math

from fastssl.data.render.backend import Rendering
from fastssl.data.render.encoded import COLUMN, ON_THE_WAY, unpacked
from fastssl.data.views.image import View, Views

fn: Any = dali.fn  # its stubs know less than it takes
types: Any = dali.types
Batch = dict[str, Any]
Node = Any  # of DALI's graph
Nodes = dict[str, Any]
Norm = tuple[tuple[float, ...], tuple[float, ...]]
_DEPTH = 2  # batches in the making while one is trained on


class Part(NamedTuple):
    """What is made of the images of one stream, of 1 or 3 channels."""

    views: Views
    channels: int


class Renderer:
    """Host batches (encoded.py) in, batches of views out: {"views": [(b, 3, size, size) ...], ...}.

    parts: by stream; then "views" is a dictionary by them.  One without streams is called "".
    refetch(batch) -> the same batch, every image decoded by Pillow: asked for where DALI could not
    decode one.  A pipeline with an error is of no more use; its successor takes over with that
    batch, and nothing is lost, since a pipeline has no state.
    """

    def __init__(
        self,
        parts: dict[str, Part],
        how: Rendering,
        batch_size: int,
        refetch: Callable[[Batch], Batch],
    ):
        self.parts, self.how, self.batch_size, self.refetch = parts, how, batch_size, refetch
        gpu = how.device.type == "cuda"
        self.layouts = {
            n: Layout(part.views.count == 1, gpu, part.channels) for n, part in parts.items()
        }

    def rendered(self, host: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
        """The batches of `host`, in order, with their views."""
        with closing(host):
            first = next(host, None)  # the readers' processes start before DALI's threads
            if first is not None:
                yield from self._rendered(chain([first], host))

    def _rendered(self, host: Iterator[Batch]) -> Iterator[Batch]:
        flow = _Flow(self, host)
        pipe = self._started(flow)
        while flow.pending:
            try:
                outputs = pipe.share_outputs()
            except RuntimeError:
                first, *rest = flow.taken()
                if first["careful"]:  # not for its bytes, then
                    raise
                flow = _Flow(self, chain([self.refetch(first), *rest], host))
                pipe = self._started(flow)
                continue
            # Outputs are DALI's no more once shared: the tensors keep their memory.
            views = [torch.from_dlpack(out.as_tensor()) for out in outputs]
            batch = flow.pending.popleft().batch
            pipe.release_outputs()
            pipe.schedule_run()
            if self.how.channels_last:
                views = [view.permute(0, 3, 1, 2) for view in views]
            parts = self.parts.items()
            made = {name: [views.pop(0) for _ in part.views.crops] for name, part in parts}
            kept = {k: v for k, v in batch.items() if k not in ON_THE_WAY}
            yield kept | {"views": made.get("", made)}

    def _started(self, flow: "_Flow") -> Any:
        """A pipeline with its first batches under way."""
        cuda = self.how.device.type == "cuda"
        pipe = _graph(
            self,
            flow,
            batch_size=self.batch_size,
            num_threads=self.how.threads,
            device_id=torch.cuda._get_device_index(self.how.device, True) if cuda else None,
            prefetch_queue_depth=_DEPTH,
        )
        pipe.build()
        pipe.schedule_run()
        return pipe


class _Fed(NamedTuple):
    batch: Batch
    arrays: tuple[Any, ...]  # DALI reads them in place: they live until their batch is done


class _Flow:
    """Feeds a pipeline from `host`, and holds what it has not given back yet."""

    def __init__(self, to: Renderer, host: Iterator[Batch]):
        self.to, self.host = to, host
        self.pending: deque[_Fed] = deque()

    def __call__(self) -> tuple[Any, ...]:
        batch = next(self.host)  # its StopIteration at the end of an epoch ends DALI's, too
        arrays: list[Any] = []
        for name, part in self.to.parts.items():
            own = batch["encoded"][name]
            arrays += [unpacked(own["data"], own["ends"]), *_ints(own["part"].numpy())]
            for view, drawn in zip(part.views.crops, own["drawn"].numpy(), strict=True):
                arrays += numbers(view, drawn, self.to.layouts[name]).values()
        self.pending.append(_Fed(batch, tuple(arrays)))
        return self.pending[-1].arrays

    def taken(self) -> list[Batch]:
        """Drop the batches that are still in the pipeline, and return them."""
        batches = [fed.batch for fed in self.pending]
        self.pending.clear()
        return batches


def _ints(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where boxes (B, 4) begin, and their sizes: (B, 2) int32 each."""
    boxes = boxes.astype(np.int32)
    return np.ascontiguousarray(boxes[:, :2]), np.ascontiguousarray(boxes[:, 2:])


class Layout(NamedTuple):
    """alone: an image has one view, and its decoded part is that one's crop.  gpu: see `_made`."""

    alone: bool
    gpu: bool
    channels: int


def numbers(view: View, drawn: np.ndarray, layout: Layout) -> dict[str, Any]:
    """What a view's part of the graph reads for each sample, by name, from `drawn` (B, K).

    Only what the spec of the view can ask for.
    """

    def column(*names: str) -> np.ndarray:
        picked = drawn[:, [COLUMN[name] for name in names]]
        return np.ascontiguousarray(picked[:, 0] if len(names) == 1 else picked)

    found: dict[str, Any] = {}
    if not layout.alone:
        found["start"], found["shape"] = _ints(column("top", "left", "height", "width"))
    if moves(view):
        found["matrix"] = column("xx", "xy", "x", "yx", "yy", "y").reshape(-1, 2, 3)
    elif view.flip:
        found["mirror"] = column("flip").astype(np.int32)
    if view.jitter or (view.grayscale and layout.channels == 3):
        brightness, contrast = column("brightness"), column("contrast")
        if layout.channels == 3:
            found["hue"], found["saturation"] = column("hue"), column("saturation")
        found["gain"], found["shift"] = brightness * contrast, brightness * (1 - contrast)
    if view.blur:
        found |= _gaussian(column("sigma"), view.size, layout.gpu)
    if view.solarize:
        found["threshold"] = column("solarize")
    if view.erase:
        box = column("erase_top", "erase_left", "erase_height", "erase_width")
        found["anchor"], found["extent"] = (half.astype(np.float32) for half in _ints(box))
    return found


def _gaussian(sigma: np.ndarray, size: int, gpu: bool) -> dict[str, Any]:
    """Gaussians cut at 3 sigma (B,), in pixels of views of `size`.  No sigma: a single 1.

    For the GPU sigma and width, for the CPU the weights, as a row and as a column.
    """
    radius = np.minimum(np.ceil(3 * sigma), size - 1).astype(np.int32)  # reflection's reach
    sigma = np.maximum(sigma, 0.01)  # 0 would be DALI's own choice
    if gpu:
        return {"sigma": sigma, "window": 2 * radius + 1}
    rows = []
    for s, r in zip(sigma.tolist(), radius.tolist(), strict=True):
        weights = np.exp(-0.5 * (np.arange(-r, r + 1) / s) ** 2)
        rows.append((weights / weights.sum()).astype(np.float32)[None])
    return {"row": rows, "column": [row.T for row in rows]}


def moves(view: View) -> bool:
    """Whether pixels change places beyond a left-right flip."""
    return bool(view.rotate or view.translate or view.turn or view.flip_vertical)


@dali.pipeline_def
def _graph(to: Renderer, flow: _Flow):
    nobody = np.zeros((1, len(COLUMN)), np.float32)
    names = {
        name: [list(numbers(view, nobody, to.layouts[name])) for view in part.views.crops]
        for name, part in to.parts.items()
    }
    count = sum(3 + sum(map(len, own)) for own in names.values())
    given = [*fn.external_source(source=flow, num_outputs=count, no_copy=True)]
    made = []
    for name, part in to.parts.items():
        made += _made(part, to.layouts[name].gpu, to.how, names[name], given)
    return tuple(made)


def _made(
    part: Part, gpu: bool, how: Rendering, names: list[list[str]], given: list[Node]
) -> list[Node]:
    """The views of one stream, of the first of the nodes `given`, which are taken out."""
    views = part.views
    data, start, shape = (given.pop(0) for _ in range(3))
    image = fn.decoders.image_slice(
        data,
        device=_decoder(gpu),
        start=start,
        shape=shape,
        axes=(0, 1),
        jpeg_fancy_upsampling=True,
    )
    if part.channels == 1:
        image = image[:, :, 0:1]
    made = []
    for view, own in zip(views.crops, names, strict=True):
        at = {name: given.pop(0) for name in own}
        x = _placed(view, image, at)
        if "gain" in at:
            x = _colored(part.channels, gpu)(x, at)
        if view.blur:
            x = (_blurred_gpu if gpu else _blurred_cpu)(x, at)
        if "threshold" in at:
            threshold = _gpu(at["threshold"]) if gpu else at["threshold"]
            x = x ^ (types.Constant(255).uint8() * (x >= threshold))
        made.append(_normalized(x, views.normalization(part.channels), how, at))
    return made


def _decoder(gpu: bool) -> str:
    return "mixed" if gpu else "cpu"


def _gpu(node: Node) -> Node:
    """Numbers of a sample where its pixels are, for arithmetic; arguments stay on the CPU."""
    return node.gpu()


def _placed(view: View, image: Node, at: Nodes) -> Node:
    """Pixels of the view, (size, size, 3) uint8: cropped, resized, moved."""
    if "start" in at:
        image = fn.slice(image, start=at["start"], shape=at["shape"], axes=(0, 1))
    cubic = view.interpolation == "bicubic"
    interp = types.INTERP_CUBIC if cubic else types.INTERP_LINEAR
    x = fn.resize(image, size=(view.size, view.size), interp_type=interp, antialias=True)
    return fn.warp_affine(x, matrix=at["matrix"], fill_value=0) if "matrix" in at else x


def _shift(x: Node, at: Nodes) -> Node:
    """What linear color adds to every value of an image, of 0 to 255: image.py's b (1 - c) mu."""
    mean = fn.reductions.mean(x, axes=(0, 1))
    return at["shift"] * (0.299 * mean[0] + 0.587 * mean[1] + 0.114 * mean[2])


def _colored(channels: int, gpu: bool) -> Callable[[Node, Nodes], Node]:
    if channels == 1:
        return _grays_gpu if gpu else _grays_cpu
    return _colored_gpu if gpu else _colored_cpu


def _grays_cpu(x: Node, at: Nodes) -> Node:
    """Brightness and contrast of one channel, which no other color changes.  What is added to bytes
    is a part of 255."""
    shift = at["shift"] * fn.reductions.mean(x, axes=(0, 1))[0] / 255.0
    return fn.brightness_contrast(
        x, brightness=at["gain"], brightness_shift=shift, dtype=types.UINT8
    )


def _grays_gpu(x: Node, at: Nodes) -> Node:
    shift = _gpu(at["shift"]) * fn.reductions.mean(x, axes=(0, 1))[0]
    x = fn.brightness_contrast(x, brightness=at["gain"], dtype=types.FLOAT)
    return fn.cast(dali_math.clamp(x + shift, 0.0, 255.0), dtype=types.UINT8)


def _colored_cpu(x: Node, at: Nodes) -> Node:
    """Linear color.  What is added may be added first, for grays stay as they are; so the matrix
    is the last, which clamps and rounds in less time than another operation would."""
    shift = _shift(x, at)
    x = fn.brightness_contrast(x, brightness=at["gain"], brightness_shift=shift, dtype=types.FLOAT)
    return fn.color_twist(x, hue=at["hue"], saturation=at["saturation"], dtype=types.UINT8)


def _colored_gpu(x: Node, at: Nodes) -> Node:
    """Linear color.  The mean is on the GPU, where an operation's arguments cannot be."""
    shift = _shift(x, at | {"shift": _gpu(at["shift"])})
    x = fn.color_twist(
        x, hue=at["hue"], saturation=at["saturation"], brightness=at["gain"], dtype=types.FLOAT
    )
    return fn.cast(dali_math.clamp(x + shift, 0.0, 255.0), dtype=types.UINT8)  # it rounds


def _blurred_cpu(x: Node, at: Nodes) -> Node:
    """Rows, then columns: a sixth of gaussian_blur's time, or less."""
    x = fn.filter(x, at["row"], border="reflect_101")
    return fn.filter(x, at["column"], border="reflect_101")


def _blurred_gpu(x: Node, at: Nodes) -> Node:
    return fn.gaussian_blur(x, sigma=at["sigma"], window_size=at["window"])


def _normalized(x: Node, norm: Norm, how: Rendering, at: Nodes) -> Node:
    x = fn.crop_mirror_normalize(
        x,
        mirror=at.get("mirror", 0),
        mean=[255 * v for v in norm[0]],
        std=[255 * v for v in norm[1]],
        dtype=types.FLOAT16 if how.half else types.FLOAT,
        output_layout="HWC" if how.channels_last else "CHW",
    )
    if "anchor" not in at:
        return x
    return fn.erase(x, anchor=at["anchor"], shape=at["extent"], axis_names="HW", fill_value=0)
