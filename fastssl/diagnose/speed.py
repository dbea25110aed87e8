"""How long a step takes: its operators, one after another, and what travels between ranks.

An operator takes the longer of its operations over the matrix rate and its bytes over the memory's,
each times `efficiency`.  A GPU works while its host goes on to the next: a step takes the longer of
both.  On a processor an operator takes what was measured of it by itself (`replay`), or else by the
rates; the host is the device, and takes no less than it does for an operator that does nothing.

Of T trained parameters of w bytes, over W ranks, collectives move these bytes through each rank, in
passes over a ring, each (W - 1) / W of the whole (an all-reduce has two):

    stage 0     2 w T                  all-reduce of gradients
    stage 1, 2  2 w T + w T            all-reduce of gradients, gather of parameters; at stage 2 the
                                       former for each micro-batch whose gradients are cut at once
    stage 3     3 w T                  gather in forward, and in backward, reduce-scatter; each for
                                       every micro-batch
    loss        as it was counted      embeddings, statistics

A ring over several nodes crosses each node's border once, and there are as many rings as network
cards: the bandwidth of all ranks together is that of a node's cards, or of a rank's link within the
node, whichever is less.  A collective waits ALPHA for each doubling of ranks as well.
"""

from dataclasses import dataclass

from .counting import LARGE, Call, Counts, Work
from .hardware import Device
from .memory import Rule, Sizes, Zero

KERNEL = 2e-6  # seconds of a GPU's smallest kernel: assumed
ALPHA = 1e-5  # seconds of a message between ranks, and its kernels: assumed
# Seconds that DeepSpeed's host takes for a tensor at each stage: measured beside a bare loop, 26
# blocks of a ViT on two ranks of a processor whose host takes _HOST_LAUNCH for an operator.
_HOST = (6e-5, 8e-5, 8e-5, 7e-4)
_HOST_LAUNCH = 3e-5
_LINK = 0.8  # of a link's bandwidth that a ring reaches: assumed


@dataclass(frozen=True)
class Cluster:
    """W ranks on so many nodes, a rank for each device."""

    device: Device
    world: int
    nodes: int

    @property
    def per_node(self) -> int:
        return self.world // self.nodes

    @property
    def bus(self) -> float:
        """Bytes a second that pass through each rank in a ring."""
        if self.nodes == 1:
            return _LINK * self.device.link
        return _LINK * min(self.device.link, self.device.nic * self.per_node)

    def seconds(self, sent: float, collectives: int) -> float:
        """Of collectives over `sent` bytes, passes counted."""
        if self.world == 1:
            return 0.0
        waits = collectives * ALPHA * (self.world - 1).bit_length()
        return self.turned(sent) / self.bus + waits

    def turned(self, sent: float) -> float:
        """Bytes that a rank sends in passes over the whole of `sent`."""
        return sent * (self.world - 1) / self.world


@dataclass(frozen=True)
class Traffic:
    """Of a step and rank: bytes worked on by collectives, their passes counted, and their number.

    gradients: all-reduced or reduce-scattered.  parameters: gathered.  loss: of embeddings and
    statistics.
    """

    gradients: int
    parameters: int
    loss: int
    collectives: int

    @property
    def total(self) -> int:
        return self.gradients + self.parameters + self.loss


@dataclass(frozen=True)
class Speed:
    """Seconds of a step, by what they go into.

    compute: forward, backward, loss.  replay: of an exact large batch the second encoding, which
    compute has too.  reduce, gather, loss: collectives; of all of them `hidden` behind backward.
    update: the optimizer's.  host: of all that, to launch it and to walk through parameters, beside
    a GPU.  flops: of a step and rank, all that is run; useful: without what is
    run a second time.
    """

    compute: float
    replay: float
    reduce: float
    gather: float
    loss: float
    hidden: float
    update: float
    host: float
    flops: float
    useful: float

    @property
    def step(self) -> float:
        travel = self.reduce + self.gather + self.loss - self.hidden
        return max(self.compute + travel + self.update, self.host)


def work_seconds(work: Work, device: Device, precision: str) -> float:
    """Of operators one after another."""
    rate = device.rate(precision)
    if device.on_cpu:
        return sum(_on_cpu(call, device, rate) for call in work.calls)
    flops, moved = device.efficiency * rate, device.efficiency * device.hbm
    return sum(max(call.flops / flops, call.moved / moved, KERNEL) for call in work.calls)


def _on_cpu(call: Call, device: Device, rate: float) -> float:
    if call.seconds:
        return max(call.seconds, device.launch)
    return by_rates(call, device, rate) + device.launch


def by_rates(call: Call, device: Device, rate: float) -> float:
    """Of an operator of a processor."""
    flops = device.attention if call.attends else rate
    moved = device.hbm if call.moved > LARGE else device.cached
    busy = max(call.flops / flops, call.moved / moved)
    return (busy + call.fresh * device.fresh) / device.efficiency


def traffic(sizes: Sizes, counts: Counts, zero: Zero, world: int, parts: int, w: int) -> Traffic:
    """What the ranks of a step exchange.  parts: micro-batches.  w: bytes of a parameter."""
    if world == 1:
        return Traffic(0, 0, 0, 0)
    grads = w * sizes.trained
    times = parts if zero.cuts else 1
    buckets = -(-sizes.trained // zero.bucket)
    whole = counts.encode.sent + counts.targets.sent + counts.encode_backward.sent
    sent = counts.loss.sent + parts * whole
    calls = [counts.encode, counts.targets, counts.encode_backward]
    number = counts.loss.collectives + parts * sum(work.collectives for work in calls)
    if zero.stage < 3:
        gathered = grads if zero.stage else 0
        return Traffic(2 * grads * times, gathered, sent, number + buckets * times + 2)
    exact = counts.rows != counts.micro
    passes = (3 if exact else 2) * parts - exact  # the last micro-batch of an exact one runs once
    number += buckets * times + passes * sizes.modules
    return Traffic(grads * times, passes * w * sizes.parameters, sent, number)


def speed(
    sizes: Sizes,
    counts: Counts,
    rule: Rule,
    zero: Zero,
    cluster: Cluster,
    *,
    precision: str,
    parts: int,
    recompute: float,
    fresh: int,
) -> Speed:
    """What a step takes on each rank of `cluster`.

    recompute: operations of forward that activation checkpointing runs again, which are counted
    as run and not as useful.  fresh: bytes of flat tensors that a step allocates.
    """
    device, w = cluster.device, 2 if precision == "bf16" else 4
    exact = counts.rows != counts.micro
    encode, backward, loss, targets = (
        work_seconds(work, device, precision)
        for work in (counts.encode, counts.encode_backward, counts.loss, counts.targets)
    )
    losses = 1 if exact else parts
    replay = (parts - 1) * encode if exact else 0.0
    compute = parts * (encode + backward + targets) + losses * loss + replay
    useful = parts * (
        counts.encode.flops + counts.encode_backward.flops + counts.targets.flops - recompute
    )
    useful += losses * counts.loss.flops
    flops = useful + parts * recompute + ((parts - 1) * counts.encode.flops if exact else 0)
    sent = traffic(sizes, counts, zero, cluster.world, parts, w)
    reduce, gather = (cluster.seconds(x, 0) for x in (sent.gradients, sent.parameters))
    reduce += cluster.seconds(0, sent.collectives)
    hidden = 0.0
    if zero.overlap and zero.stage:
        behind = parts * backward if zero.cuts else backward
        moving = reduce + (gather if zero.stage == 3 else 0)
        hidden = min(behind + (parts * encode if zero.stage == 3 else 0), moving)
    share = sizes.trained / (cluster.world if zero.stage else 1)
    # Besides the optimizer: the gradient's norm, copies between precisions, and of ZeRO those into
    # the bucket and out of it.
    moved = (rule.moved + 16) * share + (4 * w * sizes.trained if zero.stage else 0)
    if rule.seconds:
        moved -= rule.moved * share
    cached = device.on_cpu and moved < LARGE
    update = moved / (device.efficiency * (device.cached if cached else device.hbm))
    walk = _HOST[zero.stage] * sizes.tensors
    if device.on_cpu:
        walk *= device.launch / _HOST_LAUNCH
        update += rule.seconds * share + device.fresh * fresh + walk
        update += rule.calls_of(1 if zero.stage else sizes.tensors) * device.launch
    calls = parts * sum(len(w.calls) for w in (counts.encode, counts.encode_backward))
    calls += parts * len(counts.targets.calls) + losses * len(counts.loss.calls) + rule.calls
    calls += (parts - 1) * len(counts.encode.calls) if exact else 0
    host = 0.0 if device.on_cpu else calls * device.launch + walk
    return Speed(
        compute,
        replay,
        reduce,
        gather,
        cluster.seconds(sent.loss, 0),
        hidden,
        update,
        host,
        flops,
        useful,
    )
