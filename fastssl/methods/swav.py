"""SwAV: from each view, predict which prototypes another view of its image is assigned to.

    q_g = Sinkhorn(scores of view g / epsilon): the batch uses all prototypes alike
    loss = mean over the first two global views g and the other views v of
           CE(q_g, softmax(scores of v / temperature))

A batch much smaller than the prototypes are many is joined by the embeddings of past ones: a queue
for each assigned view, which counts in the assignment alone, once `queue_from` of the run is over
and it is full.  Each rank brings its share of the queue, so that together they count it once.
Source: Caron et al. 2020, SwAV, arXiv:2006.09882, section 3.  The authors set the prototypes' rows
to length 1 before each step; here they have it whenever they are read.  That prototypes stay in the
first epoch is `optim.groups`.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.losses import SwaVLoss
from fastssl.losses.queue import Queue
from fastssl.models import Prototypes, feature_dim, projection_head

from .base import Batch, Method
from .configs import SwAVConfig
from .views import encode_views, global_views

_ASSIGNED = 2  # views, at most


class SwAV(Method):
    preset, views, couples_batch = "swav", (2, None), True

    def __init__(self, encoder: nn.Module, cfg: SwAVConfig):
        super().__init__()
        self.encoder, out = encoder, cfg.projection_dim
        self.head = projection_head(feature_dim(encoder), cfg.hidden_dim, out, 2, final_norm=False)
        self.prototypes = Prototypes(cfg.prototypes, out)
        self.past = Past(cfg.queue_size, out, cfg.queue_from) if cfg.queue_size else None
        how = cfg.temperature, cfg.sinkhorn_iterations, cfg.epsilon
        self.criterion = SwaVLoss(*how, sinkhorn_gather_distributed=True)

    def encode(self, batch: Batch) -> list[Tensor]:
        return encode_views(self.encoder, [self.cast(view) for view in batch["views"]])

    def loss(self, encoded: list[Tensor], batch: Batch) -> dict[str, Any]:
        assigned = global_views(batch["views"])[:_ASSIGNED]
        others = [v for v in range(len(encoded)) if v not in assigned]
        z = [F.normalize(self.head(features).float(), dim=1) for features in encoded]
        prototypes = self.prototypes()
        scores = [x @ prototypes.T for x in z]
        older = None
        if self.past is not None and self.past.counts:
            older = [x @ prototypes.detach().T for x in self.past.share(len(assigned))]
        loss = self.criterion([scores[v] for v in assigned], [scores[v] for v in others], older)
        keep = {} if self.past is None else {"keep": [z[v] for v in assigned]}
        return {"loss": loss, **keep}

    def on_step(self, keep: Any, progress: float) -> None:
        if self.past is not None:
            self.past.push(keep, progress)


class Past(nn.Module):
    """A queue of `size` embeddings (size, dim) for each assigned view.

    It counts once it is full of them and the share `since` of training is done.
    """

    def __init__(self, size: int, dim: int, since: float):
        super().__init__()
        self.queues = nn.ModuleList(Queue(size, dim) for _ in range(_ASSIGNED))
        self.size, self.since = size, since
        self.seen, self.progress = 0, 0.0  # on the host: the device is not to be waited for

    @property
    def counts(self) -> bool:
        return self.seen >= self.size and self.progress >= self.since

    def share(self, views: int) -> list[Tensor]:
        """This rank's part of each of the first queues."""
        return [queue.share() for queue in [*self.queues][:views]]  # type: ignore[operator]

    def push(self, keys: list[Tensor], progress: float) -> None:
        """keys: (B, dim) of each assigned view."""
        for queue, rows in zip(self.queues, keys, strict=False):
            put: int = queue.push(rows, check=False)  # type: ignore[operator]
        self.seen, self.progress = min(self.seen + put, self.size), progress

    def get_extra_state(self) -> dict[str, float]:
        return {"seen": self.seen, "progress": self.progress}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.seen, self.progress = int(state["seen"]), float(state["progress"])
