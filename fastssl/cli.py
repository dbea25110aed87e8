"""The command line: `fastssl COMMAND`, or `python -m fastssl COMMAND`.

Heavy modules are imported inside the commands, so that help and mistakes answer at once.
"""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError as missing:
    raise SystemExit(
        f"the command line needs {missing.name}: pip install 'fastssl-torch[train]'"
    ) from None

from fastssl.files import printable

EXITS = (
    "Exit codes: 0 done; 1 another rank was lost; 2 a mistake in the command, the configuration or "
    "the data; 3 the loss was not finite; 4 a checkpoint could not be written or read; 5 stopped "
    "on request, state saved; 6 nothing moved any more (engine.watchdog). "
    "FASTSSL_TRACEBACK=1 shows the traceback behind a message."
)
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    epilog=EXITS,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class _Console(Console):
    """Shows the names of files as text: a terminal does not obey what is in them."""

    def print(self, *objects: Any, **options: Any) -> None:
        shown = (printable(o, keep="\n") if isinstance(o, str) else o for o in objects)
        super().print(*shown, **options)


console = _Console(highlight=False, soft_wrap=True)
Recipe = Annotated[
    str, typer.Argument(help="A recipe's name (see `fastssl recipes`) or a YAML file.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, dotted: optim.lr=1e-3 data.workers=0")
]
Plugins = Annotated[
    list[str] | None, typer.Option(help="A module whose methods, sources ... can be named.")
]
Encoder = Annotated[
    str, typer.Option(help="Which of the run's networks, as teacher; by default the primary one.")
]
RunPath = Annotated[Path, typer.Argument(help="A run's directory, runs/NAME.")]


def _version(wanted: bool) -> None:
    if wanted:
        from fastssl import __version__

        console.print(f"fastssl {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and end.")
    ] = False,
) -> None:
    """Fast self-supervised pretraining: train an encoder, measure it, use it elsewhere."""


@app.command()
def pretrain(
    recipe: Recipe,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help="Print the plan; train nothing.")] = False,
    plugin: Plugins = None,
) -> None:
    """Pretrain an encoder; several processes through torchrun -m fastssl pretrain ..."""
    say = console.print if os.environ.get("RANK", "0") == "0" else lambda *a, **k: None
    from fastssl.config import resolve

    cfg = resolve(recipe, overrides, plugin)
    if dry_run:
        from fastssl.config import described

        say(described(cfg), markup=False)
        return _print_plan(cfg, _here(cfg)) if os.environ.get("RANK", "0") == "0" else None
    models = ", ".join(model.name for model in cfg.models.values())
    what = f"{cfg.method.name} with {models} on {cfg.data.source.name}"
    say(f"{what} -> {cfg.directory}", markup=False)
    from fastssl.run.progress import RichWatch
    from fastssl.run.train import pretrain as run

    command = shlex.join(["fastssl", *sys.argv[1:]])
    results = run(cfg, RichWatch(console, cfg.epochs), command)
    if os.environ.get("RANK", "0") == "0":
        _print_results(results)
        say(f"report: {cfg.directory / 'report.html'}", markup=False)


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="Devices in all, a rank each.")] = 1,
    gpu: Annotated[
        str | None,
        typer.Option(help="h100, h200, b200, a100-80 ... or cpu; by default this machine's own."),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(help="Machines; by default as few as have eight devices each.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="Training images: the data are not opened.")
    ] = None,
    efficiency: Annotated[
        float | None,
        typer.Option(help="Share of a device's rates that is reached; 0.5 of a GPU is assumed."),
    ] = None,
    nic: Annotated[
        float | None, typer.Option(help="GB/s of network for each device, one way.")
    ] = None,
    disk: Annotated[float, typer.Option(help="GB/s that a checkpoint is written at.")] = 1.0,
    scaling: Annotated[
        bool, typer.Option(help="Also 1 to 512 devices with as many images each.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all of it to this file as well.")
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Memory, time and traffic of a recipe on any number of devices; nothing is run."""
    from fastssl.config import ConfigError, resolve
    from fastssl.diagnose.hardware import planned_on, with_rates
    from fastssl.diagnose.speed import Cluster

    if disk <= 0:
        raise ConfigError(f"--disk {disk:g} must be more than 0 GB/s")
    cfg = resolve(recipe, overrides, plugin)
    threads = 1 if gpus > 1 else None  # as torchrun starts ranks
    device = planned_on(gpu, cfg.device, cfg.engine.precision, threads)
    device = with_rates(device, efficiency, nic)
    least = 1 if device.on_cpu else -(-gpus // 8)
    cluster = Cluster(device, gpus, least if nodes is None else nodes)
    _print_plan(cfg, cluster, images, disk, scaling, json_file)


@app.command(name="eval")
def evaluate(run: RunPath, encoder: Encoder = "") -> None:
    """Measure a run's encoder again: kNN, linear probe, RankMe, alignment, uniformity."""
    from fastssl.data.datasets import open_source
    from fastssl.data.streams import split_of_stream
    from fastssl.data.views.streams import of_stream
    from fastssl.export import load_encoder
    from fastssl.run.evaluation import evaluate_on, scores

    network, cfg, _ = load_encoder(run, encoder)
    split = open_source(cfg.data.source, cfg.seed, cfg.data.streams)
    stream = cfg.stream_of(encoder)
    views = of_stream(cfg.views(), stream)
    measured, parts = evaluate_on(cfg, split_of_stream(split, stream), views, network)
    table = Table("measure", "value")
    for name, value in scores(measured).items():
        table.add_row(name, _number(name, value))
    console.print(table)
    bad = (f"skipped {name}: {why}" for part in parts for name, why in part.bad)
    for note in (*(measured.notes if measured else ()), *bad):
        console.print(note, markup=False)


@app.command()
def embed(
    run: RunPath,
    data: Annotated[
        str,
        typer.Argument(
            help="A folder of images, digits, fractals, or the run's own source by name."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The .npz file to write.")] = Path("features.npz"),
    encoder: Encoder = "",
) -> None:
    """Write features, labels, names and split of every image of DATA to an .npz file."""
    from fastssl.export import embed_to_file

    count, bad = embed_to_file(run, data, out, encoder)
    console.print(f"{count} items -> {out}", markup=False)
    for name, reason in bad:
        console.print(f"skipped {name}: {reason}", markup=False)


@app.command()
def export(
    run: RunPath,
    out: Annotated[Path | None, typer.Option(help="Default: beside the run's report.")] = None,
    format: Annotated[
        str, typer.Option(help="timm (a directory) or safetensors (a file).")
    ] = "timm",
    encoder: Encoder = "",
    with_heads: Annotated[
        bool,
        typer.Option(
            help="The whole method as well, from which another run goes on (weights=FILE)."
        ),
    ] = False,
) -> None:
    """Write a run's encoder for use elsewhere, and read it back to be sure."""
    from fastssl.export import export as write
    from fastssl.export import export_method

    named = f"encoder-{encoder}" if encoder else "encoder"
    default = {"timm": run / f"{named}-timm", "safetensors": run / f"{named}.safetensors"}
    written = write(run, out or default.get(format, run), format, encoder)
    console.print(f"{written}", markup=False)
    if format == "timm":
        console.print(f'timm.create_model("local-dir:{written}", pretrained=True)', markup=False)
    if with_heads:
        console.print(f"fastssl pretrain ... weights={export_method(run, written)}", markup=False)


@app.command()
def pack(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of images, digits, fractals, or a recipe or YAML file: its data source."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write the shards to.")],
    shard_size: Annotated[int, typer.Option(help="Size of a shard, MB.")] = 256,
    split: Annotated[
        float, typer.Option(help="Part of each class for val/; what comes split stays so.")
    ] = 0.0,
    max_side: Annotated[
        int | None, typer.Option(help="Larger images become JPEGs whose shorter side is this.")
    ] = None,
    check: Annotated[
        bool, typer.Option(help="Decode every image, and leave out what is unreadable.")
    ] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace what was packed there.")] = False,
    plugin: Plugins = None,
) -> None:
    """Write any source of images as WebDataset shards, with indices and a manifest."""
    from fastssl.data.sources.pack import PackOptions
    from fastssl.data.sources.pack import pack as write
    from fastssl.run.progress import counted

    options = PackOptions(shard_size * 10**6, max_side, check=check, overwrite=overwrite)
    parts = _parts(source, split, plugin)
    with counted(console, sum(map(len, parts)), "images") as watch:
        manifest = write(parts, out, options, watch)
    for name, part in manifest["parts"].items():
        size = f"{part['samples']:,} images, {part['bytes'] / 1e6:,.1f} MB"
        console.print(f"{name}: {size} in {len(part['shards'])} shards")
    skipped = manifest["skipped"]
    for bad in skipped[:20]:
        console.print(f"skipped {bad['name']}: {bad['reason']}", markup=False)
    if len(skipped) > 20:
        console.print(f"... {len(skipped):,} in all: see {out / 'manifest.json'}", markup=False)
    console.print(f"data.source.name=webdataset data.source.path={out}", markup=False)


@app.command()
def recipes() -> None:
    """List the recipes that ship with fastssl."""
    from fastssl.config import recipes as known

    table = Table("recipe", "what it does")
    for name, path in known().items():
        table.add_row(name, path.read_text().splitlines()[0].lstrip("# "))
    console.print(table)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def bench(context: typer.Context) -> None:
    """Losses, kernels and training steps beside their rivals; see `fastssl bench --help`."""
    from fastssl.bench.__main__ import main as measure

    sys.exit(measure(context.args))


@app.command()
def doctor(
    recipe: Annotated[
        str | None,
        typer.Argument(help="Of this recipe or YAML file: is its data or its model the slower?"),
    ] = None,
    overrides: Overrides = None,
    seconds: Annotated[float, typer.Option(help="For the data, and for the model.")] = 5.0,
    plugin: Plugins = None,
) -> None:
    """What is installed and will run on what; or, with a recipe, what holds its training up."""
    if recipe is not None:
        return _print_bottleneck(recipe, overrides, seconds, plugin)
    from fastssl.diagnose.doctor import findings, primitives
    from fastssl.registry import import_plugin

    for name in plugin or ():
        import_plugin(name)
    table = Table("part", "state", "what for", "to do")
    for found in findings():
        table.add_row(found.name, found.state, found.purpose, found.remedy)
    console.print(table)
    table = Table("primitive", "implementation here")
    for name, implementation in primitives().items():
        table.add_row(name, implementation)
    console.print(table)


def main() -> None:
    """Run a command; a mistake ends in one sentence and an exit code, not in a traceback."""
    try:
        app()
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None or os.environ.get("FASTSSL_TRACEBACK") == "1":
            raise
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not getattr(error, "on_every_rank", False):
            who = "fastssl" if rank == "0" else f"fastssl, rank {rank}"
            _Console(stderr=True, soft_wrap=True).print(f"{who}: {error}", markup=False)
        sys.exit(code)


def _parts(source: str, fraction: float, plugin: list[str] | None) -> tuple[Any, ...]:
    """The parts to pack: as the source comes, or split by `fraction` (and the seed 0)."""
    from fastssl.config import resolve
    from fastssl.data.datasets import DigitsSource, FolderSource, FractalsSource, open_source
    from fastssl.data.errors import DataError
    from fastssl.data.streams import streams_of

    named = {"digits": DigitsSource, "fractals": FractalsSource}
    if source in named:
        cfg = named[source]()
    elif Path(source).is_dir():
        cfg = FolderSource(path=Path(source))
    else:
        cfg = resolve(source, plugins=plugin).data.source
    if fraction:
        if not 0 < fraction < 1:
            raise DataError(f"--split {fraction} is no part: give a number between 0 and 1")
        cfg = cfg.model_copy(update={"test_fraction": fraction})
        return tuple(open_source(cfg, 0))
    found = cfg.open()
    if streams_of(found[0]):
        raise DataError("fastssl pack is for plain images, and these items have several streams")
    return found


def _print_plan(
    cfg: Any,
    cluster: Any,
    images: int | None = None,
    disk: float = 1.0,
    scaling: bool = False,
    file: Path | None = None,
) -> None:
    from fastssl.diagnose.page import plan_page, remedy_lines, scaling_table
    from fastssl.diagnose.plan import (
        as_json,
        check_cluster,
        data_of,
        make_plan,
        remedies,
        weak_scaling,
    )
    from fastssl.files import write_atomically

    check_cluster(cfg, cluster)
    cfg, data = data_of(cfg, cluster.world, images)
    steps = cfg.epochs * data.epoch_steps
    plan = make_plan(cfg, data.channels, cluster, images=data.images, total_steps=steps)
    console.print(
        f"{data.images:,} training images, {data.held_out:,} held out; {steps:,} steps",
        markup=False,
    )
    where = f"{cluster.world} x {cluster.device.name} on {cluster.nodes} node(s)"
    console.print(f"{plan.sizes.parameters:,} parameters, {where}", markup=False)
    for part in plan_page(plan, 1e9 * disk):
        console.print(part)
    if not plan.fits:
        for line in remedy_lines(remedies(plan, data.channels)):
            console.print(line, markup=False)
    for note in cfg.notes():
        console.print(note)
    made = as_json(plan, 1e9 * disk)
    if scaling and plan.speed is not None:
        worlds = [2**n for n in range(10)]
        plans = list(weak_scaling(plan, data.channels, worlds))
        console.print(scaling_table(plans))
        made["scaling"] = [as_json(each, 1e9 * disk) for each in plans]
    if file is not None:
        write_atomically(file, json.dumps(made, indent=1))
        console.print(f"{file}", markup=False)


def _here(cfg: Any) -> Any:
    """The ranks that a launcher has started, on this machine's devices."""
    from fastssl.diagnose.hardware import planned_on
    from fastssl.diagnose.speed import Cluster

    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    device = planned_on(None, cfg.device, cfg.engine.precision)
    return Cluster(device, world, max(1, world // local))


def _print_bottleneck(
    recipe: str, overrides: list[str] | None, seconds: float, plugin: list[str] | None
) -> None:
    from fastssl.config import resolve
    from fastssl.data.datasets import open_source
    from fastssl.diagnose.bottleneck import advice, examine, on_cpu, verdict

    cfg, ranks = examine(resolve(recipe, overrides, plugin), seconds)
    if os.environ.get("RANK", "0") != "0":
        return
    table = Table("rank", "images/s: data", "model", "reading alone", "decoding alone", "1st batch")
    for rank, found in enumerate(ranks):
        rates = (found.data, found.step, found.read, found.decode)
        shown = [f"{rate:,.0f}" if rate else "-" for rate in rates]
        table.add_row(str(rank), *shown, f"{found.first:.1f} s")
    console.print(table)
    makes = {"torch": "torch", "dali": "DALI"}[cfg.data.backend]
    how = f"views by {makes}, {cfg.data.workers} workers a rank, {ranks[0].images} images a step"
    console.print(f"{how}; alone: by one process", markup=False)
    found = verdict(ranks)
    console.print(found.sentence(), markup=False)
    train = open_source(cfg.data.source, cfg.seed, cfg.data.streams).train
    for line in advice(cfg, ranks, train):
        console.print(f"- {line}", markup=False)
    if on_cpu(cfg):
        console.print("the model trains on the cores that make views: a run is slower than either")


def _print_results(results: dict[str, Any]) -> None:
    rows, train = results["rows"], results["train"]
    columns = [m for m in ("knn", "linear", "rankme") if any(m in row for row in rows)]
    table = Table("encoder", *columns)
    for row in rows:
        table.add_row(row["encoder"], *(_number(m, row.get(m)) for m in columns))
    console.print(table)
    speed = f"{train['images_per_s']:,.0f} images/s, " if train["images_per_s"] else ""
    if train["data_wait"] is not None:
        speed += f"{100 * train['data_wait']:.0f} % of the time waiting for data, "
    console.print(
        f"loss {_number('loss', train['loss'])}, {speed}{train['seconds']:.0f} s of training, "
        f"peak memory {train['peak_memory_bytes'] / 2**20:,.0f} MiB, "
        f"unreadable images {train['bad_images']}, steps skipped {train['skipped_steps']}"
    )


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name == "loss":
        return f"{value:.4f}"
    return f"{100 * value:.1f} %" if name in ("knn", "linear") else f"{value:.2f}"
