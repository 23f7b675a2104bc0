"""How the inputs of a region are cut into rows, and how its outputs are joined again."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from operator import gt
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_hetero.runtime.engine.cut import CannotCutError
from lightning_hetero.runtime.engine.tree import Tree, with_fields
from lightning_hetero.runtime.transfer import with_values


@dataclass(frozen=True)
class Cut:
    """Which of a region's input tensors have the batch as their first dimension.

    Attributes:
        positions: Their places in `Tree.tensors`. The other inputs go to every micro-batch whole.
    """

    positions: tuple[int, ...]

    def rows(self, tensors: Sequence[Tensor]) -> int | None:
        """Number of rows of this batch; None if the inputs do not agree on one."""
        sizes = {tensors[place].shape[0] if tensors[place].dim() else 0 for place in self.positions}
        return sizes.pop() if len(sizes) == 1 else None

    def take(self, tensors: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
        """The inputs of the rows from `start` to before `stop`, as views."""
        result = list(tensors)
        for place in self.positions:
            result[place] = tensors[place][start:stop]
        return result


class Size(NamedTuple):
    """How large a batch is.

    Attributes:
        rows: Its rows.
        per_row: Of each tensor, the numbers in each of them, and its other dimensions; of one that is not cut, all of
            its dimensions.
    """

    rows: int
    per_row: tuple[tuple[int, ...], ...]

    def is_within(self, other: Size) -> bool:
        """Whether nothing is more than in another batch."""
        if self.rows > other.rows or len(self.per_row) != len(other.per_row):
            return False
        return self.per_row == other.per_row or all(
            len(a) == len(b) and not any(map(gt, a, b)) for a, b in zip(self.per_row, other.per_row, strict=True)
        )

    def joined(self, other: Size) -> Size:
        """The larger one of each."""
        both = zip_longest(self.per_row, other.per_row, fillvalue=())
        per_row = (tuple(max(pair) for pair in zip_longest(a, b, fillvalue=0)) for a, b in both)
        return Size(max(self.rows, other.rows), tuple(per_row))


NO_SIZE = Size(0, ())


def size_of(cut: Cut, tensors: Sequence[Tensor]) -> Size:
    """How large the batch among the inputs is."""
    rows = cut.rows(tensors) or 0
    per_row: list[tuple[int, ...]] = [tuple(tensor.shape) for tensor in tensors]
    for place in cut.positions:
        per_row[place] = (tensors[place].numel() // max(rows, 1), *tensors[place].shape[1:])
    return Size(rows, tuple(per_row))


def candidates(tensors: Sequence[Tensor]) -> list[Cut]:
    """Cuts worth a trial, the likeliest first.

    The batch is the first dimension of the first tensor that has one, or else that of a later one. A tensor may have
    as many rows by chance (a table of 30 for a batch of 30), so leaving out one of several is tried too.
    """
    sizes = dict.fromkeys(tensor.shape[0] for tensor in tensors if tensor.dim() > 0)
    found: list[Cut] = []
    for size in list(sizes)[:3]:
        places = tuple(place for place, tensor in enumerate(tensors) if tensor.dim() > 0 and tensor.shape[0] == size)
        found.append(Cut(places))
        if len(places) > 1:
            found += [Cut(places[:index] + places[index + 1 :]) for index in reversed(range(len(places)))]
    return found


def batch_rows(batch: Any) -> int | None:
    """Rows of a batch of a data loader: the first dimension of its first tensor that has one; None if it is not clear.

    If that tensor stands in a list, the list may have an item for each row (pictures of several sizes, texts) or the
    batch in each item (views of the same pictures). Other tensors and lists tell; where they do not, it is None. So it
    is for a list of samples of several values each, which is what a loader gives that does not put them together.
    """
    found = Tree(batch)
    if found.opaque is not None or any(each.layout is not torch.strided or each.is_nested for each in found.tensors):
        return None
    tensors = [tensor for tensor in found.tensors if tensor.dim() > 0]
    if not tensors or _is_of_items(batch, tensors[0]):
        return None
    if any(_is_numbered(each) for each in _mappings_in(batch)):
        return None
    lists = list(_lists_in(batch))
    first = next((each for each in lists if any(item is tensors[0] for item in each)), None)
    if first is None or len(first) < 2 or not all(isinstance(item, Tensor) and item.dim() for item in first):
        return tensors[0].shape[0]
    in_lists = {id(tensor) for each in lists for tensor in Tree(each).tensors}
    others = {tensor.shape[0] for tensor in tensors if id(tensor) not in in_lists}
    sizes = {item.shape[0] for item in first}
    # Pairs of tensors that belong together, as each of several loaders gives one, are no list of samples.
    samples = [each for each in lists if each is not first and len(each) == len(first) and not _is_of_one_batch(each)]
    are_samples = len({item.dim() for item in first}) == 1 and (len(first) in others or bool(samples))
    if len(sizes) == 1 and (sizes & others or not are_samples):
        return tensors[0].shape[0]
    return len(first) if are_samples and len(first) not in sizes else None


def _mappings_in(value: Any) -> Iterator[dict[Any, Any]]:
    if isinstance(value, dict):
        yield value
    for each in _items_of(value):
        yield from _mappings_in(each)


def _is_numbered(mapping: dict[Any, Any]) -> bool:
    """Whether it has an item for each of some rows."""
    return len(mapping) > 1 and all(type(key) is int for key in mapping) and sorted(mapping) == [*range(len(mapping))]


def _is_of_items(batch: Any, first: Tensor) -> bool:
    """Whether some container that leads to the first tensor of a batch may have an item for each row."""
    todo = [batch]
    while todo:
        value = todo.pop()
        if not any(tensor is first for tensor in Tree(value).tensors) or isinstance(value, Tensor):
            continue
        if isinstance(value, PackedSequence):
            return True
        items = list(_items_of(value))
        is_open = isinstance(value, (list, tuple)) and not hasattr(value, "_fields")
        if is_open and len(items) > 1 and _may_be_samples(items, is_batch=value is batch):
            return True
        todo += items
    return False


def _items_of(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, (list, tuple)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    return ()


def _may_be_samples(items: Sequence[Any], *, is_batch: bool) -> bool:
    """Whether items of a batch may be its rows. A few with rows of their own are those of several loaders."""
    if all(isinstance(item, Tensor) for item in items):  # see `batch_rows` for those of an inner list
        return is_batch and len(items) > _FEW and len({(item.shape, item.dtype) for item in items}) == 1
    if any(isinstance(item, (Tensor, str, bytes)) for item in items) or len(set(map(type, items))) > 1:
        return False
    trees = list(map(Tree, items))
    if any(tree.form != trees[0].form for tree in trees):
        return False
    return len(items) > _FEW or not all(map(_has_rows_of_its_own, trees))


def _has_rows_of_its_own(item: Tree) -> bool:
    has_numbers = any(isinstance(value, (int, float)) for value in item.values)
    return not has_numbers and len({tensor.shape[0] if tensor.dim() else -1 for tensor in item.tensors}) == 1


def _is_of_one_batch(items: Sequence[Any]) -> bool:
    """Whether all are tensors with as many rows."""
    return len({item.shape[0] if isinstance(item, Tensor) and item.dim() else id(item) for item in items}) == 1


def _lists_in(batch: Any) -> Iterator[Sequence[Any]]:
    """Lists and tuples within a batch; the batch itself is none of them."""
    todo = list(batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else ())
    while todo:
        value = todo.pop(0)
        if isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            yield value
            todo += value


Path = tuple[Any, ...]
"""Keys, indices and names of fields that lead to a place in a batch."""

_MOST_ITEMS = 64  # of a list that is looked into
_FEW = 3  # loaders, or views of a row


def cut_rows(obj: Any, rows: int, start: int, stop: int, whole: Container[Path] = (), path: Path = ()) -> Any:
    """The rows from `start` to before `stop` of a batch of a data loader.

    Tensors with `rows` rows are cut, and so are lists of that length whose items are not batches themselves (texts,
    images of different sizes); everything else is handed on whole, and so is what stands at a path in `whole`.
    """

    def part(value: Any, key: Any) -> Any:
        return cut_rows(value, rows, start, stop, whole, (*path, key))

    if isinstance(obj, Tensor):
        return obj[start:stop] if obj.dim() > 0 and obj.shape[0] == rows and path not in whole else obj
    if isinstance(obj, dict):
        return with_values(obj, {key: part(value, key) for key, value in obj.items()})
    if isinstance(obj, (list, tuple)):
        if path not in whole and _has_item_for_each(obj, rows):
            return obj[start:stop]
        items = [part(item, index) for index, item in enumerate(obj)]
        return type(obj)(*items) if hasattr(obj, "_fields") else type(obj)(items)
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return with_fields(obj, {f.name: part(getattr(obj, f.name, None), f.name) for f in dataclasses.fields(obj)})
    return obj


def not_of_rows(obj: Any, rows: int, path: Path = ()) -> Iterator[Path]:
    """Where in a batch stand tensors and lists that do not have its rows: they are no rows in any batch.

    Empty ones say nothing.
    """
    if isinstance(obj, Tensor):
        if obj.dim() > 0 and obj.shape[0] not in (0, rows):
            yield path
    elif isinstance(obj, dict):
        for key, value in obj.items():
            yield from not_of_rows(value, rows, (*path, key))
    elif isinstance(obj, (list, tuple)):
        if _has_item_for_each(obj, rows):
            return
        if obj and len(obj) != rows:
            yield path
        if len(obj) <= _MOST_ITEMS:
            for index, item in enumerate(obj):
                yield from not_of_rows(item, rows, (*path, index))
    elif dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        for field in dataclasses.fields(obj):
            yield from not_of_rows(getattr(obj, field.name, None), rows, (*path, field.name))


def _has_item_for_each(items: Sequence[Any], rows: int) -> bool:
    """Whether it is a list of samples, as far as one batch tells."""
    return len(items) == rows and not hasattr(items, "_fields") and not any(_has_rows(item, rows) for item in items)


def has_item_for_each_row(obj: Any, rows: int) -> bool:
    """Whether there is a list or tuple somewhere in a structure that has a value, and no tensor, for each row."""
    if isinstance(obj, dict):
        return any(has_item_for_each_row(value, rows) for value in obj.values())
    if isinstance(obj, (list, tuple)) and not isinstance(obj, torch.Size):
        if len(obj) == rows and not hasattr(obj, "_fields") and not any(Tree(item).tensors for item in obj):
            return True
        return any(has_item_for_each_row(item, rows) for item in obj)
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return any(has_item_for_each_row(getattr(obj, f.name, None), rows) for f in dataclasses.fields(obj))
    return False


def _has_rows(obj: Any, rows: int) -> bool:
    return any(tensor.dim() > 0 and tensor.shape[0] == rows for tensor in Tree(obj).tensors)


class Join:
    """The outputs of all micro-batches of one call, checked for what joining needs.

    Args:
        trees: The output of each micro-batch, taken apart.
        rows: Rows of each micro-batch.

    Attributes:
        columns: For each output tensor, its parts.

    Raises:
        CannotCutError: The outputs differ in structure, or one of them has no rows.
    """

    def __init__(self, trees: Sequence[Tree], rows: Sequence[int]) -> None:
        first = self._first = trees[0]
        for tree in trees:
            if tree.opaque is not None:
                raise CannotCutError(f"it returns a {type(tree.opaque).__name__}, which cannot be joined")
            if tree.form != first.form or not _same(tree.values, first.values):
                raise CannotCutError("what it returns differs between parts of a batch")
        self.columns = [[tree.tensors[place] for tree in trees] for place in range(len(first.tensors))]
        for tensor in first.tensors:
            if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
                raise CannotCutError("an output is sparse, nested or quantized, which is not joined")
        for column in self.columns:
            if any(part.dim() == 0 or part.shape[0] != size for part, size in zip(column, rows, strict=True)):
                shape = tuple(column[0].shape)
                raise CannotCutError(f"an output of shape {shape} does not have the batch as first dimension")
            if len({(part.dtype, part.device, part.shape[1:]) for part in column}) > 1:
                raise CannotCutError("the shapes or dtypes of its outputs differ between parts of a batch")

    def has_form_of(self, whole: Tree) -> bool:
        """Whether the structure and the values that are no tensors are those of an output of the whole batch."""
        return self._first.form == whole.form and _same(self._first.values, whole.values)

    def build(self, tensors: Sequence[Tensor]) -> Any:
        """The output of the whole batch, made of joined tensors."""
        return self._first.build(tensors)


def offsets(rows: Sequence[int]) -> list[int]:
    """First row of each micro-batch, and the end."""
    return [0, *accumulate(rows)]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts, in a new tensor: never a view of one of them."""
    return torch.cat([part.detach() for part in parts])


def _same(values: Sequence[Any], others: Sequence[Any]) -> bool:
    if len(values) != len(others):
        return False
    try:
        return all(a is b or bool(a == b) for a, b in zip(values, others, strict=True))
    except Exception:  # objects that cannot be compared are not the same
        return False
