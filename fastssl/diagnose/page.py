"""A plan as a reader sees it: tables and sentences."""

from collections.abc import Iterable, Iterator

from rich.table import Column, Table

from .memory import CONTEXT, SLACK
from .plan import NOT_COUNTED, Plan, Remedy

GIB, GB = 1 << 30, 1e9


def plan_page(plan: Plan, disk: float) -> Iterator[Table | str]:
    """What fits, and how long it takes.  disk: bytes a second that a checkpoint is written at."""
    yield memory_table(plan)
    device = plan.cluster.device
    most, have = size(plan.memory.peak), size(plan.capacity)
    said = f"the fullest moment, {plan.memory.moment}, takes {most} of {have} on each rank"
    yield f"{said}: it fits" if plan.fits else f"{said}: it does not fit"
    if not device.on_cpu:
        yield (
            f"assumed: {size(CONTEXT)} of CUDA's context and NCCL's buffers, {100 * SLACK:.0f} % "
            "lost between the allocator's blocks"
        )
    if plan.speed is None:
        yield f"no rates are known of {device.name}: --gpu NAME has one of the table's"
    else:
        yield time_table(plan, disk)
        how = "measured here" if device.on_cpu else "assumed"
        yield (
            f"efficiency {device.efficiency:g}, the share of the device's rates that operators "
            f"reach ({how}); links at 80 % of theirs (assumed)"
        )
    yield f"Not counted: {NOT_COUNTED}."


def memory_table(plan: Plan) -> Table:
    table = Table(
        f"MiB on each of {plan.cluster.world} rank(s)", *_right("backward", "reduce", "update")
    )
    for name, row in plan.memory.parts.items():
        table.add_row(name, *(f"{part / 2**20:,.0f}" if part else "-" for part in row))
    table.add_row("total", *(f"{total / 2**20:,.0f}" for total in plan.memory.totals))
    return table


def time_table(plan: Plan, disk: float) -> Table:
    found, sent, cluster = plan.speed, plan.traffic, plan.cluster
    assert found is not None
    table = Table("of a step", *_right("value"))

    def row(name: str, value: str) -> None:
        table.add_row(name, value)

    row("operations an image", f"{plan.flops_per_image / 1e9:,.1f} GFLOP")
    row("compute", duration(found.compute))
    if found.replay:
        row("  of it the second encoding", duration(found.replay))
    if cluster.world > 1:
        for name, moved, spent in (
            ("gradients", sent.gradients, found.reduce),
            ("parameters", sent.parameters, found.gather),
            ("embeddings, statistics", sent.loss, found.loss),
        ):
            if moved:
                turned = cluster.turned(moved)
                row(f"{name}: sent by a rank", f"{bytes_of(turned)}, {duration(spent)}")
        if cluster.nodes > 1:
            over = cluster.turned(sent.total) / cluster.per_node
            row("  of all, over a rank's network", bytes_of(over))
        row("  of all, hidden behind backward", duration(found.hidden))
    row("optimizer", duration(found.update))
    if found.host:
        row("the host, meanwhile", duration(found.host))
    row("step", duration(found.step))
    row(
        "images/s",
        f"{plan.images_per_s:,.0f}" if plan.images_per_s > 10 else f"{plan.images_per_s:.2f}",
    )
    row("MFU", f"{100 * plan.mfu:.2g} %")
    if plan.total_steps:
        cfg, hours = plan.cfg, plan.seconds * cluster.world / 3600
        name = f"{cfg.epochs} epochs of {plan.images:,} images"
        row(name, f"{duration(plan.seconds)}, {hours:,.1f} device hours")
    row("a checkpoint", f"{bytes_of(plan.checkpoint)}, {duration(plan.checkpoint / disk)}")
    return table


def remedy_lines(found: Iterable[Remedy]) -> Iterator[str]:
    """What to change, a line each."""
    for remedy in found:
        then = "and fits" if remedy.fits else "not enough by itself"
        yield f"- {remedy.keys} saves {size(remedy.saves)}, {then}"


def scaling_table(plans: Iterable[Plan]) -> Table:
    """Weak scaling: as many images a rank, whatever the ranks."""
    heads = ("nodes", "batch", "step", "travel", "images/s", "linear", "MiB")
    table = Table("devices", *_right(*heads))
    first = None
    for plan in plans:
        speed, cluster = plan.speed, plan.cluster
        assert speed is not None
        rate = plan.images_per_s / cluster.world
        first = first or rate
        travel = speed.reduce + speed.gather + speed.loss - speed.hidden
        table.add_row(
            str(cluster.world),
            str(cluster.nodes),
            f"{plan.cfg.batch_size:,}",
            duration(speed.step),
            duration(travel),
            f"{plan.images_per_s:,.0f}",
            f"{100 * rate / first:.0f} %",
            f"{plan.memory.peak / 2**20:,.0f}",
        )
    return table


def duration(seconds: float) -> str:
    """
    >>> duration(0.0123), duration(7.5), duration(5400), duration(3 * 86400)
    ('12.3 ms', '7.5 s', '1.5 h', '3.0 days')
    """
    for unit, least in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= least * (2 if unit == "days" else 1):
            return f"{seconds / least:.1f} {unit}"
    return f"{1e3 * seconds:.1f} ms"


def size(count: float) -> str:
    """
    >>> size(3 << 30), size(5 << 20)
    ('3.0 GiB', '5 MiB')
    """
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / 2**20:,.0f} MiB"


def bytes_of(count: float) -> str:
    """Of what is sent or written.

    >>> bytes_of(1.5e9), bytes_of(2e4)
    ('1.50 GB', '0.02 MB')
    """
    return f"{count / GB:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"


def _right(*names: str) -> list[Column]:
    return [Column(name, justify="right") for name in names]
