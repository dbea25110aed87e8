"""What this process holds of a parameter, whoever has cut it over the processes.

An engine that cuts parameters says here how they are found (`cut_by`); who moves or counts them
asks here, and knows of no engine.  Of a parameter that nobody has cut the piece is all of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor


class Pieces(ABC):
    """How an engine finds the pieces of parameters, those that it has not cut included."""

    @abstractmethod
    def piece(self, parameter: Tensor) -> Tensor:
        """What this process holds, without gradient: to be read, and written in place."""

    @abstractmethod
    def size(self, parameter: Tensor) -> int:
        """Elements of the whole parameter."""

    @abstractmethod
    def renew(self, parameters: Sequence[Tensor]) -> None:
        """Pieces have been written: let whole copies that are kept beside them follow.

        Collective.
        """


class _Whole(Pieces):
    def piece(self, parameter: Tensor) -> Tensor:
        return parameter.data

    def size(self, parameter: Tensor) -> int:
        return parameter.numel()

    def renew(self, parameters: Sequence[Tensor]) -> None:
        pass


_found_by: list[Pieces] = [_Whole()]


def cut_by(pieces: Pieces) -> None:
    """From now on parameters of this process are found by `pieces`."""
    _found_by[0] = pieces


def piece(parameter: Tensor) -> Tensor:
    """As `Pieces.piece`.

    >>> import torch
    >>> piece(torch.ones(2, requires_grad=True))
    tensor([1., 1.])
    """
    return _found_by[0].piece(parameter)


def size(parameter: Tensor) -> int:
    """As `Pieces.size`."""
    return _found_by[0].size(parameter)


def renew(parameters: Sequence[Tensor]) -> None:
    """As `Pieces.renew`."""
    _found_by[0].renew(parameters)
