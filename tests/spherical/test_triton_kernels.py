"""The Triton launchers of the dense spherical losses against the float64 reference, interpreted on the CPU.

The interpreter checks values, masks and addresses, not layouts or machine code: those are for
tests/triton_offline.py. On a machine with a GPU and without TRITON_INTERPRET=1 the same tests run compiled.
"""

import dataclasses
import math
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

import triton
import triton.language as tl
from pyops.triton_kernels.spherical import _common, cross_entropy, spherical_loss

from pyops.spherical import reference

# Interpreted lanes divide by zero and subtract infinities before they are masked, as lanes on a GPU do.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)
KINDS = (*reference.SPHERICAL_LOSSES, "cross_entropy")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IGNORED = -100


# ------------------------------------------------------------------------------------------------------- helpers


@dataclasses.dataclass
class Problem:
    """The arguments of one call, for the launchers and for the reference."""

    logits: torch.Tensor
    target: torch.Tensor
    target_weight: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    a: float = 0.7
    b: float = 3.1
    eps: float = 1e-12
    smoothing: float = 0.0
    square_scale: float = 0.03
    reduction: int = 1
    safe_mean: bool = False
    out_dtype: torch.dtype | None = None
    ignore_index: int = IGNORED


def make(rows, classes, dtype, targets=None, weighted=False, ignore=True, seed=0, **options) -> Problem:
    generator = torch.Generator().manual_seed(1000 * seed + 31 * rows + classes)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    logits = (2 * draw(rows, classes) + 1).to(dtype)
    shape = (rows,) if targets is None else (rows, targets)
    target = torch.randint(max(classes, 1), shape, generator=generator)
    if ignore and rows > 2:
        target[1] = IGNORED
        logits[1] = math.nan
        if targets and targets > 1:
            target[2, 0] = IGNORED
    problem = Problem(logits, target, **options)
    if weighted:
        problem.weight = (draw(classes).abs() + 0.1).to(dtype)
        problem.target_weight = (draw(*shape).abs() + 0.1).to(dtype)
        if targets and rows > 3:
            problem.target_weight[3, -1] = 0
    return on_device(problem)


def on_device(problem: Problem) -> Problem:
    moved = {
        field.name: value.to(DEVICE)
        for field in dataclasses.fields(problem)
        if isinstance(value := getattr(problem, field.name), torch.Tensor)
    }
    return dataclasses.replace(problem, **moved)


def forward(kind, problem):
    """(loss, z_term or None, statistics, normalizer) from the launcher."""
    p = problem
    common = (p.ignore_index, p.reduction, p.safe_mean, p.out_dtype)
    tensors = (p.logits, p.target, p.target_weight, p.weight)
    if kind == "cross_entropy":
        return cross_entropy.cross_entropy(*tensors, p.smoothing, p.square_scale, *common)
    number = reference.SPHERICAL_LOSSES.index(kind)
    loss, statistics, normalizer = spherical_loss.spherical_loss(
        *tensors, number, p.a, p.b, p.eps, p.smoothing, *common
    )
    return loss, None, statistics, normalizer


def backward(kind, problem, grad_loss, statistics, normalizer, in_place=False):
    p = problem
    suffix = "backward_" if in_place else "backward"
    if kind == "cross_entropy":
        launcher = getattr(cross_entropy, f"cross_entropy_{suffix}")
        return launcher(grad_loss, p.logits, p.target, p.weight, statistics, normalizer)
    launcher = getattr(spherical_loss, f"spherical_loss_{suffix}")
    number = reference.SPHERICAL_LOSSES.index(kind)
    return launcher(grad_loss, p.logits, p.target, statistics, normalizer, number, p.eps)


def expected(kind, problem, dtype, grad_loss):
    """(loss, z_term or None, grad_logits) of the reference on the same rounded inputs, computed in `dtype`."""
    p = problem
    logits = p.logits.detach().to(dtype, copy=True).requires_grad_()
    weights = [None if w is None else w.to(dtype) for w in (p.target_weight, p.weight)]
    common = {
        "label_smoothing": p.smoothing,
        "ignore_index": p.ignore_index,
        "reduction": reference.REDUCTIONS[p.reduction],
        "safe_mean": p.safe_mean,
    }
    z_term = None
    if kind == "cross_entropy":
        loss, z_term = reference.cross_entropy(logits, p.target, *weights, lse_square_scale=p.square_scale, **common)
        z_term = z_term.detach()
    else:
        loss = reference.spherical_loss(logits, p.target, *weights, loss=kind, a=p.a, b=p.b, eps=p.eps, **common)
    (grad,) = torch.autograd.grad(loss, logits, grad_loss.to(dtype).expand(loss.shape))
    return loss.detach(), z_term, grad


def assert_accurate(ours, plain, exact, dtype, what, size=0.0):
    """Error at most twice that of plain torch in the working precision, plus 4 units in the last place at the
    largest value; 1e-12 of it for float64. Same NaN and infinities. `size`: of the terms, where they cancel."""
    ours, plain, exact = ours.double(), plain.double(), exact.double()
    assert ours.shape == exact.shape, what
    finite = exact.isfinite()
    assert torch.equal(ours[~finite].nan_to_num(nan=7.0), exact[~finite].nan_to_num(nan=7.0)), what
    if not finite.any():
        return
    largest = max(exact[finite].abs().max().item(), size)
    error = (ours - exact)[finite].abs().max().item()
    if dtype == torch.float64:
        assert error <= 1e-12 * largest + 1e-300, f"{what}: error {error:.3e}, largest {largest:.3e}"
        return
    peer = (plain - exact)[finite].abs().nan_to_num(nan=0.0).max().item()
    ulp = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(max(largest, torch.finfo(dtype).tiny)))
    assert error <= 2 * peer + 4 * ulp, f"{what}: error {error:.3e}, peer {peer:.3e}, largest {largest:.3e}"


def assert_rounded_once(ours, exact, what):
    """A stricter rule for 16-bit gradients: every element is the exact one rounded, give or take float32 noise."""
    info = torch.finfo(ours.dtype)
    exact = exact.double()
    allowed = 0.51 * info.eps * exact.abs() + 32 * 2.0**-24 * exact.abs().max() + info.smallest_normal * info.eps
    worst = ((ours.double() - exact).abs() - allowed).max().item()
    assert worst <= 0, f"{what}: beyond one rounding by {worst:.3e}"


def assert_rows_close(ours, exact, tolerance, floor=0.0):
    """Each element up to `tolerance` times the largest of its row."""
    largest = exact.abs().amax(1, keepdim=True)
    assert ((ours.double() - exact).abs() <= tolerance * largest + floor).all()


def check(kind, problem, grad_loss=None):
    """Forward and backward against the reference; returns what the launchers gave."""
    dtype = problem.logits.dtype
    # 16-bit kernels work in float32, and that is what they are held to: torch in float32, rounded once.
    plain_dtype = dtype if dtype.itemsize >= 4 else torch.float32
    if grad_loss is None:
        grad_loss = torch.tensor(0.75, dtype=dtype, device=DEVICE)
        if problem.reduction == 0:
            grad_loss = torch.linspace(-1, 2, problem.logits.size(0), device=DEVICE).to(dtype)
    loss, z_term, statistics, normalizer = forward(kind, problem)
    grad = backward(kind, problem, grad_loss, statistics, normalizer)
    assert loss.dtype == (problem.out_dtype or dtype)
    assert statistics.dtype == normalizer.dtype == torch.float64
    assert grad.dtype == dtype
    exact = expected(kind, problem, torch.float64, grad_loss)
    plain = expected(kind, problem, plain_dtype, grad_loss)
    out = loss.dtype if loss.dtype.itemsize <= plain_dtype.itemsize else plain_dtype
    assert_accurate(loss, plain[0].to(out), exact[0], out, f"{kind} loss")
    # With two classes z is +-1 and its gradient 0: only the target gradient and what cancels it are left.
    cancelled = statistics[:, 5:].abs().max().item() if kind == "z" and problem.logits.size(1) <= 2 else 0.0
    assert_accurate(grad, plain[2].to(dtype), exact[2], dtype, f"{kind} gradient", cancelled)
    if z_term is not None:
        assert z_term.dtype == loss.dtype
        assert_accurate(z_term, plain[1].to(out), exact[1], out, f"{kind} z_term")
    if dtype.itemsize == 2 and (exact[2].abs() <= torch.finfo(dtype).max).all():
        assert_rounded_once(grad, exact[2], f"{kind} gradient")
    return loss, statistics, normalizer, grad


# -------------------------------------------------------------------------------------------------- values, shapes

# Tiles are 16 x 64, 4 x 256, 1 x 1024 and 1 x 4096: below, at and above each; two parts from 8193 columns.
SHAPES = (
    (5, 1), (3, 2), (33, 10), (16, 64), (17, 63), (3, 65), (9, 256), (3, 251), (2, 1024), (4, 1000), (2, 1025),
    (2, 4096), (3, 4099), (1, 8200), (2, 12301),
)  # fmt: skip
PLAIN = {}
SMOOTHED = {"smoothing": 0.15, "reduction": 2}
WEIGHTED = {"weighted": True, "reduction": 0, "targets": 1}
EVERYTHING = {"weighted": True, "targets": 3, "smoothing": 0.1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_values_over_shapes(kind, shape):
    """Each shape with each loss; dtypes and options take turns so that each meets each loss."""
    turn = SHAPES.index(shape) + KINDS.index(kind)
    options = (PLAIN, SMOOTHED, WEIGHTED, EVERYTHING)[turn % 4]
    check(kind, make(*shape, DTYPES[(turn // 4 + turn) % 4], **options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [PLAIN, SMOOTHED, WEIGHTED, EVERYTHING], ids=["plain", "smoothed", "weighted", "all"]
)
def test_values_over_options(kind, dtype, options):
    check(kind, make(6, 150, dtype, **options))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("z", torch.float64), ("taylor_softmax", torch.float32), ("cross_entropy", torch.float64)],
    ids=str,
)
def test_rows_cut_into_parts(kind, dtype):
    """Few rows, many columns, not a multiple of anything: parts, ragged ends and the merge."""
    problem = make(2, 40001, dtype, weighted=True, targets=2, smoothing=0.1, ignore=False)
    assert _common.plan_rows(problem.logits).parts == 5
    check(kind, problem)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_out_dtype(kind, out_dtype):
    for reduction in (0, 1):
        check(kind, make(4, 40, torch.float32, out_dtype=out_dtype, reduction=reduction))


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_reduce_over_many_programs(kind):
    check(kind, make(300, 6, torch.float32, weighted=True))


def test_no_regulariser_is_exactly_zero():
    for reduction in (0, 1, 2):
        _, z_term, statistics, _ = forward(
            "cross_entropy", make(5, 9, torch.float32, square_scale=0.0, reduction=reduction)
        )
        assert (z_term == 0).all()
        assert (statistics[:, cross_entropy.Z_SLOPE.value] == 0).all()
    check("cross_entropy", make(5, 9, torch.float32, square_scale=0.0))


# -------------------------------------------------------------------------------------------------------- layouts


def _layouts(logits):
    """The same values behind other strides and offsets."""
    rows, classes = logits.shape
    dtype, device = logits.dtype, logits.device

    def within(shape, index):
        storage = torch.full(shape, 77.0, dtype=dtype, device=device)
        view = storage[index]
        view.copy_(logits)
        return view

    yield "transposed", logits.t().contiguous().t()
    yield "padded rows", within((rows, classes + 9), (slice(None), slice(0, classes)))
    yield "odd offset", within((rows, classes + 16), (slice(None), slice(3, 3 + classes)))
    yield "every second row", within((2 * rows, classes), slice(None, None, 2))
    yield "every second column", within((rows, 2 * classes), (slice(None), slice(None, None, 2)))
    flat = torch.full((rows * classes + 1,), 77.0, dtype=dtype, device=device)
    flat[1:] = logits.reshape(-1)
    yield "unaligned storage", flat[1:].view(rows, classes)


@pytest.mark.parametrize(
    ("kind", "classes"),
    [*((kind, 61) for kind in KINDS), ("z", 1021), ("taylor_softmax", 4104), ("cross_entropy", 4104)],
)
def test_layouts_of_logits(kind, classes):
    """Gradients do not depend on the layout beyond rounding; forward and in-place backward take each of them."""
    problem = make(4, classes, torch.float32, smoothing=0.1, reduction=0)
    for name, logits in _layouts(problem.logits):
        view = dataclasses.replace(problem, logits=logits)
        _, statistics, normalizer, grad = check(kind, view)
        assert grad.is_contiguous(), name
        grad_loss = torch.linspace(-1, 2, 4, device=DEVICE)
        storage = torch.tensor([], dtype=logits.dtype, device=DEVICE).set_(logits.untyped_storage())
        outside = (storage == 77).sum()
        assert backward(kind, view, grad_loss, statistics, normalizer, in_place=True) is None
        assert torch.equal(logits, grad), name
        assert (storage == 77).sum() == outside, f"{name}: wrote outside the logits"


@pytest.mark.parametrize("kind", KINDS)
def test_expanded_logits(kind):
    row = torch.randn(1, 33, device=DEVICE)
    problem = Problem(row.expand(5, 33), torch.tensor([0, 32, 7, 7, IGNORED], device=DEVICE), reduction=0)
    check(kind, problem)


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_and_dtypes_of_targets(kind):
    problem = make(5, 12, torch.float32, targets=4, weighted=True)
    problem.target[3, -1] = 0
    loss, _, statistics, _ = forward(kind, problem)
    target = problem.target.t().contiguous().t()
    weight = problem.weight.repeat_interleave(3)[::3]
    target_weight = torch.stack([problem.target_weight, problem.target_weight], 2)[:, :, 1]
    for other in (problem.target.int(), target, target.int(), problem.target.repeat(1, 2)[:, 4:]):
        again = forward(kind, dataclasses.replace(problem, target=other, weight=weight, target_weight=target_weight))
        assert torch.equal(again[0], loss)
        assert torch.equal(again[2], statistics)


@triton.jit
def _store_skews(out, row_stride, lead, VECTOR: tl.constexpr, ROWS: tl.constexpr):
    row = tl.arange(0, ROWS)
    tl.store(out + row, _common.row_skew(row, row_stride, lead, True, VECTOR))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("row_stride", "offset"), [(4097, 0), (4097, 3), (4104, 5), (5000, 1), (4099, 7)])
def test_peeled_rows_start_at_16_bytes(dtype, row_stride, offset):
    """What the kernels promise to the compiler and no interpreter checks: a broken promise is a fault on a GPU."""
    rows = 16
    storage = torch.empty(rows * row_stride + 16, dtype=dtype, device=DEVICE)
    logits = storage[offset:].as_strided((rows, 4096), (row_stride, 1), offset)
    plan = _common.plan_rows(logits)
    skews = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    if plan.peel:
        _store_skews[(1,)](skews, row_stride, plan.lead, VECTOR=plan.vector, ROWS=rows)
    for row, skew in enumerate(skews.tolist()):
        assert 0 <= skew < plan.vector
        assert (logits[row].data_ptr() - skew * dtype.itemsize) % 16 == 0


@pytest.mark.parametrize("parts", [1, 2])
def test_sum_over_many_finishing_programs(parts):
    blocks = 2 * _common.REDUCE_LANES + 5
    block_sums = torch.rand(2 * parts, blocks, dtype=torch.float64, device=DEVICE)
    loss, z_term = torch.empty((), device=DEVICE), torch.empty((), device=DEVICE)
    normalizer = torch.empty(parts, dtype=torch.float64, device=DEVICE)
    outputs = _common.Outputs(loss, z_term if parts == 2 else None, loss, normalizer, block_sums)
    _common.finish_reduction(outputs, reduction=1, safe_mean=False)
    totals = block_sums.sum(1)
    torch.testing.assert_close(normalizer, totals[1::2])
    torch.testing.assert_close(loss, (totals[::2] / totals[1::2]).sum().float())
    if parts == 2:
        torch.testing.assert_close(z_term, (totals[2] / totals[3]).float())


def test_rows_beyond_2_31_elements():
    """Row offsets need 64 bits. The pages in between are never touched, so this costs address space only."""
    distance = 2**31 + 16
    storage = torch.empty(distance + 64, dtype=torch.bfloat16, device=DEVICE)
    logits = storage.as_strided((2, 24), (distance, 1))
    logits.copy_(torch.randn(2, 24))
    for kind in ("z", "cross_entropy"):
        check(kind, Problem(logits, torch.tensor([3, 20], device=DEVICE)))


def test_plan_of_the_largest_row():
    """2^31 - 1 classes: sizes fit, parts cover the row, and one finishing program holds all parts."""
    plan = _common.plan_rows(torch.empty(3, 2**31 - 1, dtype=torch.bfloat16, device="meta"))
    assert plan.peel
    assert plan.parts * plan.part_columns >= 2**31 - 1 + plan.vector - 1
    assert (plan.parts - 1) * plan.part_columns < 2**31 - 1
    assert plan.parts <= plan.part_capacity


# ------------------------------------------------------------------------------------------------ targets, ignoring


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [7, 1030])
def test_ignored_rows_never_leak(kind, classes):
    """NaN and infinity in ignored rows; statistics and gradient are exact zeros there, whatever the mean is."""
    for target in ([IGNORED, 1, IGNORED, 0], [IGNORED] * 4):
        problem = make(4, classes, torch.float32, ignore=False, weighted=True)
        problem.target = torch.tensor(target, device=DEVICE)
        ignored = problem.target == IGNORED
        problem.logits[ignored] = torch.tensor([math.nan, math.inf, -math.inf, 0] * classes, device=DEVICE)[:classes]
        _, statistics, _, grad = check(kind, problem)
        assert (statistics[ignored] == 0).all()
        assert (grad[ignored] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_everything_ignored(kind):
    problem = make(3, 5, torch.float32, ignore=False)
    problem.target[:] = 2
    problem.ignore_index = 2
    for safe_mean in (False, True):
        problem.safe_mean = safe_mean
        loss, z_term, statistics, normalizer = forward(kind, problem)
        grad = backward(kind, problem, torch.ones((), device=DEVICE), statistics, normalizer)
        assert loss.isnan() if not safe_mean else loss == 0
        assert (normalizer == (1 if safe_mean else 0)).all()
        assert z_term is None or (z_term.isnan() if not safe_mean else z_term == 0)
        assert (grad == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize(
    ("rows", "classes", "targets"), [(0, 5, None), (0, 5, 2), (3, 5, 0), (3, 0, None), (0, 0, None)]
)
def test_empty(kind, reduction, rows, classes, targets):
    for safe_mean in (False, True) if reduction == 1 else (False,):
        problem = make(rows, classes, torch.float32, targets=targets, reduction=reduction, safe_mean=safe_mean)
        problem.target = torch.full_like(problem.target, IGNORED)
        loss, _, statistics, normalizer = forward(kind, problem)
        grad = backward(kind, problem, torch.ones((), device=DEVICE), statistics, normalizer)
        width = (4 if kind == "cross_entropy" else 5) + (1 if targets is None else targets)
        assert statistics.shape == (rows, width)
        assert grad.shape == (rows, classes)
        assert (grad == 0).all()
        assert (statistics == 0).all()
        if reduction == 1 and not safe_mean:
            assert loss.isnan()
        else:
            assert loss.shape == ((rows,) if reduction == 0 else ())
            assert (loss == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coinciding_targets_add_before_rounding(kind, dtype):
    problem = make(3, 600, dtype, targets=5, weighted=True, ignore=False)
    problem.target[:] = torch.tensor([3, 599, 3, 3, 599], device=DEVICE)
    check(kind, problem)


@pytest.mark.parametrize("kind", KINDS)
def test_class_of_weight_zero(kind):
    problem = make(4, 11, torch.float32, weighted=True, ignore=False, reduction=0)
    problem.weight[problem.target[0]] = 0
    if kind != "cross_entropy":
        problem.logits[0] = 0.5
    _, _, _, grad = check(kind, problem)
    assert torch.equal(grad[0] == 0, torch.ones_like(grad[0], dtype=torch.bool)) or kind == "cross_entropy"


@pytest.mark.parametrize("kind", KINDS)
def test_target_out_of_range(kind):
    """Whatever its weight. (On a GPU this is a device assertion, which ends the CUDA context.)"""
    if DEVICE != "cpu":
        pytest.skip("a device assertion ends the CUDA context")
    name = "cross_entropy" if kind == "cross_entropy" else f"{kind}_loss"
    for bad in (5, -1, 2**40):
        problem = make(3, 5, torch.float32, targets=2, ignore=False, weighted=True)
        problem.target[2, 1] = bad
        problem.target_weight[2, 1] = 0
        text = rf"pyops::{name}: target must be in \[0, 5\) or ignore_index -100, got {bad} at position \[2, 1\]"
        with pytest.raises(IndexError, match=text):
            forward(kind, problem)


@pytest.mark.parametrize("kind", KINDS)
def test_ignore_index_is_never_an_address(kind):
    problem = make(3, 70, torch.float32, targets=2, ignore=False, weighted=True, ignore_index=2**62)
    problem.target[0] = 2**62
    problem.target[1, 0] = 2**62
    check(kind, problem)


# ------------------------------------------------------------------------------------------------ upstream gradient


@pytest.mark.parametrize("kind", KINDS)
def test_upstream_gradients(kind):
    rows = 4
    for grad_loss in (
        torch.tensor(-1.5, dtype=torch.float64),
        torch.tensor(2.0, dtype=torch.bfloat16),
        torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=torch.float16),
        torch.tensor(0.25).expand(rows),
        torch.arange(8.0)[::2],
    ):
        problem = make(rows, 50, torch.float32, reduction=0 if grad_loss.dim() else 1, weighted=True)
        check(kind, problem, grad_loss.to(DEVICE))


@pytest.mark.parametrize("kind", KINDS)
def test_loss_scaling_by_2_16(kind):
    """As a gradient scaler does; the squared error overflows float16 then, as it must."""
    check(kind, make(4, 50, torch.float16, reduction=1), torch.tensor(65536.0, device=DEVICE))


# ---------------------------------------------------------------------------------------------- numerical extremes


@pytest.mark.parametrize(
    ("kind", "classes"), [*((kind, 50) for kind in KINDS), *((kind, 5000) for kind in KINDS), ("z", 20011)]
)
def test_common_offset(kind, classes):
    """q / D - mean^2 in float32 would be wrong by percents here. The exact values are those of the rounded logits."""
    for offset in (1000.0, -1e4):
        problem = make(2, classes, torch.float32, smoothing=0.1)
        problem.logits += offset
        check(kind, problem)


@pytest.mark.parametrize("classes", [50, 20011])
def test_outlier_where_the_pivot_is_taken(classes):
    problem = make(2, classes, torch.float32)
    problem.logits[:] = 0.3
    problem.logits[:, 1::7] = -0.2
    problem.logits[:, 0] = 1e4
    for kind in ("z", "mse_onehot"):
        check(kind, problem)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 5, 300, 5001, 20011])
def test_equal_logits_without_eps(dtype, classes):
    """sigma is exactly 0: loss softplus(a b) / a and an exactly zero gradient, not rounding noise."""
    problem = make(2, classes, dtype, eps=0.0, reduction=0)
    problem.logits[:] = torch.tensor([[1.1], [-3e5 / 7]], dtype=torch.float64).to(problem.logits)
    loss, _, statistics, normalizer = forward("z", problem)
    exact = math.log1p(math.exp(problem.a * problem.b)) / problem.a
    torch.testing.assert_close(loss, torch.full_like(loss, exact), rtol=torch.finfo(dtype).eps, atol=0)
    grad = backward("z", problem, torch.ones(2, device=DEVICE), statistics, normalizer)
    assert (grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e30, 1e-19, 3e37])
@pytest.mark.parametrize("classes", [40, 9000])
def test_squares_outside_float32(dtype, scale, classes):
    """The Z-loss does not depend on the scale of the logits, so neither may its range."""
    problem = make(4, classes, dtype, eps=0.0, reduction=0)
    ordinary = problem.logits[3].clone()
    problem.logits = (problem.logits.double() * scale).to(dtype)
    problem.logits[3] = ordinary  # shares a tile with the others when rows are short
    grad_loss = torch.ones(4, device=DEVICE)
    loss, _, statistics, normalizer = forward("z", problem)
    grad = backward("z", problem, grad_loss, statistics, normalizer)
    exact = expected("z", problem, torch.float64, grad_loss)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), exact[0], rtol=tolerance, atol=0)
    assert_rows_close(grad, exact[2], tolerance, floor=1e-40)  # subnormal bfloat16 has steps of 1e-40


@pytest.mark.parametrize("kind", ["taylor_softmax", "spherical_softmax"])
def test_smoothing_of_huge_logits(kind):
    """sum log n(o) where n(o) itself overflows float32."""
    problem = make(2, 90, torch.float32, smoothing=0.3, reduction=0)
    problem.logits *= 1e25
    loss = forward(kind, problem)[0]
    exact = expected(kind, problem, torch.float64, torch.ones(2, device=DEVICE))[0]
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_z_loss_far_from_its_knee(dtype):
    """a (b - z) of both signs up to 5000: overflow-safe, and accurate to the last digit where the loss is tiny."""
    for a, b in ((100.0, 50.0), (100.0, -50.0), (30.0, 0.0), (10.0, -6.0), (1e-3, 4.0)):
        problem = make(5, 30, dtype, a=a, b=b, reduction=0, ignore=False)
        logits = problem.logits.double().requires_grad_()
        z = (logits - logits.mean(1, keepdim=True)) / (logits.var(1, correction=0, keepdim=True) + 1e-12).sqrt()
        u = a * (b - z.gather(1, problem.target.unsqueeze(1)).squeeze(1))
        exact = torch.nn.functional.softplus(u, threshold=50) / a
        (exact_grad,) = torch.autograd.grad(exact.sum(), logits)
        loss, _, statistics, normalizer = forward("z", problem)
        grad = backward("z", problem, torch.ones(5, device=DEVICE), statistics, normalizer)
        noise = 1e-4 if dtype == torch.float32 else 1e-12  # float32 logits: an error of z times a
        assert_rows_close(loss.unsqueeze(1), exact.detach().unsqueeze(1), noise)
        assert_rows_close(grad, exact_grad, noise)


@pytest.mark.parametrize("classes", [9, 700, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_logits(classes, dtype):
    """-inf is a legal logit of cross-entropy: whole tiles of them, at either end, and where a target is."""
    problem = make(4, classes, dtype, ignore=False, reduction=0, square_scale=0.01)
    problem.logits[0, : classes - 1] = -math.inf
    problem.logits[1, 1:] = -math.inf
    problem.logits[2, ::2] = -math.inf
    problem.logits[3, classes // 2 :] = -math.inf
    problem.target = torch.tensor([classes - 1, 0, 1, classes - 1], device=DEVICE)  # the last one is masked
    loss, _, _, grad = check("cross_entropy", problem)
    assert loss[3] == math.inf
    assert (grad[2, ::2] == 0).all()


def test_a_row_of_minus_infinity():
    problem = make(2, 12, torch.float32, ignore=False, reduction=0)
    problem.logits[0] = -math.inf
    loss, _, statistics, normalizer = forward("cross_entropy", problem)
    grad = backward("cross_entropy", problem, torch.ones(2, device=DEVICE), statistics, normalizer)
    assert loss[0].isnan()
    assert loss[1].isfinite()
    assert grad[0].isnan().all()
    assert grad[1].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [20, 5000])
def test_nan_spreads_as_in_the_reference(kind, classes):
    """Over its row and no further; with the squared error over its own element only."""
    problem = make(3, classes, torch.float32, ignore=False, reduction=0)
    problem.logits[1, classes // 2] = math.nan
    loss, _, _, grad = check(kind, problem)
    assert torch.equal(loss.isnan(), torch.tensor([False, True, False], device=DEVICE))
    assert grad[1].isnan().sum() == (1 if kind == "mse_onehot" else classes)


# ------------------------------------------------------------------------------- statistics shared with other backends


def _statistics_by_the_book(kind, problem):
    """One row at a time, straight from spherical_loss_formula.h and cross_entropy_formula.h, in Python floats."""
    p, table = problem, []
    classes = p.logits.size(1)
    weight = [1.0] * classes if p.weight is None else p.weight.tolist()
    for row, targets in enumerate(p.target.tolist()):
        o = p.logits[row].tolist()
        own = [1.0] * len(targets) if p.target_weight is None else p.target_weight[row].tolist()
        pairs = [(c, t if c != p.ignore_index else 0.0) for c, t in zip(targets, own, strict=True)]
        if not any(t for _, t in pairs):
            table.append([0.0] * ((4 if kind == "cross_entropy" else 5) + len(targets)))
            continue
        omega = [t * weight[c] if t else 0.0 for c, t in pairs]
        chosen = [o[c] if t else 0.0 for c, t in pairs]
        keep = 1 - p.smoothing
        if kind == "cross_entropy":
            top = max(o)
            total = math.fsum(math.exp(x - top) for x in o)
            smooth = p.smoothing / classes * sum(t for _, t in pairs)
            slope = keep * sum(omega) + smooth * sum(weight)
            z_slope = 2 * p.square_scale * (top + math.log(total))
            table.append([top, slope / total, z_slope / total, smooth, *(-keep * w for w in omega)])
            continue
        mean = math.fsum(o) / classes
        m2 = math.fsum((x - mean) ** 2 for x in o)
        slope = shift = smooth = 0.0
        scale, gradients = 1.0, []
        for x, w in zip(chosen, omega, strict=True):
            if kind == "z":
                scale = 1 / math.sqrt(m2 / classes + p.eps)
                z = (x - mean) * scale
                rho = w * keep / (1 + math.exp(-p.a * (p.b - keep * z)))
                terms = (rho * z * scale / classes, rho * scale / classes, 0.0, -rho * scale)
            elif kind == "taylor_softmax":
                total = classes * (1 + mean + mean * mean / 2) + m2 / 2
                terms = (w / total, w / total, -w * p.smoothing / classes,
                         -w * keep * (1 + x) / (1 + x + x * x / 2))  # fmt: skip
            elif kind == "spherical_softmax":
                total = m2 + classes * (mean * mean + p.eps)
                terms = (2 * w / total, 0.0, -w * p.smoothing / classes,
                         -2 * w * keep * x / (x * x + p.eps))  # fmt: skip
            else:
                terms = (2 * w, -2 * w * p.smoothing / classes, 0.0, -2 * w * keep)
            slope, shift, smooth = slope + terms[0], shift + terms[1], smooth + terms[2]
            gradients.append(terms[3])
        table.append([mean if kind == "z" else 0.0, scale, slope, shift, smooth, *gradients])
    return torch.tensor(table, dtype=torch.float64, device=p.logits.device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [13, 9001])
def test_statistics_are_the_shared_layout(kind, classes):
    """Columns as in the headers, so that a forward here can be followed by a backward elsewhere, and the reverse."""
    problem = make(4, classes, torch.float64, targets=2, weighted=True, smoothing=0.1)
    problem.logits[1] = 0  # ignored
    book = _statistics_by_the_book(kind, problem)
    _, _, statistics, normalizer = forward(kind, problem)
    torch.testing.assert_close(statistics, book, rtol=1e-11, atol=1e-15)
    grad_loss = torch.ones((), dtype=torch.float64, device=DEVICE)
    grad = backward(kind, problem, grad_loss, book, normalizer)
    assert_accurate(grad, grad, expected(kind, problem, torch.float64, grad_loss)[2], torch.float64, kind)


def test_center_is_rounded_into_the_shift():
    """Float32 logits near 1000: the centre is a float32 number, off by up to 3e-5; slope times that is in the
    shift."""
    problem = make(3, 5000, torch.float32, ignore=False)
    problem.logits += 1000
    _, _, statistics, _ = forward("z", problem)
    assert torch.equal(statistics[:, 0], statistics[:, 0].float().double())
    book = _statistics_by_the_book("z", dataclasses.replace(problem, target=problem.target.unsqueeze(1)))
    lost = book[:, 0] - statistics[:, 0]
    assert lost.abs().max() > 1e-6
    torch.testing.assert_close(statistics[:, 1:3], book[:, 1:3], rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics[:, 3], book[:, 3] - book[:, 2] * lost * book[:, 1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["z", "cross_entropy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_class_has_an_exactly_zero_gradient(kind, dtype):
    problem = make(4, 1, dtype, ignore=False, smoothing=0.1, square_scale=0.0, reduction=0)
    _, _, statistics, normalizer = forward(kind, problem)
    assert (backward(kind, problem, torch.ones(4, device=DEVICE), statistics, normalizer) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_normalizer(kind):
    problem = make(5, 8, torch.float32, targets=2, weighted=True)
    counts = (problem.target != IGNORED) & (problem.target_weight != 0)
    weights = torch.where(counts, problem.weight.double()[torch.where(counts, problem.target, 0)], 0)
    total = (weights.sum(1) / counts.sum(1).clamp(min=1)).sum()
    live = counts.any(1).sum().double()
    for reduction, exact in ((0, 1.0), (1, total), (2, 1.0)):
        problem.reduction = reduction
        normalizer = forward(kind, problem)[3]
        if kind == "cross_entropy":
            rows = live if reduction == 1 else 1.0
            torch.testing.assert_close(normalizer, torch.tensor([exact, rows], dtype=torch.float64, device=DEVICE))
        else:
            assert normalizer.shape == ()
            torch.testing.assert_close(normalizer, torch.tensor(exact, dtype=torch.float64, device=DEVICE))


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_are_bitwise_equal(kind):
    problem = make(3, 9001, torch.float32, weighted=True, smoothing=0.1)
    first, second = forward(kind, problem), forward(kind, problem)
    for one, other in zip(first, second, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("kind", ["z", "cross_entropy"])
@pytest.mark.parametrize("classes", [31, 5000])
def test_gradient_sums_to_zero_over_a_row(kind, classes):
    """Softmax and the Z-loss do not see a common shift; the Z-loss not a common factor either."""
    problem = make(3, classes, torch.float64, ignore=False, eps=0.0, square_scale=0.0, reduction=2)
    *_, grad = check(kind, problem)
    assert grad.sum(1).abs().max() < 1e-14
    if kind == "z":
        assert (grad * problem.logits).sum(1).abs().max() < 1e-13


# -------------------------------------------------------------------------------------------------------- support


def test_reasons_against():
    problem = make(3, 5, torch.float32, ignore=False)
    tensors = (problem.logits, problem.target, None, None)
    rest = (1.0, 4.0, 1e-12, 0.0, IGNORED, 1, False, None)

    def reasons(*arguments):
        return spherical_loss.reasons_against("spherical_loss", *arguments)

    assert reasons(*tensors, 0, *rest) == []
    assert "loss" in reasons(*tensors, 4, *rest)[0]
    assert "int16" in reasons(problem.logits, problem.target.short(), None, None, 0, *rest)[0]
    assert "float8" in reasons(problem.logits.to(torch.float8_e5m2), problem.target, None, None, 0, *rest)[0]
    assert "out_dtype" in reasons(*tensors, 0, *rest[:-1], torch.int32)[0]
    assert "meta" in reasons(problem.logits.to("meta"), problem.target.to("meta"), None, None, 0, *rest)[0]
    arguments = (*tensors, 0.0, 0.0, IGNORED, 1, False, None)
    assert cross_entropy.reasons_against("cross_entropy", *arguments) == []


def test_reasons_against_writing_in_place():
    problem = make(3, 5, torch.float32, ignore=False)
    transposed, expanded = problem.logits.t().contiguous().t(), problem.logits[:1].expand(3, 5)
    for kind, module in (("cross_entropy", cross_entropy), ("spherical_loss", spherical_loss)):
        loss, _, statistics, normalizer = forward("z" if kind == "spherical_loss" else kind, problem)
        for logits, refused in ((problem.logits, False), (transposed, False), (expanded, True)):
            arguments = [loss, logits, problem.target, None, statistics, normalizer]
            if kind == "spherical_loss":
                arguments = [loss, logits, problem.target, statistics, normalizer, 0, 1e-12]
            assert module.reasons_against(f"{kind}_backward", *arguments) == []
            reasons = module.reasons_against(f"{kind}_backward_", *arguments)
            assert any("overlap" in reason for reason in reasons) == refused


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_arguments_are_named(kind):
    """The launchers check like the C++ fronts: a wrong shape must not become an address."""
    name = "cross_entropy" if kind == "cross_entropy" else f"{kind}_loss"
    problem = make(3, 5, torch.float32, ignore=False)
    wrong = dataclasses.replace(problem, weight=torch.ones(4, device=DEVICE))
    with pytest.raises(RuntimeError, match=rf"pyops::{name}: weight must have shape \[5\], got \[4\]"):
        forward(kind, wrong)
    _, _, statistics, normalizer = forward(kind, problem)
    with pytest.raises(RuntimeError, match=f"pyops::{name}_backward: statistics must have shape"):
        backward(kind, problem, torch.ones((), device=DEVICE), statistics[:2], normalizer)


def test_a_cpu_tensor_needs_the_interpreter(monkeypatch):
    problem = make(3, 5, torch.float32, ignore=False)
    monkeypatch.setattr(_common.INTERPRETED, "value", False)
    reasons = _common.common_reasons(problem.logits.cpu(), problem.target.cpu())
    assert "TRITON_INTERPRET" in reasons[0]


def test_every_tile_is_reached():
    for dtype in DTYPES:
        reached = {_common.plan_rows(torch.empty(2, c, dtype=dtype, device="meta")).tile for _, c in SHAPES}
        assert reached == set(_common.configs(dtype))
