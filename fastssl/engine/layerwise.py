"""LARS and LAMB whose trust ratios see whole tensors, however ZeRO has cut them.

Both scale a parameter's update by a ratio of norms: of the parameter w, and of its gradient g
(LARS) or its update u (LAMB).  DeepSpeed hands an optimizer flat float32 tensors cut at any
element: one for each parameter group at stages 1 and 2, one for each sub-group at stage 3.
Norms of such pieces would silently change the step.  So `bind_fragments(ds_engine)`, called
right after `deepspeed.initialize`, tells the optimizer where parameters lie in flat tensors;
`step` squares the norms of the pieces, adds them up over the data-parallel group in one small
all-reduce for each flat tensor, and scales every piece by its parameter's ratio.  DeepSpeed
steps its flat tensors one after another, in the same order on every rank.

Without ZeRO each tensor is a whole parameter and there is nothing to bind.  Parameters of one
dimension, and groups with adapt=False, have ratio 1.  State tensors have the shape of the
tensor they belong to, so DeepSpeed's checkpoints hold them.  Ratios stay on the device: no
step waits for it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .fragments import Fragments, locate


class LayerwiseOptimizer(torch.optim.Optimizer, ABC):
    """What LARS and LAMB share: updates scaled by a ratio of norms of whole parameters."""

    def __init__(self, params: Any, **defaults: Any):
        for name in ("lr", "weight_decay", "eps"):
            if not defaults[name] >= 0:
                raise ValueError(f"{name} must be >= 0, got {defaults[name]}")
        self.fragments: dict[Tensor, Fragments] = {}
        self._whole: set[Tensor] = set()
        super().__init__(params, {**defaults, "adapt": True})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._whole.update(self.param_groups[-1]["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient; collective under ZeRO."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                updates, measured = self._updates(group, params, [p.grad for p in params])
                if group["adapt"]:
                    self._scale(group, params, updates, measured)
                self._apply(group, params, updates)
        return loss

    def _scale(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        updates: list[Tensor],
        measured: list[Tensor],
    ) -> None:
        pieces = list(self._pieces(params, updates, measured))
        fragments = self.fragments.get(params[0])
        norms = params[0].new_zeros(2, 0, dtype=torch.float32)
        if pieces:
            weights, scaled, others = (list(column) for column in zip(*pieces, strict=True))
            norms = torch.stack(torch._foreach_norm(weights + others, dtype=torch.float32))
            norms = norms.view(2, -1)
        if fragments is not None:  # also with no pieces here: the other ranks wait for this one
            norms = fragments.whole_norms(norms)
        if pieces:
            ratios = torch.where((norms > 0).all(0), self._ratio(group, *norms), 1.0)
            torch._foreach_mul_(scaled, list(ratios.unbind()))

    def _pieces(self, *columns: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """Corresponding pieces of `columns`, whose first is the parameters."""
        for param, *others in zip(*columns, strict=True):
            fragments = self.fragments.get(param)
            if fragments is not None:
                for start, length in fragments.spans:
                    yield tuple(t.narrow(0, start, length) for t in (param, *others))
            elif param.ndim > 1:
                yield param, *others
            elif param not in self._whole:
                raise RuntimeError(
                    f"{type(self).__name__} does not know what lies in a flat tensor of "
                    f"{param.numel()} elements: call bind_fragments(ds_engine) right after "
                    "deepspeed.initialize"
                )

    @abstractmethod
    def _updates(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Fresh tensors to be scaled, and the tensors measured against the parameters."""

    @abstractmethod
    def _ratio(self, group: dict[str, Any], weight: Tensor, measured: Tensor) -> Tensor:
        """Trust ratios from the norms of the parameters and of what is measured, all > 0."""

    @abstractmethod
    def _apply(self, group: dict[str, Any], params: list[Tensor], updates: list[Tensor]) -> None:
        """Move the parameters along the scaled updates, which it may overwrite."""


class LARS(LayerwiseOptimizer):
    """Momentum SGD with a learning rate for each layer.

    ratio = trust_coefficient |w| / (|g| + weight_decay |w| + eps)
    v <- momentum v + ratio (g + weight_decay w)        w <- w - lr v

    ratio is 1 where |w| or |g| is 0, for parameters of one dimension and in groups with
    adapt=False.  Those take weight decay as their group says: give them a group without.
    As in timm, SimCLR and Barlow Twins lr multiplies the momentum buffer; the paper puts it
    inside, which differs only while lr changes.
    Raises ValueError for negative lr, momentum, weight_decay, eps or trust_coefficient.
    Source: You et al. 2017, arXiv:1708.03888, eq. 6 and algorithm 1.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
    ):
        for name, value in (("momentum", momentum), ("trust_coefficient", trust_coefficient)):
            if not value >= 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            trust_coefficient=trust_coefficient,
            eps=eps,
        )

    def _updates(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        return list(torch._foreach_add(grads, params, alpha=group["weight_decay"])), grads

    def _ratio(self, group: dict[str, Any], weight: Tensor, measured: Tensor) -> Tensor:
        bottom = measured + group["weight_decay"] * weight + group["eps"]
        return group["trust_coefficient"] * weight / bottom

    def _apply(self, group: dict[str, Any], params: list[Tensor], updates: list[Tensor]) -> None:
        if group["momentum"] > 0:
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            updates = buffers
        torch._foreach_add_(params, updates, alpha=-group["lr"])


class LAMB(LayerwiseOptimizer):
    """Adam with decoupled weight decay, each layer's update rescaled to the layer's norm.

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    u = m' / (sqrt(v') + eps) + weight_decay w        m', v': bias-corrected
    w <- w - lr (|w| / |u|) u

    The ratio is 1 where |w| or |u| is 0, for parameters of one dimension and in groups with
    adapt=False.  phi of the paper is the identity; gradients are not clipped here (NVIDIA's and
    timm's do), the engine does that.
    Raises ValueError for negative lr, weight_decay or eps, and for betas outside [0, 1).
    Source: You et al. 2020, arXiv:1904.00962, algorithm 2.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        eps: float = 1e-6,
    ):
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), got {betas}")
        super().__init__(params, lr=lr, betas=tuple(betas), weight_decay=weight_decay, eps=eps)

    def _updates(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        (beta1, beta2), eps = group["betas"], group["eps"]
        steps, means, squares = self._moments(params)
        torch._foreach_add_(steps, 1)
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)
        counts = [step.item() for step in steps]  # on the CPU: no device is waited for
        bottoms = torch._foreach_sqrt(squares)
        torch._foreach_div_(bottoms, [(1 - beta2**count) ** 0.5 for count in counts])
        torch._foreach_add_(bottoms, eps)
        updates = list(torch._foreach_div(means, [1 - beta1**count for count in counts]))
        torch._foreach_div_(updates, bottoms)
        torch._foreach_add_(updates, params, alpha=group["weight_decay"])
        return updates, updates

    def _moments(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        names = ("step", "exp_avg", "exp_avg_sq")
        steps, means, squares = ([self.state[p][name] for p in params] for name in names)
        return steps, means, squares

    def _ratio(self, group: dict[str, Any], weight: Tensor, measured: Tensor) -> Tensor:
        return weight / measured

    def _apply(self, group: dict[str, Any], params: list[Tensor], updates: list[Tensor]) -> None:
        torch._foreach_add_(params, updates, alpha=-group["lr"])


def bind_fragments(ds_engine: Any) -> None:
    """Tell a LARS or LAMB under `ds_engine` where parameters lie in its flat tensors.

    ds_engine: what `deepspeed.initialize` returned.  Call it once, on every rank (collective),
    before the first step; loading a checkpoint keeps it.  Other optimizers, and stage 0, whose
    tensors are whole parameters, are left as they are.  Raises RuntimeError as `locate` does.
    """
    optimizer = ds_engine.basic_optimizer
    if isinstance(optimizer, LayerwiseOptimizer) and ds_engine.zero_optimization_stage() > 0:
        optimizer.fragments = locate(ds_engine)
