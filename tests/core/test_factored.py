"""FactoredMatrix against the big matrix, in float64."""

import weakref

import numpy as np
import pytest
import torch

import lens_core as lens
from lens_core import FactoredMatrix
from lens_core.errors import ArgumentError

SHAPES = {"one": (), "leading": (2, 3)}
SIZES = {"narrow": (7, 3, 9), "square": (8, 3, 8), "wide in the middle": (4, 11, 5), "tall": (3, 5, 11)}


def draw(*shape, seed=0, dtype=torch.float64):
    """Give random numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(params=SHAPES)
def leading(request):
    """Give leading axes."""
    return SHAPES[request.param]


@pytest.fixture(params=SIZES)
def matrix(request, leading):
    """Give a factored matrix."""
    rows, inner, columns = SIZES[request.param]
    return FactoredMatrix(draw(*leading, rows, inner), draw(*leading, inner, columns, seed=1))


def same(made, expected):
    """Equal to rounding in float64."""
    torch.testing.assert_close(made, expected, rtol=1e-11, atol=1e-11)


def test_shape_and_factors(matrix, leading):
    """What the dense matrix has, and its factors as they were given."""
    dense = matrix.A @ matrix.B
    assert matrix.shape == dense.shape
    assert (matrix.ldim, matrix.rdim, matrix.ndim) == (*dense.shape[-2:], dense.ndim)
    assert matrix.mdim == matrix.A.shape[-1]
    assert matrix.has_leading_dims == bool(leading)
    assert matrix.pair == (matrix.A, matrix.B)
    same(matrix.AB, dense)
    same(matrix.T.AB, dense.mT)
    assert matrix.T.A.data_ptr() == matrix.B.data_ptr()


def test_decomposition_is_the_dense_matrix_s(matrix):
    """Singular values, norms, and vectors whose product is the matrix; Vh has vectors in rows."""
    dense = matrix.AB
    U, S, Vh = matrix.svd()
    rank = min(matrix.ldim, matrix.mdim, matrix.rdim)
    assert S.shape[-1] == rank
    same(S, torch.linalg.svdvals(dense)[..., :rank])
    same(U @ S.diag_embed() @ Vh, dense)
    eye = torch.eye(rank, dtype=torch.float64).expand(*S.shape[:-1], rank, rank)
    same(U.mT @ U, eye)
    same(Vh @ Vh.mT, eye)
    same(dense @ Vh.mT, U * S[..., None, :])
    same(matrix.norm(), dense.square().sum((-2, -1)).sqrt())
    same((matrix.S, matrix.U, matrix.Vh)[0], S)
    assert matrix.U.shape == U.shape
    assert matrix.Vh.shape == Vh.shape


def test_collapsed_and_even_forms_keep_what_they_say(matrix):
    """Gram matrices stay; even factors are the same matrix, each with the roots of the singular values."""
    dense = matrix.AB
    left, right = matrix.collapse_l(), matrix.collapse_r()
    same(left.mT @ left, dense.mT @ dense)
    same(right @ right.mT, dense @ dense.mT)
    even = matrix.make_even()
    same(even.AB, dense)
    same(torch.linalg.svdvals(even.A), matrix.S.sqrt())
    same(torch.linalg.svdvals(even.B), matrix.S.sqrt())


@pytest.mark.parametrize("inner", [3, 8, 11])
def test_eigenvalues_are_those_of_the_big_matrix_but_for_zeros(leading, inner):
    """Also where the middle is wider than the matrix."""
    matrix = FactoredMatrix(draw(*leading, 8, inner), draw(*leading, inner, 8, seed=1))

    def sorted_by_size(values):
        order = values.abs().sort(descending=True).indices
        return values.gather(-1, order)[..., : min(8, inner)].abs()

    same(sorted_by_size(matrix.eigenvalues), sorted_by_size(torch.linalg.eigvals(matrix.AB)))
    same(matrix.eigenvalues.sum(-1).real, matrix.AB.diagonal(dim1=-2, dim2=-1).sum(-1))


def test_eigenvalues_of_an_oblong_are_refused():
    """They are not defined."""
    with pytest.raises(ArgumentError, match="this one is 7 x 9"):
        _ = FactoredMatrix(draw(7, 3), draw(3, 9)).eigenvalues


@pytest.mark.parametrize(
    "index",
    [
        0,
        -1,
        slice(1, 3),
        (0, 1),
        (0, ..., slice(2, 4)),
        (..., slice(None), [0, 2]),
        (slice(None), torch.tensor([0, 2])),
        (None, 1),
        (1, 2, slice(1, 5), slice(None, None, 2)),
        torch.tensor([[True, False, True], [False, False, True]]),
        (0, [True, False, True]),
        ...,
    ],
)
def test_indexing_is_that_of_the_dense_tensor(index):
    """Leading axes, rows and columns."""
    matrix = FactoredMatrix(draw(2, 3, 7, 3), draw(2, 3, 3, 9, seed=1))
    same(matrix[index].AB, matrix.AB[index])


def test_an_int_for_rows_or_columns_keeps_a_matrix():
    """Of length one, as in TransformerLens; the factors stay views."""
    matrix = FactoredMatrix(draw(2, 7, 3), draw(2, 3, 9, seed=1))
    same(matrix[1, 4].AB, matrix.AB[1, 4][None])
    same(matrix[..., -1].AB, matrix.AB[..., -1:])
    same(matrix[0, -2, 3].AB, matrix.AB[0, 5:6, 3:4])
    assert matrix[1, 4].A.untyped_storage().data_ptr() == matrix.A.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("index", "told"),
    [
        (2, "does not fit"),
        ((0, 7), "7 is out of bounds"),
        ((0, 0, 9), "9 is out of bounds"),
        ((0, 0, 0, 0), "4 indices for the 3 axes"),
        ((..., 0, ...), "one ... at most"),
        ((0, 1, torch.ones(7, 9, dtype=torch.bool)), "4 axes|2D mask|indices"),
    ],
)
def test_an_index_that_is_not_there_is_told(index, told):
    """And not answered by an empty matrix."""
    with pytest.raises(ArgumentError, match=told):
        _ = FactoredMatrix(draw(2, 7, 3), draw(2, 3, 9, seed=1))[index]


def test_iteration_goes_over_the_first_leading_axis_and_ends():
    """A single matrix has none."""
    matrix = FactoredMatrix(draw(2, 7, 3), draw(2, 3, 9, seed=1))
    assert len(matrix) == 2
    for one, dense in zip(matrix, matrix.AB, strict=True):
        same(one.AB, dense)
    with pytest.raises(ArgumentError, match="no length"):
        list(matrix[0])


def test_products_on_both_sides(matrix, leading):
    """Vectors give tensors, matrices and factored matrices factored ones; of the least inner width."""
    dense = matrix.AB
    row, column = draw(matrix.ldim, seed=2), draw(matrix.rdim, seed=3)
    same(row @ matrix, row @ dense)
    same(matrix @ column, dense @ column)
    for width in (1, 6, 20):
        right, left = draw(*leading, matrix.rdim, width, seed=4), draw(width, matrix.ldim, seed=5)
        made = matrix @ right
        same(made.AB, dense @ right)
        assert made.mdim == min(matrix.mdim, matrix.rdim)
        made = left @ matrix
        same(made.AB, left @ dense)
        assert made.mdim == min(matrix.mdim, matrix.ldim)
        other = FactoredMatrix(draw(matrix.rdim, width, seed=6), draw(width, 5, seed=7))
        both = matrix @ other
        same(both.AB, dense @ other.AB)
        assert both.mdim == min(matrix.mdim, width)


def test_leading_axes_broadcast():
    """By views: nothing is copied."""
    A, B = draw(2, 1, 7, 3), draw(4, 3, 9, seed=1)
    matrix = FactoredMatrix(A, B)
    assert matrix.shape == (2, 4, 7, 9)
    same(matrix.AB, A @ B)
    assert matrix.A.data_ptr() == A.data_ptr()
    assert matrix.B.data_ptr() == B.data_ptr()
    same(
        (matrix.unsqueeze(1) @ FactoredMatrix(draw(5, 1, 9, 2), draw(5, 1, 2, 3))).AB.mean(0),
        ((A @ B)[:, None] @ (draw(5, 1, 9, 2) @ draw(5, 1, 2, 3))).mean(0),
    )


def test_numbers_scale(matrix):
    """From both sides; tensors of one element and numpy's numbers too."""
    for number in (3, 0.25, torch.tensor(2.0), torch.tensor([2.0]), np.float64(1.5)):
        expected = matrix.AB * float(number)
        same((matrix * number).AB, expected)
        same((number * matrix).AB, expected)
        same((matrix / number).AB, matrix.AB / float(number))
    same((-matrix).AB, -matrix.AB)
    with pytest.raises(ArgumentError, match="one number"):
        _ = matrix * draw(2)
    with pytest.raises(TypeError):
        _ = matrix * "2"


def test_corners_and_new_axes(leading):
    """As of the dense tensor."""
    matrix = FactoredMatrix(draw(*leading, 7, 3), draw(*leading, 3, 9, seed=1))
    same(matrix.get_corner(2), matrix.AB[tuple(slice(2) for _ in range(matrix.ndim))])
    assert matrix.unsqueeze(0).shape == (1, *matrix.shape)
    with pytest.raises(ArgumentError, match=f"0 to {len(leading)}; got {len(leading) + 1}"):
        matrix.unsqueeze(len(leading) + 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_decomposed_in_float32(dtype):
    """Of the very values that the halves have."""
    A, B = draw(8, 3, dtype=dtype), draw(3, 8, seed=1, dtype=dtype)
    matrix, wide = FactoredMatrix(A, B), FactoredMatrix(A.float(), B.float())
    U, S, Vh = matrix.svd()
    assert {U.dtype, S.dtype, Vh.dtype, matrix.norm().dtype} == {torch.float32}
    torch.testing.assert_close(U @ S.diag_embed() @ Vh, wide.AB, rtol=1e-5, atol=1e-5)
    assert matrix.eigenvalues.dtype == torch.complex64
    assert matrix.AB.dtype == dtype


def test_small_singular_values_keep_their_digits():
    """What squaring the factors would lose: 1e-7 beside 1 in float32 has 5 digits left."""
    U, V = torch.linalg.qr(draw(30, 4)).Q, torch.linalg.qr(draw(30, 4, seed=1)).Q
    values = torch.tensor([1.0, 1e-2, 1e-5, 1e-7], dtype=torch.float64)
    matrix = FactoredMatrix((U * values).float(), V.mT.float())
    torch.testing.assert_close(matrix.S.double(), values, rtol=1e-4, atol=0.0)
    assert matrix.norm() == pytest.approx(float(values.norm()), rel=1e-6)


def test_gradients_flow_through_products_and_norms():
    """The same as through the dense matrix."""
    A, B = draw(7, 3).requires_grad_(), draw(3, 9, seed=1).requires_grad_()
    made = torch.autograd.grad(FactoredMatrix(A, B).norm() + FactoredMatrix(A, B).S[0], (A, B))
    dense = A @ B
    expected = torch.autograd.grad(dense.norm() + torch.linalg.svdvals(dense)[0], (A, B))
    same(made[0], expected[0])
    same(made[1], expected[1])
    assert not FactoredMatrix(A, B).detach().A.requires_grad


def test_nothing_is_kept_after_a_decomposition():
    """TransformerLens' cache on the instance held every matrix ever decomposed."""
    A = draw(7, 3)
    matrix = FactoredMatrix(A, draw(3, 9))
    matrix.svd()
    kept = weakref.ref(matrix)
    storage = weakref.ref(A)
    del matrix, A
    assert kept() is None
    assert storage() is None


@pytest.mark.parametrize(
    ("A", "B", "told"),
    [
        (draw(7, 3), draw(4, 9), "has 3 columns and B .4, 9. 4 rows"),
        (draw(7, 3), draw(3, 9).float(), "one dtype and device"),
        (draw(2, 7, 3), draw(3, 3, 9), "do not broadcast"),
        (draw(3), draw(3, 9), "two axes or more; got torch.float64 .3."),
        (torch.ones(2, 2, dtype=torch.long), draw(2, 9), "A is a floating tensor"),
        (draw(7, 3), [[1.0]], "B is a floating tensor"),
    ],
)
def test_factors_that_do_not_fit_are_refused(A, B, told):
    """With their shapes."""
    with pytest.raises(ArgumentError, match=told):
        FactoredMatrix(A, B)


def test_products_that_do_not_fit_are_refused():
    """Also vectors and numbers of no axis."""
    matrix = FactoredMatrix(draw(7, 3), draw(3, 9))
    for make, told in (
        (lambda: matrix @ draw(7, 2), "9 columns meet 7 rows"),
        (lambda: draw(2, 9) @ matrix, "9 columns meet 7 rows"),
        (lambda: matrix @ draw(7), "9 columns meet 7 rows"),
        (lambda: matrix @ matrix, "9 columns meet 7 rows"),
        (lambda: torch.tensor(1.0) @ matrix, "0 columns meet 7 rows"),
        (lambda: matrix @ draw(9, 2).float(), "one dtype and device"),
    ):
        with pytest.raises(ArgumentError, match=told):
            make()
    with pytest.raises(TypeError):
        _ = matrix @ "x"


def test_it_is_a_public_name():
    """Loaded when it is touched."""
    assert lens.FactoredMatrix is FactoredMatrix
    assert "mdim=3" in repr(FactoredMatrix(draw(7, 3), draw(3, 9)))
