"""Linear layer and spherical loss without logits, against the same loss on the logits of a dense layer."""

from __future__ import annotations

import contextlib

import pytest
import torch
from ternary.samples import DTYPES
from torch import Tensor, nn

import pyops
from pyops import GramCache, spherical_linear_loss
from pyops.spherical import linear_loss_reference as formulas

LOSSES = {
    "z": pyops.z_loss,
    "taylor_softmax": pyops.taylor_softmax_loss,
    "spherical_softmax": pyops.spherical_softmax_loss,
    "mse_onehot": pyops.mse_onehot_loss,
}
METHODS = ("gram", "tiles")

# rows, features, classes, targets per row, the loss's options
CASES = {
    "usual": (16, 8, 90, 1, {}),
    "few rows": (3, 24, 90, 1, {}),
    "one class more than a block": (7, 5, 33, 2, {"reduction": "sum"}),
    "several targets": (12, 6, 40, 4, {"reduction": "none"}),
    "fewer classes than rows": (20, 6, 9, 1, {"ignore_index": 4}),
    "fewer classes than features": (20, 16, 5, 2, {}),
    "one row, one feature": (1, 1, 30, 1, {}),
    "options": (12, 6, 40, 3, {"weighted": True, "ignore_index": 4}),
}


def make(rows, features, classes, width, bias, dtype=torch.float64, seed=0, offset=0.0):
    random = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(rows, features, dtype=torch.float64, generator=random),
        torch.randn(classes, features, dtype=torch.float64, generator=random) + offset,
        torch.randn(classes, dtype=torch.float64, generator=random) if bias else None,
    ]
    target = torch.randint(0, classes, (rows, width) if width > 1 else (rows,), generator=random)
    return *(None if t is None else t.to(dtype).requires_grad_() for t in tensors), target


def make_case(case: str, bias: bool):
    """(h, weight, bias, target, options of ours and of the loss on logits, class weights as the latter takes them)"""
    rows, features, classes, width, options = CASES[case]
    h, weight, b, target = make(rows, features, classes, width, bias)
    options, own = dict(options), {}
    if options.pop("weighted", False):
        options["target_weight"] = torch.rand(target.shape, dtype=torch.float64)
        options["target_weight"][0] = 0
        own["weight"] = torch.rand(classes, dtype=torch.float64)
    return h, weight, b, target, options, own


def gradients(loss: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    upstream = torch.linspace(0.5, 2, max(loss.numel(), 1), dtype=loss.dtype)[: loss.numel()].reshape(loss.shape)
    return list(torch.autograd.grad(loss, [t for t in tensors if t is not None], upstream))


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_the_dense_layer(loss, case, method, bias, monkeypatch):
    monkeypatch.setattr(formulas, "BLOCK_CLASSES", 32)
    h, weight, b, target, options, own = make_case(case, bias)
    ours = spherical_linear_loss(
        h, weight, target, loss=loss, bias=b, method=method, class_weight=own.get("weight"), **options
    )
    theirs = LOSSES[loss](nn.functional.linear(h, weight, b), target, **options, **own)
    assert_near(ours, theirs, 1e-11)
    for mine, expected in zip(gradients(ours, h, weight, b), gradients(theirs, h, weight, b), strict=True):
        assert_near(mine, expected, 1e-11)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss, method):
    h, weight, bias, target = make(5, 3, 12, 2, True)
    torch.autograd.gradcheck(
        lambda h, w, b: spherical_linear_loss(h, w, target, loss=loss, bias=b, method=method), (h, weight, bias)
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_that_of_torch(dtype, method):
    """Against float64 on the same numbers: the honest code of the dtype forms logits and runs its loss on them."""
    h, weight, bias, target = make(64, 24, 500, 1, True, dtype)
    ours = spherical_linear_loss(h, weight, target, bias=bias, method=method)
    mine = [ours.detach(), *gradients(ours, h, weight, bias)]
    plain = pyops.z_loss(nn.functional.linear(h, weight, bias), target)
    honest = [plain.detach(), *gradients(plain, h, weight, bias)]
    wide = [t.detach().double().requires_grad_() for t in (h, weight, bias)]
    exact = pyops.z_loss(nn.functional.linear(*wide), target)
    truth = [exact.detach(), *gradients(exact, *wide)]
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for got, usual, true in zip(mine, honest, truth, strict=True):
        ulp = torch.finfo(got.dtype).eps * true.abs().max()
        assert (got.double() - true).abs().max() <= 2 * (usual.double() - true).abs().max() + ulp


@pytest.mark.parametrize("method", METHODS)
def test_an_offset_of_the_logits_costs_nothing(method):
    """Columns of W with a mean of 1000 times their spread: float32 squares minus the squared mean would be noise."""
    h, weight, _, target = make(32, 8, 400, 1, False, torch.float32, offset=1000.0)
    ours = spherical_linear_loss(h, weight, target, method=method)
    exact = pyops.z_loss(h.double() @ weight.double().T, target)
    plain = pyops.z_loss(h @ weight.T, target)
    assert (ours - exact).abs() <= 2 * (plain - exact).abs() + 1e-6 * exact


def test_statistics_of_columns_with_a_large_mean():
    """Of float32 weights around 1e6, whose mean is not a float32 number."""
    weight = (torch.randn(3000, 4, generator=torch.Generator().manual_seed(0)) * 5 + 1e6).float()
    wbar, C = formulas.statistics(weight, None)
    exact = weight.double()
    centred = exact - exact.mean(0)
    torch.testing.assert_close(wbar, exact.sum(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(C, centred.T @ centred, rtol=0, atol=2e-6 * 25 * 3000)


@pytest.mark.parametrize("bias", [False, True])
def test_adam_trains_alike(bias):
    """Any optimizer: 50 steps of Adam on a dense layer and on ours, with four micro-batches per step in a cache."""
    torch.manual_seed(0)
    dense = nn.Linear(8, 70, bias, dtype=torch.float64)
    ours = pyops.nn.SphericalLinearLoss(8, 70, bias, dtype=torch.float64, b=2.0)
    ours.load_state_dict(dense.state_dict())
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in (dense, ours)]
    for step in range(50):
        for optimizer in optimizers:
            optimizer.zero_grad()
        with GramCache(ours.weight, ours.bias) as gram:
            for part in range(4):
                h, _, _, target = make(6 + part, 8, 70, 1, False, seed=4 * step + part)
                wide = h.detach().clone().requires_grad_()
                ours(h, target, gram=gram).backward()
                pyops.z_loss(dense(wide), target, b=2.0).backward()
                assert_near(h.grad, wide.grad, 1e-9)
            assert ours.weight.grad is None
        for optimizer in optimizers:
            optimizer.step()
    for mine, theirs in zip(ours.parameters(), dense.parameters(), strict=True):
        assert_near(mine.detach(), theirs.detach(), 1e-9)


def test_a_cache_adds_to_the_gradient():
    h, weight, _, target = make(6, 4, 30, 1, False)
    spherical_linear_loss(h, weight, target).backward()
    once = weight.grad.clone()
    with GramCache(weight) as gram:
        spherical_linear_loss(h, weight, target, gram=gram).backward()
    torch.testing.assert_close(weight.grad, 2 * once)


def test_misuse_of_a_cache():
    h, weight, _, target = make(6, 4, 30, 1, False)
    gram = GramCache(weight)
    with pytest.raises(RuntimeError, match="inside its `with` block"):
        spherical_linear_loss(h, weight, target, gram=gram)
    with gram, pytest.raises(RuntimeError, match="must not be nested"), gram:
        pass
    gram = GramCache(weight)
    with pytest.raises(RuntimeError, match="weight must not change inside"), gram:  # noqa: PT012
        spherical_linear_loss(h, weight, target, gram=gram)
        with torch.no_grad():
            weight.add_(1)
        spherical_linear_loss(h, weight, target, gram=gram)
    with gram, pytest.raises(RuntimeError, match="gram must be that of weight and bias"):
        spherical_linear_loss(h, weight.detach(), target, gram=gram)
    with contextlib.suppress(KeyError), gram:
        spherical_linear_loss(h, weight, target, gram=gram).backward()
        raise KeyError
    assert weight.grad is None
    with pytest.raises(RuntimeError, match="weight must be a leaf"):
        GramCache(weight * 2)


@pytest.mark.parametrize("method", METHODS)
def test_ignored_rows_may_hold_anything(method):
    h, weight, _, target = make(6, 4, 30, 1, False)
    target[2] = -100
    plain = spherical_linear_loss(h, weight, target, method=method)
    spoilt = h.detach().clone()
    spoilt[2] = float("nan")
    spoilt.requires_grad_()
    loss = spherical_linear_loss(spoilt, weight, target, method=method)
    assert torch.equal(loss, plain)
    for mine, expected in zip(gradients(loss, spoilt, weight), gradients(plain, h, weight), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("safe_mean", [True, False])
def test_no_row_counts(safe_mean, method):
    h, weight, _, _ = make(6, 4, 30, 1, False)
    loss = spherical_linear_loss(h, weight, torch.full((6,), -100), method=method, safe_mean=safe_mean)
    assert (loss == 0) if safe_mean else loss.isnan()
    for gradient in gradients(loss, h, weight):
        assert (gradient == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_no_rows(method):
    h, weight, _, _ = make(0, 4, 30, 1, False)
    loss = spherical_linear_loss(h, weight, torch.zeros(0, dtype=torch.int64), reduction="sum", method=method)
    assert loss == 0
    assert (gradients(loss, weight)[0] == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_shows(method):
    """A NaN in one row: that row's loss and input gradient, and the weight's gradient, no other row."""
    h, weight, _, target = make(6, 4, 30, 1, False)
    h.data[1, 2] = float("nan")
    loss = spherical_linear_loss(h, weight, target, reduction="none", method=method)
    assert loss.isnan().tolist() == [False, True, False, False, False, False]
    dh, dw = gradients(loss, h, weight)
    assert dh.isnan().any(1).tolist() == [False, True, False, False, False, False]
    assert dw.isnan().any()


def test_strides_and_autocast():
    h, weight, _, target = make(6, 4, 30, 1, False)
    strided = weight.detach().T.contiguous().T.requires_grad_()
    assert torch.equal(spherical_linear_loss(h, strided, target), spherical_linear_loss(h, weight, target))
    with torch.autocast("cpu", torch.bfloat16):
        loss = spherical_linear_loss(h.bfloat16(), weight.float(), target)
    assert loss.dtype == torch.float32
    loss.backward()
    assert weight.grad.dtype == torch.float64


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loss", LOSSES)
def test_second_derivatives(loss, method):
    h, weight, bias, target = make(4, 3, 8, 2, True)
    torch.autograd.gradgradcheck(
        lambda h, w, b: spherical_linear_loss(h, w, target, loss=loss, bias=b, method=method), (h, weight, bias)
    )


def test_transforms():
    h, weight, bias, target = (t.detach() for t in make(4, 3, 8, 1, True))

    def ours(h, w, b, t):
        return spherical_linear_loss(h, w, t, bias=b)

    def dense(h, w, b, t):
        return pyops.z_loss(nn.functional.linear(h, w, b), t)

    for transform in (
        lambda f: torch.func.grad(f, (0, 1, 2))(h, weight, bias, target),
        lambda f: torch.func.jvp(lambda *x: f(*x, target), (h, weight, bias), (h, 2 * weight, bias)),
        lambda f: torch.func.hessian(f, 1)(h, weight, bias, target),
        lambda f: torch.vmap(f, (0, None, None, 0))(h.unsqueeze(1), weight, bias, target.unsqueeze(1)),
        lambda f: torch.vmap(torch.func.grad(f), (0, None, None, 0))(h.unsqueeze(1), weight, bias, target.unsqueeze(1)),
    ):
        torch.testing.assert_close(transform(ours), transform(dense), rtol=1e-9, atol=1e-12)


def test_a_cache_takes_no_part_in_second_derivatives():
    h, weight, _, target = make(6, 4, 30, 1, False)
    with GramCache(weight) as gram, pytest.raises(NotImplementedError, match="gram takes part in no second derivative"):
        torch.autograd.grad(spherical_linear_loss(h, weight, target, gram=gram), h, create_graph=True)


def test_a_backward_after_the_end_of_a_cache():
    h, weight, _, target = make(6, 4, 30, 1, False)
    with GramCache(weight) as gram:
        loss = spherical_linear_loss(h, weight, target, gram=gram)
    with pytest.raises(RuntimeError, match="backward must be inside the `with` block"):
        loss.backward()


def test_compiled_model():
    trunk = nn.Linear(4, 4).double()
    h, weight, bias, target = make(6, 4, 30, 1, True)

    def run(x):
        return spherical_linear_loss(trunk(x).tanh(), weight, target, bias=bias)

    expected = run(h)
    ours = torch.compile(run, backend="aot_eager")(h)
    assert torch.equal(ours, expected)
    for mine, theirs in zip(gradients(ours, h, weight, bias), gradients(expected, h, weight, bias), strict=True):
        assert torch.equal(mine, theirs)


H, WEIGHT, BIAS, TARGET = make(6, 4, 30, 1, True)
BAD = {
    "loss": ({"loss": "softmax"}, ValueError, "loss must be one of 'z'"),
    "irrelevant": ({"loss": "mse_onehot", "b": 1.0}, ValueError, "b must not be given for loss='mse_onehot'"),
    "smoothing": ({"loss": "spherical_softmax", "label_smoothing": 0.1}, ValueError, "label_smoothing must be 0"),
    "method": ({"method": "fast"}, ValueError, "method must be one of 'auto', 'gram', 'tiles'"),
    "gram": ({"gram": 3}, TypeError, "gram must be a GramCache or None, got int"),
    "h": ({"h": [1.0]}, TypeError, "h must be a Tensor, got list"),
    "h shape": ({"h": H[0]}, RuntimeError, r"h must have shape \[rows, features\], got \[4\]"),
    "weight": ({"weight": WEIGHT[:, :3]}, RuntimeError, r"weight must have shape \[classes, 4\], got \[30, 3\]"),
    "dtype": ({"weight": WEIGHT.float()}, RuntimeError, "weight must be float64 like h, got float32"),
    "integers": ({"h": H.long()}, RuntimeError, "h must be float32, float64, bfloat16 or float16, got int64"),
    "device": ({"weight": WEIGHT.to("meta")}, RuntimeError, "weight must be on cpu like h, got meta"),
    "bias": ({"bias": BIAS[:7]}, RuntimeError, r"bias must have shape \[30\], got \[7\]"),
    "target": ({"target": TARGET[:4]}, RuntimeError, r"target must have shape \[6\]"),
    "floats": ({"target": TARGET.double()}, RuntimeError, "target must be int64 or int32, got float64"),
    "range": ({"target": TARGET + 30}, IndexError, r"target must be in \[0, 30\) or ignore_index"),
    "target_weight": ({"target_weight": H}, RuntimeError, "target_weight must"),
    "class_weight": ({"class_weight": BIAS}, RuntimeError, "class_weight must not require grad"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls(name):
    options, error, text = BAD[name]
    arguments = {"h": H, "weight": WEIGHT, "target": TARGET, **options}
    with pytest.raises(error, match=f"pyops::spherical_linear_loss: {text}"):
        spherical_linear_loss(**arguments)
