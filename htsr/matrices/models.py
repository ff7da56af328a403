"""A model as its weight matrices, none of them read yet, and which of them are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import index
from typing import Any, TypeVar

from htsr.arrays import Array, Product
from htsr.errors import MatrixError, UsageError
from htsr.matrices import roles
from htsr.matrices.axes import Axes
from htsr.matrices.patterns import matches, require
from htsr.matrices.positions import Position
from htsr.results import Column, Record, Table, Tabular, counted, tabulate

Read = TypeVar("Read")


@dataclass(frozen=True)
class WeightMatrix:
    """One weight matrix (or stack of kernel slices) of a model, unread.

    Attributes:
        name: name in the checkpoint without ``.weight``, with ``[q]`` or ``[3]`` for a part of a fused tensor.
        shape: (rows, columns) of the matrix, or of one slice of a kernel.
        pieces: number of slices of a convolution kernel or of another stack; 1 for a plain matrix.
        role: what the matrix does in the model (`htsr.matrices.roles`).
        block: index of the transformer block that it lies in; None outside of all blocks.
        kind: ``linear``, ``embedding``, ``conv``, ``expert``, ``adapter``, or ``stack`` of slices that are no kernel
            (one matrix per head, say).
        dtype: dtype that the matrix is stored in, as torch names it.
        load: function that reads the matrix: (rows, columns), or (pieces, rows, columns).
        position: place of the matrix in its stored tensor.
        problem: (status, sentence) where the matrix cannot be read.
        warning: sentence that a reader of its row should know; empty where there is none.
        factors: function that reads the two factors whose product the matrix is, such as B and A of a LoRA adapter;
            None where there are none.
        axes: what rows and columns stand for.

    Examples:
        >>> import htsr, numpy as np, torch
        >>> (matrix,) = htsr.describe({"layers.0.mlp.up_proj.weight": torch.ones(8, 4)})
        >>> matrix.name, matrix.role, matrix.block, matrix.shape, matrix.dtype
        ('layers.0.mlp.up_proj', 'mlp.up', 0, (8, 4), 'float32')
        >>> float(np.asarray(matrix.read()).sum())
        32.0
    """

    name: str
    shape: tuple[int, int]
    pieces: int
    role: str
    block: int | None
    kind: str
    dtype: str
    load: Callable[[], Array] = field(repr=False, compare=False)
    position: Position = field(repr=False, compare=False)
    problem: tuple[str, str] | None = None
    warning: str = ""
    factors: Callable[[], Product] | None = field(default=None, repr=False, compare=False)
    axes: Axes = field(default=Axes(), repr=False, compare=False)

    @property
    def parameters(self) -> int:
        """Number of entries."""
        return self.pieces * self.shape[0] * self.shape[1]

    @property
    def cost(self) -> float:
        """Floating-point operations of Gram matrix and eigenvalues, by which threads and processes share the work."""
        small, large = sorted(self.shape)
        return float(self.pieces * (small * small * large + 4 / 3 * small**3))

    def read(self) -> Array:
        """The matrix, (rows, columns) or (pieces, rows, columns), in the stored float dtype, or else in float32.

        Raises:
            MatrixError: the matrix cannot be read; the message names the tensor.
        """
        return self._attempt(self.load)

    def opened(self) -> Array | Product:
        """The matrix as `read` gives it, (rows, columns) or (pieces, rows, columns), or its factors where it has such.

        Raises:
            MatrixError: the matrix cannot be read; the message names the tensor.
        """
        return self._attempt(self.factors or self.load)

    def _attempt(self, load: Callable[[], Read]) -> Read:
        if self.problem:
            raise MatrixError(*self.problem)
        try:
            return load()
        except MatrixError:
            raise
        except Exception as error:
            raise MatrixError("unreadable", f"{self.name} could not be read: {error}") from error


def by_tensor(matrices: Iterable[WeightMatrix]) -> list[list[WeightMatrix]]:
    """`matrices` in groups: those that are parts of one tensor together, in their order."""
    tensors: dict[str, list[WeightMatrix]] = {}
    for matrix in matrices:
        tensors.setdefault(roles.whole_name(matrix.name), []).append(matrix)
    return list(tensors.values())


@dataclass(frozen=True)
class Filter:
    """Which matrices are wanted. Patterns are shell-style and match whole names, as in ``*.q_proj`` or ``mlp.*``.

    ``*`` and ``?`` are wildcards, brackets stand for themselves: ``*.c_attn[q]`` is the query in a fused tensor.
    Patterns and block indices can be given as any collection, and a single pattern as a string.

    Attributes:
        include: name patterns, any of which must match; empty for all.
        exclude: name patterns, none of which may match.
        roles: role patterns, any of which must match; empty for all.
        blocks: block indices; None for all matrices, also those outside of blocks.
        min_size: smallest M that is wanted; M is the smaller side of a matrix.
        max_size: largest M that is wanted; None for any.
        exclude_roles: role patterns, none of which may match.

    Raises:
        UsageError: a field has a value of another kind.

    Examples:
        >>> import htsr, torch
        >>> state = {f"layers.{i}.{name}.weight": torch.ones(8, 8) for i in (0, 1) for name in ("q_proj", "up_proj")}
        >>> where = htsr.Filter(include="*.q_proj", blocks=[1])
        >>> [matrix.name for matrix in htsr.describe(state, where=where)]
        ['layers.1.q_proj']
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    blocks: frozenset[int] | None = None
    min_size: int = 0
    max_size: int | None = None
    exclude_roles: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        kinds: dict[str, tuple[Callable[[Any], Any], str]] = {
            **dict.fromkeys(
                ("include", "exclude", "roles", "exclude_roles"), (_patterns, "patterns such as '*.q_proj'")
            ),
            "blocks": (_blocks, "block indices such as (0, 1)"),
            "min_size": (_whole, "a whole number"),
            "max_size": (_size, "a whole number"),
        }
        for name, (as_kind, kind) in kinds.items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, as_kind(value))
            except TypeError as error:
                raise UsageError(f"{name} of a Filter takes {kind}, not {value!r}") from error

    def __call__(self, matrix: WeightMatrix) -> bool:
        """Whether `matrix` is wanted."""
        M = min(matrix.shape)
        return (
            (not self.include or matches(matrix.name, self.include))
            and not matches(matrix.name, self.exclude)
            and (not self.roles or matches(matrix.role, self.roles))
            and not matches(matrix.role, self.exclude_roles)
            and (self.blocks is None or matrix.block in self.blocks)
            and self.min_size <= M
            and (self.max_size is None or self.max_size >= M)
        )

    def check(self, matrices: Iterable[WeightMatrix], of: str) -> None:
        """Refuse what can only be a mistake: a pattern or block that no matrix has.

        Args:
            matrices: all matrices of the model or models that the filter is meant for.
            of: what to call these models in the sentence.

        Raises:
            UsageError: a pattern or block has no matrix; the message has the nearest name, or the blocks there are.
        """
        matrices = list(matrices)
        require(self.include + self.exclude, {m.name for m in matrices}, of)
        require(self.roles + self.exclude_roles, {m.role for m in matrices}, of, "role")
        known = {m.block for m in matrices} - {None}
        if unknown := sorted((self.blocks or frozenset()) - known):
            there = f"its blocks are {_ranges(sorted(b for b in known if b is not None))}" if known else "it has none"
            raise UsageError(f"{of} has no block {_ranges(unknown)}; {there}")


def as_filter(where: Filter | None, default: Filter | None = None) -> Filter:
    """The filter that a caller's `where` stands for.

    Args:
        where: a `Filter`, or None.
        default: filter that None stands for; None again stands for one that takes all matrices.

    Raises:
        UsageError: `where` is neither.
    """
    if where is not None and not isinstance(where, Filter):
        raise UsageError(f"where takes a Filter such as htsr.Filter(roles='attn.*'), not {where!r}")
    return where or default or Filter()


def _patterns(given: str | Iterable[str]) -> tuple[str, ...]:
    patterns = (given,) if isinstance(given, str) else tuple(given)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError
    return patterns


def _blocks(given: Iterable[int] | None) -> frozenset[int] | None:
    return None if given is None else frozenset(_whole(block) for block in given)


def _size(given: int | None) -> int | None:
    return None if given is None else _whole(given)


def _whole(given: int) -> int:
    if isinstance(given, bool):
        raise TypeError
    return index(given)


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending `numbers` as text, as in ``0-3, 7``."""
    starts = [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n - 1]
    ends = [n for i, n in enumerate(numbers) if i == len(numbers) - 1 or numbers[i + 1] != n + 1]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


@dataclass(frozen=True, repr=False)
class Model(Tabular):
    """A model as its matrices.

    Attributes:
        label: what to call the model: path, hub id, or class name.
        matrices: all weight matrices in the model's order; tied ones count once.
        fingerprint: text that changes when the model's files do; None for sources in memory.

    Examples:
        >>> import htsr, torch
        >>> model = htsr.describe(torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 3)))
        >>> model
        <Model 'Sequential': 2 matrices>
        >>> [(matrix.name, matrix.shape, matrix.kind) for matrix in model]
        [('0', (10, 4), 'embedding'), ('1', (3, 4), 'linear')]
    """

    label: str
    matrices: tuple[WeightMatrix, ...]
    fingerprint: str | None = None

    def __repr__(self) -> str:
        return f"<Model {self.label!r}: {counted(len(self.matrices), 'matrix', 'matrices')}>"

    def __iter__(self) -> Iterator[WeightMatrix]:
        return iter(self.matrices)

    def records(self) -> list[Record]:
        """One dictionary a matrix."""
        return [
            {
                "name": m.name,
                "role": m.role,
                "block": m.block,
                "kind": m.kind,
                "rows": m.shape[0],
                "columns": m.shape[1],
                "pieces": m.pieces,
                "parameters": m.parameters,
                "stored": m.dtype,
                "problem": m.problem[1] if m.problem else "",
                "warning": m.warning,
            }
            for m in self.matrices
        ]

    def types(self) -> dict[str, type]:
        """The type of the block: a model may have none."""
        return {"block": int}

    def tables(self) -> tuple[Table, ...]:
        """The matrices."""
        columns: list[tuple[Column, Callable[[WeightMatrix], str | float | None]]] = [
            (Column("matrix", text=True), lambda m: m.name),
            (Column("role", text=True), lambda m: m.role),
            (Column("block"), lambda m: m.block),
            (Column("kind", text=True), lambda m: m.kind),
            (Column("shape"), lambda m: f"{m.shape[0]}×{m.shape[1]}" + (f"·{m.pieces}" if m.pieces > 1 else "")),
            (Column("Q", ".2f"), lambda m: max(m.shape) / min(m.shape)),
            (Column("parameters", ","), lambda m: m.parameters),
            (Column("stored", text=True), lambda m: m.dtype),
            (Column("note", text=True, optional=True), lambda m: m.problem[1] if m.problem else m.warning),
        ]
        return (tabulate(self.matrices, columns, spare=("Q", "kind", "block", "stored", "role", "note")),)

    def remarks(self) -> tuple[str, ...]:
        """How many matrices and parameters there are."""
        total = sum(m.parameters for m in self.matrices)
        return (f"{self.label}: {counted(len(self.matrices), 'matrix', 'matrices')}, {total:,} parameters in them",)

    def filtered(self, wanted: Filter, *, checked: bool = False) -> Model:
        """The same model with the wanted matrices only.

        Args:
            wanted: filter that each matrix has to pass.
            checked: whether `wanted.check` has been called before, for several models together.

        Raises:
            UsageError: no matrix is left, or the model lacks a pattern or block of `wanted`.
        """
        if self.matrices and not checked:
            wanted.check(self.matrices, self.label)
        kept = tuple(matrix for matrix in self.matrices if wanted(matrix))
        if self.matrices and not kept:
            known = ", ".join(sorted({m.role for m in self.matrices}))
            raise UsageError(f"no matrix of {self.label} passes the filter; its roles are {known}")
        return replace(self, matrices=kept)
