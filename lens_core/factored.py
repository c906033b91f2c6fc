"""A matrix kept as a product of two: an attention head's QK and OV, of rank `d_head`, without the big matrix.

Whatever can be computed from the small factors is. Nothing is remembered between calls, so no decomposition keeps
memory; who needs all of U, S and Vh calls `svd()` once.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from lens_core._arguments import checks_arguments
from lens_core.errors import ArgumentError

__all__ = ["FactoredMatrix"]

_torch: Any = torch  # partly untyped
_linalg: Any = torch.linalg


class FactoredMatrix:
    """The product `A @ B` with its factors kept apart, for any leading axes; TransformerLens' class, with its names.

    Leading axes broadcast (by views). Vectors are rows, as everywhere in lens: `x @ model.OV[0, 3]` is what head 3 of
    layer 0 writes when it attends to a position whose normed stream is x.

    For those who come from TransformerLens: `svd()` and `Vh` follow `torch.linalg.svd`, so `Vh` has a singular vector
    in each *row* (there it is V, with one in each column), and `U @ S.diag_embed() @ Vh` is the matrix.

    Attributes:
        A: The left factor `[..., ldim, mdim]`.
        B: The right factor `[..., mdim, rdim]`.

    Raises:
        ArgumentError: No two floating tensors of one dtype and device whose shapes fit a product.

    Example:
        >>> import torch
        >>> matrix = FactoredMatrix(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]]))
        >>> matrix.AB
        tensor([[3., 4.],
                [6., 8.]])
        >>> matrix.shape, matrix.mdim, matrix.norm()
        (torch.Size([2, 2]), 1, tensor(11.1803))
    """

    __array_ufunc__ = None  # a numpy number on the left leaves the product to us

    @checks_arguments
    def __init__(self, A: Tensor, B: Tensor) -> None:
        for name, factor in (("A", A), ("B", B)):
            if not isinstance(factor, Tensor) or not factor.is_floating_point() or factor.ndim < 2:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ArgumentError(f"{name} is a floating tensor of two axes or more; got {_told(factor)}")
        if A.shape[-1] != B.shape[-2]:
            raise ArgumentError(f"A {list(A.shape)} has {A.shape[-1]} columns and B {list(B.shape)} {B.shape[-2]} rows")
        if A.dtype != B.dtype or A.device != B.device:
            raise ArgumentError(
                f"A is {A.dtype} on {A.device} and B {B.dtype} on {B.device}; give both one dtype and device"
            )
        try:
            leading: tuple[int, ...] = _torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
        except RuntimeError as error:
            raise ArgumentError(
                f"the leading axes of A {list(A.shape)} and B {list(B.shape)} do not broadcast"
            ) from error
        self.A: Float[Tensor, "*leading ldim mdim"] = A.expand(*leading, *A.shape[-2:])
        self.B: Float[Tensor, "*leading mdim rdim"] = B.expand(*leading, *B.shape[-2:])

    def __repr__(self) -> str:
        """Show the shape of the whole and the inner width."""
        return f"FactoredMatrix({list(self.shape)}, mdim={self.mdim}, {self.A.dtype}, {self.A.device})"

    # ------------------------------------------------------------------ shape and factors

    @property
    def ldim(self) -> int:
        """Rows."""
        return self.A.shape[-2]

    @property
    def mdim(self) -> int:
        """Width between the factors: the rank is at most this."""
        return self.A.shape[-1]

    @property
    def rdim(self) -> int:
        """Columns."""
        return self.B.shape[-1]

    @property
    def shape(self) -> torch.Size:
        """The shape of the product."""
        return torch.Size((*self.A.shape[:-1], self.rdim))

    @property
    def ndim(self) -> int:
        """How many axes, leading ones included."""
        return self.A.ndim

    @property
    def has_leading_dims(self) -> bool:
        """Whether there is more than one matrix."""
        return self.ndim > 2

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors."""
        return self.A.dtype

    @property
    def device(self) -> torch.device:
        """Of the factors."""
        return self.A.device

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """The factors, `(A, B)`."""
        return self.A, self.B

    @property
    def T(self) -> "FactoredMatrix":
        """The transpose, of views of the factors."""
        return FactoredMatrix(self.B.mT, self.A.mT)

    @property
    def AB(self) -> Float[Tensor, "*leading ldim rdim"]:
        """The product itself: a tensor of the full size, made anew each time."""
        return self.A @ self.B

    @property
    def BA(self) -> Float[Tensor, "*leading mdim mdim"]:
        """The product the other way round, small, with the same eigenvalues but for zeros.

        Raises:
            ArgumentError: The matrix is not square.
        """
        if self.ldim != self.rdim:
            raise ArgumentError(f"BA and eigenvalues are of square matrices; this one is {self.ldim} x {self.rdim}")
        return self.B @ self.A

    def detach(self) -> "FactoredMatrix":
        """Leave the graph: the same values, of which no gradient is taken."""
        return FactoredMatrix(self.A.detach(), self.B.detach())

    @checks_arguments
    def to(self, *args: Any, **kwargs: Any) -> "FactoredMatrix":
        """Give it in another dtype or on another device, as `Tensor.to`."""
        return FactoredMatrix(self.A.to(*args, **kwargs), self.B.to(*args, **kwargs))

    # ------------------------------------------------------------------ decompositions

    def svd(
        self,
    ) -> tuple[Float[Tensor, "*leading ldim k"], Float[Tensor, "*leading k"], Float[Tensor, "*leading k rdim"]]:
        """Give `(U, S, Vh)` as `torch.linalg.svd(AB, full_matrices=False)`, cut to the k that can be other than zero.

        k is the least of ldim, mdim and rdim. The factors are made orthogonal by QR and only the k x k core between
        them is decomposed, so a matrix costs (ldim + rdim) mdim^2 operations, not those of d_model^3. Half precision
        is decomposed, and comes back, in float32.

        Example:
            >>> import torch
            >>> matrix = FactoredMatrix(torch.rand(5, 2), torch.rand(2, 7))
            >>> U, S, Vh = matrix.svd()
            >>> U.shape, S.shape, Vh.shape
            (torch.Size([5, 2]), torch.Size([2]), torch.Size([2, 7]))
            >>> torch.allclose(U @ S.diag_embed() @ Vh, matrix.AB, atol=1e-5)
            True
        """
        left, core, right = self._orthogonal()
        U, S, Vh = _linalg.svd(core, full_matrices=False)
        return left @ U, S, Vh @ right.mT

    def _orthogonal(self) -> tuple[Tensor, Tensor, Tensor]:
        """Give Q1, core and Q2 with `AB = Q1 core Q2^T`, of orthonormal columns, in at least float32."""
        left, left_rest = _linalg.qr(_wide(self.A))
        right, right_rest = _linalg.qr(_wide(self.B).mT)
        return left, left_rest @ right_rest.mT, right

    @property
    def U(self) -> Float[Tensor, "*leading ldim k"]:
        """Left singular vectors, in columns; from a new `svd()` each time."""
        return self.svd()[0]

    @property
    def S(self) -> Float[Tensor, "*leading k"]:
        """Singular values, largest first; from a new `svd()` each time."""
        return _linalg.svdvals(self._orthogonal()[1])

    @property
    def Vh(self) -> Float[Tensor, "*leading k rdim"]:
        """Right singular vectors, in rows; from a new `svd()` each time."""
        return self.svd()[2]

    @property
    def eigenvalues(self) -> Complex[Tensor, "*leading mdim"]:
        """Eigenvalues of BA: those of the matrix but for zeros, in no order.

        Raises:
            ArgumentError: The matrix is not square.
        """
        return _linalg.eigvals(_wide(self.BA))

    def norm(self) -> Float[Tensor, "*leading"]:
        """Give the Frobenius norm of each matrix, in at least float32."""
        return _linalg.matrix_norm(self._orthogonal()[1])

    def make_even(self) -> "FactoredMatrix":
        """Give the same matrix with factors `U sqrt(S)` and `sqrt(S) Vh`: of equal singular values, and orthogonal."""
        U, S, Vh = self.svd()
        root = S.sqrt()
        return FactoredMatrix(U * root[..., None, :], root[..., :, None] * Vh)

    def collapse_l(self) -> Float[Tensor, "*leading k rdim"]:
        """Give `S Vh`: the matrix up to a rotation of the left side, which no norm or product on the right sees."""
        _, S, Vh = self.svd()
        return S[..., :, None] * Vh

    def collapse_r(self) -> Float[Tensor, "*leading ldim k"]:
        """Give `U S`: the matrix up to a rotation of the right side."""
        U, S, _ = self.svd()
        return U * S[..., None, :]

    # ------------------------------------------------------------------ indexing

    @checks_arguments
    def unsqueeze(self, k: int) -> "FactoredMatrix":
        """Insert a leading axis of one.

        Raises:
            ArgumentError: k is not among the leading axes.
        """
        leading = self.ndim - 2
        if not isinstance(k, int) or not 0 <= k <= leading:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError(f"a leading axis is inserted at 0 to {leading}; got {k!r}")
        return FactoredMatrix(self.A.unsqueeze(k), self.B.unsqueeze(k))

    @checks_arguments
    def get_corner(self, k: int = 3) -> Tensor:
        """Give the first k entries of every axis, to look at."""
        leading = (slice(k),) * (self.ndim - 2)
        return self.A[(*leading, slice(k))] @ self.B[(*leading, slice(None), slice(k))]

    @checks_arguments
    def __getitem__(self, index: Any) -> "FactoredMatrix":
        """Index leading axes, then rows, then columns, as a tensor; the factors are views where indexing gives views.

        An int for rows or columns keeps the axis, of length one: the result is a factored matrix again.

        Raises:
            ArgumentError: An index that does not exist, or more of them than axes.

        Example:
            >>> import torch
            >>> heads = FactoredMatrix(torch.rand(2, 3, 8, 4), torch.rand(2, 3, 4, 8))
            >>> heads[1].shape, heads[1, 2].shape, heads[..., :5, 0].shape
            (torch.Size([3, 8, 8]), torch.Size([8, 8]), torch.Size([2, 3, 5, 1]))
        """
        given: tuple[Any, ...] = cast("tuple[Any, ...]", index) if isinstance(index, tuple) else (index,)
        given = self._without_ellipsis(given)
        leading, rest = self._split(given)
        try:
            A, B = (self.A[leading], self.B[leading]) if leading else (self.A, self.B)
            kept = [_kept(one, size) for one, size in zip(rest, (self.ldim, self.rdim), strict=False)]
            rows, columns = (*kept, slice(None), slice(None))[:2]
            return FactoredMatrix(A[..., rows, :], B[..., columns])
        except IndexError as error:
            raise ArgumentError(f"{index!r} does not fit the shape {list(self.shape)}: {error}") from error

    def _without_ellipsis(self, given: tuple[Any, ...]) -> tuple[Any, ...]:
        at = [place for place, one in enumerate(given) if one is Ellipsis]
        if len(at) > 1:
            raise ArgumentError("an index has one ... at most")
        missing = self.ndim - sum(_axes_of(one) for one in given if one is not Ellipsis)
        if missing < 0:
            raise ArgumentError(f"{len(given)} indices for the {self.ndim} axes of {list(self.shape)}")
        return (*given[: at[0]], *(slice(None),) * missing, *given[at[0] + 1 :]) if at else given

    def _split(self, given: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Part what indexes leading axes from what indexes rows and columns."""
        used, place = 0, 0
        while place < len(given) and used + _axes_of(given[place]) <= self.ndim - 2:
            used += _axes_of(given[place])
            place += 1
        if any(_axes_of(one) != 1 for one in given[place:]):
            raise ArgumentError(
                "rows and columns take an int, a slice, a list or a tensor of ints; no None, no 2D mask"
            )
        return given[:place], given[place:]

    def __len__(self) -> int:
        """Give the length of the first leading axis."""
        if not self.has_leading_dims:
            raise ArgumentError("a single factored matrix has no length; see ldim and rdim")
        return self.shape[0]

    def __iter__(self) -> Iterator["FactoredMatrix"]:
        """Go through the first leading axis."""
        return (self[place] for place in range(len(self)))

    # ------------------------------------------------------------------ arithmetic

    @checks_arguments
    def __matmul__(self, other: Any) -> Any:
        """Multiply a matrix, a factored matrix or a vector from the right.

        A vector `[rdim]` gives a tensor `[..., ldim]`, all else a factored matrix of the least inner width there is.

        Raises:
            ArgumentError: Shapes, dtypes or devices that do not fit.
        """
        if not isinstance(other, Tensor | FactoredMatrix):
            return NotImplemented
        inner = other.shape[-2] if other.ndim > 1 else other.shape[-1] if other.ndim else 0
        if inner != self.rdim:
            raise ArgumentError(f"{list(self.shape)} @ {list(other.shape)}: {self.rdim} columns meet {inner} rows")
        if isinstance(other, FactoredMatrix):
            core = FactoredMatrix(self.B, other.A).AB
            if self.mdim <= other.mdim:
                return FactoredMatrix(self.A, core @ other.B)
            return FactoredMatrix(self.A @ core, other.B)
        if other.ndim == 1:
            return (self @ other[:, None]).AB.squeeze(-1)
        if self.rdim < self.mdim:
            return FactoredMatrix(self.AB, other)
        return FactoredMatrix(self.A, FactoredMatrix(self.B, other).AB)

    @checks_arguments
    def __rmatmul__(self, other: Any) -> Any:
        """Multiply a matrix or a vector from the left; a vector `[ldim]` gives a tensor `[..., rdim]`.

        Raises:
            ArgumentError: Shapes, dtypes or devices that do not fit.
        """
        if not isinstance(other, Tensor):
            return NotImplemented
        inner = other.shape[-1] if other.ndim else 0
        if inner != self.ldim:
            raise ArgumentError(f"{list(other.shape)} @ {list(self.shape)}: {inner} columns meet {self.ldim} rows")
        if other.ndim == 1:
            return (other[None] @ self).AB.squeeze(-2)
        return (self.T @ other.mT).T

    @checks_arguments
    def __mul__(self, scalar: Any) -> "FactoredMatrix":
        """Multiply by a number; the left factor takes it."""
        if isinstance(scalar, bool) or not isinstance(scalar, int | float | Tensor):
            return NotImplemented
        if isinstance(scalar, Tensor) and scalar.numel() != 1:
            raise ArgumentError(f"a factored matrix is multiplied by one number; got a tensor {list(scalar.shape)}")
        number = scalar.reshape(()) if isinstance(scalar, Tensor) else scalar
        return FactoredMatrix(self.A * number, self.B)

    __rmul__ = __mul__

    def __truediv__(self, scalar: Any) -> "FactoredMatrix":
        """Divide by a number."""
        return self * (1 / scalar)

    def __neg__(self) -> "FactoredMatrix":
        """Give the negative."""
        return self * -1


def _wide(tensor: Tensor) -> Tensor:
    """Half precision has no decompositions."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _kept(index: Any, size: int) -> Any:
    """Make an int a slice of one, which keeps the axis and stays a view."""
    if not isinstance(index, int) or isinstance(index, bool):
        return index
    if not -size <= index < size:
        raise IndexError(f"{index} is out of bounds for {size} rows or columns")
    return slice(index % size, index % size + 1)


def _axes_of(index: Any) -> int:
    """Count the axes that an index takes."""
    if index is None:
        return 0
    return index.ndim if isinstance(index, Tensor) and index.dtype == torch.bool else 1


def _told(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
