"""Linear layer and cross-entropy on blocks of logits, against ``pyops.cross_entropy`` on all of them."""

from __future__ import annotations

import pytest
import torch
from spherical.test_linear_loss import CASES, assert_near, gradients, make, make_case
from ternary.samples import DTYPES
from torch import nn

import pyops
from pyops import linear_cross_entropy
from pyops.spherical import linear_loss_reference as formulas


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("scale", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_dense_layer(case, bias, scale, smoothing, monkeypatch):
    monkeypatch.setattr(formulas, "BLOCK_CLASSES", 32)
    h, weight, b, target, options, own = make_case(case, bias)
    options |= {"lse_square_scale": scale, "label_smoothing": smoothing, "return_z_loss": True}
    ours, z_ours = linear_cross_entropy(h, weight, target, bias=b, class_weight=own.get("weight"), **options)
    theirs, z_theirs = pyops.cross_entropy(nn.functional.linear(h, weight, b), target, **options, **own)
    assert_near(ours, theirs, 1e-11)
    assert_near(z_ours, z_theirs, 1e-11)
    assert not z_ours.requires_grad
    for mine, expected in zip(gradients(ours, h, weight, b), gradients(theirs, h, weight, b), strict=True):
        assert_near(mine, expected, 1e-11)


def test_log_sum_exp_is_differentiable():
    h, weight, bias, target = make(5, 3, 12, 1, True)
    target[1] = -100
    _, lse = linear_cross_entropy(h, weight, target, bias=bias, return_lse=True)
    expected = torch.logsumexp(nn.functional.linear(h, weight, bias), 1) * (target != -100)
    assert_near(lse, expected, 1e-12)
    for mine, theirs in zip(gradients(lse, h, weight, bias), gradients(expected, h, weight, bias), strict=True):
        assert_near(mine, theirs, 1e-11)

    def both(h, w, b):
        return linear_cross_entropy(h, w, target, bias=b, lse_square_scale=0.2, label_smoothing=0.1, return_lse=True)

    torch.autograd.gradcheck(both, (h, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_that_of_torch(dtype):
    h, weight, bias, target = make(64, 24, 500, 1, True, dtype)
    ours = linear_cross_entropy(h, weight, target, bias=bias)
    mine = [ours.detach(), *gradients(ours, h, weight, bias)]
    plain = nn.functional.cross_entropy(nn.functional.linear(h, weight, bias), target)
    honest = [plain.detach(), *gradients(plain, h, weight, bias)]
    wide = [t.detach().double().requires_grad_() for t in (h, weight, bias)]
    exact = nn.functional.cross_entropy(nn.functional.linear(*wide), target)
    truth = [exact.detach(), *gradients(exact, *wide)]
    for got, usual, true in zip(mine, honest, truth, strict=True):
        ulp = torch.finfo(got.dtype).eps * true.abs().max()
        assert (got.double() - true).abs().max() <= 2 * (usual.double() - true).abs().max() + ulp


def test_large_logits_do_not_overflow():
    h, weight, _, target = make(6, 4, 70, 1, False, torch.float32)
    with torch.no_grad():
        h.mul_(1e4)
    ours = linear_cross_entropy(h, weight, target)
    theirs = nn.functional.cross_entropy(h @ weight.T, target)
    torch.testing.assert_close(ours, theirs)
    for mine, expected in zip(gradients(ours, h, weight), gradients(theirs, h, weight), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


def test_ignored_rows_may_hold_anything():
    h, weight, _, target = make(6, 4, 30, 1, False)
    target[2] = -100
    plain = linear_cross_entropy(h, weight, target, lse_square_scale=0.1)
    spoilt = h.detach().clone()
    spoilt[2] = float("nan")
    spoilt.requires_grad_()
    loss = linear_cross_entropy(spoilt, weight, target, lse_square_scale=0.1)
    assert torch.equal(loss, plain)
    for mine, expected in zip(gradients(loss, spoilt, weight), gradients(plain, h, weight), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("safe_mean", [True, False])
def test_no_row_counts(safe_mean):
    h, weight, _, _ = make(6, 4, 30, 1, False)
    loss = linear_cross_entropy(h, weight, torch.full((6,), -100), safe_mean=safe_mean)
    assert (loss == 0) if safe_mean else loss.isnan()
    for gradient in gradients(loss, h, weight):
        assert (gradient == 0).all()


def test_derivatives_of_any_order_and_transforms():
    h, weight, bias, target = make(4, 3, 8, 1, True)
    target[1] = -100
    options = {"lse_square_scale": 0.2, "label_smoothing": 0.1}

    def ours(h, w, b, t):
        loss, lse = linear_cross_entropy(h, w, t, bias=b, return_lse=True, **options)
        return loss + lse.square().sum()

    def dense(h, w, b, t):
        logits = nn.functional.linear(h, w, b)
        return pyops.cross_entropy(logits, t, **options) + (torch.logsumexp(logits, 1) * (t != -100)).square().sum()

    torch.autograd.gradgradcheck(lambda *x: ours(*x, target), (h, weight, bias))
    tensors = tuple(t.detach() for t in (h, weight, bias))
    for transform in (
        lambda f: torch.func.grad(f, (0, 1, 2))(*tensors, target),
        lambda f: torch.func.jvp(lambda *x: f(*x, target), tensors, tensors),
        lambda f: torch.func.hessian(f, 1)(*tensors, target),
        lambda f: torch.vmap(f, (0, None, None, 0))(tensors[0][2:].unsqueeze(1), *tensors[1:], target[2:].unsqueeze(1)),
    ):
        torch.testing.assert_close(transform(ours), transform(dense), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"reduction": "avg"}, ValueError, "reduction must be one of"),
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing must be in"),
        ({"lse_square_scale": -1.0}, ValueError, "lse_square_scale must be at least 0"),
        ({"target": torch.tensor([0, 1, 2, 3, 4, 30])}, IndexError, r"target must be in \[0, 30\)"),
        ({"bias": torch.zeros(3)}, RuntimeError, r"bias must have shape \[30\], got \[3\]"),
    ],
)
def test_bad_calls(options, error, text):
    h, weight, _, target = make(6, 4, 30, 1, False)
    with pytest.raises(error, match=f"pyops::linear_cross_entropy: {text}"):
        linear_cross_entropy(**({"h": h, "weight": weight, "target": target} | options))
