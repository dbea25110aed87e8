"""The views of a table's row."""

from typing import ClassVar

from torch import Tensor

from fastssl.data.views.item import ItemViews


class TableViews(ItemViews):
    """Rows as they are, float32 (F,): a table has no augmentation that keeps its meaning."""

    kind: ClassVar[str] = "row"
    named, sized = "table", ""

    def shapes(self, channels: int) -> list[tuple[int, ...]]:
        """(channels,) of each view."""
        return [(channels,)] * self.count

    def evaluation(self) -> "TableViews":
        return self.with_fields(count=1)

    def check(self, item: Tensor) -> None:
        if item.ndim != 1 or not item.is_floating_point():
            raise ValueError(f"row: want float (F,), got {item.dtype} {list(item.shape)}")

    def view(self, item: Tensor, key: int) -> Tensor:
        return item.float()
