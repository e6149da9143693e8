"""The factored output layer against dense SGD, and everything that a layer which steps by itself must not do."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle

import contract
import pytest
import torch
from torch import Tensor, nn

import pyops
from pyops import FormatError
from pyops.nn import FactoredSphericalLinear
from pyops.spherical import LRHook
from pyops.spherical import factored_reference as factored

LOSSES = {
    "z": pyops.z_loss,
    "taylor_softmax": pyops.taylor_softmax_loss,
    "spherical_softmax": pyops.spherical_softmax_loss,
    "mse_onehot": pyops.mse_onehot_loss,
}
RATES = {"z": 0.5, "taylor_softmax": 0.05, "spherical_softmax": 0.05, "mse_onehot": 1e-3}
STATE = ("V", "U", "U_inv", "omega", "wbar", "C")


@pytest.fixture(autouse=True, params=["default", "reference"])
def _backend(request):
    """All of this on the kernels and on the torch code."""
    with contract.running_on(request.param):
        yield


def make_layer(classes=50, features=6, seed=0, **options) -> FactoredSphericalLinear:
    torch.manual_seed(seed)
    return FactoredSphericalLinear(features, classes, **{"dtype": torch.float64, "lr": 0.3, **options})


def make_batch(rows=8, features=6, classes=50, seed=1) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, features, dtype=torch.float64, generator=random)
    return h, torch.randint(0, classes, (rows,), generator=random)


def state_of(layer: FactoredSphericalLinear) -> dict[str, Tensor]:
    return {name: getattr(layer, name).clone() for name in STATE}


def assert_same_state(layer: FactoredSphericalLinear, state: dict[str, Tensor]) -> None:
    for name, value in state.items():
        assert torch.equal(getattr(layer, name), value), name


def trained(layer: FactoredSphericalLinear, steps: int, first: int = 0) -> FactoredSphericalLinear:
    for step in range(first, first + steps):
        h, target = make_batch(features=layer.in_features, classes=layer.out_features, seed=step)
        layer(h.to(layer.V.dtype), target).backward()
    return layer


# ---- W is that of dense SGD ----------------------------------------------------------------------------------------

# classes, features, rows, targets per row, offset of W, the layer's options
CASES = {
    "usual": (500, 16, 8, 1, 0.0, {}),
    "offset": (300, 12, 10, 1, 1.0, {}),
    "several targets": (300, 12, 10, 4, 1.0, {}),
    "more rows than features": (200, 8, 40, 1, 0.0, {}),
    "one row": (100, 8, 1, 1, 0.0, {}),
    "more rows than classes": (20, 8, 40, 1, 0.0, {}),
    "bias and decay": (150, 10, 9, 1, 0.0, {"bias": True, "weight_decay": 0.05}),
    "bias of another scale": (150, 10, 9, 2, 0.0, {"bias": True, "bias_scale": 0.5, "reduction": "sum"}),
    "weights and ignored rows": (120, 10, 12, 3, 0.0, {"weight": True, "ignore_index": 3, "weight_decay": 0.01}),
    "rows apart": (120, 10, 12, 1, 0.0, {"reduction": "none"}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("loss", LOSSES)
def test_follows_dense_sgd(loss, case):
    """500 steps in float64: a wrong order of operations survives a tolerance of 1e-6, not one of 1e-12."""
    classes, features, rows, width, offset, options = CASES[case]
    random = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    rate = RATES[loss] * (0.05 if options.get("reduction") in ("sum", "none") else 1)
    options = dict(options)
    bias = options.pop("bias", False)
    scale = options.get("bias_scale", 1.0)
    if options.pop("weight", False):
        options["weight"] = torch.rand(classes, dtype=torch.float64, generator=random)
    dense = nn.Linear(features, classes, bias, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.add_(offset)
    layer = FactoredSphericalLinear.from_linear(dense, loss=loss, lr=rate, stabilize_every=20, **options)
    # A constant feature of value s has a weight of bias / s: SGD on that weight moves the bias s^2 as far.
    decay, own = options.get("weight_decay", 0.0), {"params": dense.parameters(), "lr": rate}
    groups = (
        [{"params": [dense.weight], "lr": rate}, {"params": [dense.bias], "lr": rate * scale**2}] if bias else [own]
    )
    optimizer = torch.optim.SGD(groups, weight_decay=decay)
    call = {key: options[key] for key in ("weight", "ignore_index", "reduction") if key in options}
    for _ in range(500):
        h = torch.randn(rows, features, dtype=torch.float64, generator=random).requires_grad_()
        # Few classes: duplicates, also within a row.
        shape = (rows, width) if width > 1 else (rows,)
        target = torch.randint(0, min(classes, 24), shape, generator=random)
        upstream = torch.rand(rows, dtype=torch.float64, generator=random)
        weights = torch.ones(rows) if options.get("reduction") != "none" else upstream
        ours = layer(h, target)
        (gradient,) = torch.autograd.grad((ours * weights).sum() if ours.dim() else ours, h)
        optimizer.zero_grad()
        theirs = LOSSES[loss](dense(h), target, **call)
        ((theirs * weights).sum() if theirs.dim() else theirs).backward()
        optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        assert (gradient - h.grad).abs().max() <= 1e-10 * h.grad.abs().max()
    W = layer.materialize()
    assert (W[:, :features] - dense.weight).abs().max() <= 1e-12 * dense.weight.abs().max()
    if bias:
        assert (W[:, features] - dense.bias).abs().max() <= 1e-12 * dense.bias.abs().max()
    wbar, C = factored.column_statistics(
        W if scale == 1 else layer.materialize() / W.new_tensor([1.0] * features + [scale]), torch.float64
    )
    assert (layer.C - C).abs().max() <= 1e-11 * C.abs().max()
    assert (layer.wbar - wbar).abs().max() <= 1e-11 * wbar.abs().max().clamp(min=1)
    assert torch.equal(layer.C, layer.C.T)
    assert layer.stats["steps"] == 500
    assert layer.stats["skipped_steps"] == 0


def ill_conditioned(steps: int, **options) -> tuple[float, float]:
    """Relative errors of W against float64 SGD: of the layer, and of dense float32 SGD. Inputs span four decades."""
    random = torch.Generator().manual_seed(1)
    start = 0.1 * torch.randn(1000, 32, generator=random)
    linear = nn.Linear(32, 1000, bias=False)
    linear.weight = nn.Parameter(start)
    layer = FactoredSphericalLinear.from_linear(linear, lr=2.0, **options)
    scales = torch.logspace(-4, 0, 32)
    dense = [start.double().requires_grad_(), start.clone().requires_grad_()]
    for _ in range(steps):
        h = torch.randn(16, 32, generator=random) * scales
        target = torch.randint(0, 1000, (16,), generator=random)
        layer(h, target).backward()
        for W in dense:
            (gradient,) = torch.autograd.grad(pyops.z_loss(h.to(W.dtype) @ W.T, target), W)
            W.data.sub_(gradient, alpha=2.0)
    exact = dense[0].detach()
    assert all(getattr(layer, name).isfinite().all() for name in STATE)
    return tuple(float((W.double() - exact).norm() / exact.norm()) for W in (layer.materialize(), dense[1].detach()))


def test_ill_conditioned_inputs():
    ours, dense = ill_conditioned(400)
    assert ours <= dense


def test_ill_conditioned_inputs_with_float32_state():
    """U and its inverse are added to, never multiplied anew: 36 times the error after 2,000 steps otherwise."""
    ours, dense = ill_conditioned(400, state_dtype=torch.float32)
    assert ours <= 2 * dense


@pytest.mark.slow
def test_ill_conditioned_inputs_for_10000_steps():
    ours, dense = ill_conditioned(10_000)
    assert ours <= dense


def test_only_rows_of_targets_move():
    layer = make_layer()
    before = layer.V.clone()
    layer(make_batch()[0], torch.tensor([3, 3, 7, 9, -100, 11, 3, 7])).backward()
    moved = (before != layer.V).any(1).nonzero().flatten().tolist()
    assert moved == [3, 7, 9, 11]


def test_shift_invariant_loss_never_moves_the_sum():
    layer = make_layer(49)  # 49 / 49 is not 1 in floating point: the sum of a row's gradients is not quite 0
    layer.wbar.zero_()  # where nothing is lost beside a larger number
    before = layer.wbar.clone()
    trained(layer, 20)
    assert torch.equal(layer.wbar, before)


# ---- steps that must not break the state ---------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_singular_step(decay):
    """One example, squared error, and the rate that annihilates its direction of W: legal in dense SGD."""
    h, target = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64), torch.tensor([4])
    rate = 1 / (2 * float(h.square().sum()) + decay)  # lr / (1 - lr decay) = 1 / (2 |h|^2)
    layer = make_layer(20, 3, loss="mse_onehot", lr=rate, weight_decay=decay)
    trained(layer, 3)
    dense = layer.materialize().requires_grad_()
    layer(h, target).backward()
    pyops.mse_onehot_loss(h @ dense.T, target).backward()
    expected = dense.detach() * (1 - rate * decay) - rate * dense.grad
    torch.testing.assert_close(layer.materialize(), expected, rtol=1e-12, atol=1e-12)
    assert layer.stats["singular_steps"] == 1
    wbar, C = factored.column_statistics(expected, torch.float64)
    torch.testing.assert_close(layer.C, C, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(layer.wbar, wbar, rtol=1e-11, atol=1e-12)
    trained(layer, 5)
    assert all(getattr(layer, name).isfinite().all() for name in STATE)


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["h", "upstream"])
def test_what_is_not_finite_leaves_the_state_alone(place, special):
    layer = trained(make_layer(), 3)
    before = state_of(layer)
    h, target = make_batch()
    h.requires_grad_()
    if place == "h":
        h.data[2, 1] = special
    layer(h, target).backward(torch.tensor(special if place == "upstream" else 1.0, dtype=torch.float64))
    assert_same_state(layer, before)
    assert layer.stats["skipped_steps"] == 1
    assert layer.stats["steps"] == 3
    assert not h.grad.isfinite().all()


def test_ignored_rows_may_hold_anything():
    layer, other = trained(make_layer(), 2), trained(make_layer(), 2)
    h, target = make_batch()
    target[3] = -100
    spoilt = h.clone()
    spoilt[3] = float("nan")
    spoilt.requires_grad_()
    ours, theirs = layer(spoilt, target), other(h, target)
    assert torch.equal(ours, theirs)
    ours.backward()
    theirs.backward()
    assert_same_state(layer, state_of(other))
    assert (spoilt.grad[3] == 0).all()
    assert spoilt.grad.isfinite().all()


@pytest.mark.parametrize("safe_mean", [True, False])
def test_no_row_counts(safe_mean):
    layer = trained(make_layer(safe_mean=safe_mean), 2)
    before = state_of(layer)
    loss = layer(make_batch()[0], torch.full((8,), -100))
    assert (loss == 0) if safe_mean else loss.isnan()
    loss.backward()
    assert_same_state(layer, before)


@pytest.mark.parametrize("rows", [0, 1])
def test_small_batches(rows):
    layer = trained(make_layer(reduction="sum"), 2)
    layer(*(t[:rows] for t in make_batch())).backward()
    assert all(getattr(layer, name).isfinite().all() for name in STATE)


# ---- upkeep ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outside", [0, 1, 3, 6])
def test_stabilizing_leaves_w(outside):
    """Some singular values of U move into V, or all of U does; the inverse is one afterwards."""
    layer = trained(make_layer(500, 9), 3)
    left, _ = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64))
    values = torch.linspace(0.6, 1.9, 9, dtype=torch.float64)
    values[:outside] = torch.tensor([1e-3, 40.0, 0.3, 5.0, 1e2, 0.1], dtype=torch.float64)[:outside]
    layer.U.copy_((left * values) @ right)
    layer.U_inv.copy_((right.T / values) @ left.T)
    layer.restat()
    W, statistics = layer.materialize(), (layer.C.clone(), layer.wbar.clone())
    layer.stabilize()
    assert (layer.materialize() - W).abs().max() <= 1e-12 * W.abs().max()
    assert torch.equal(layer.C, statistics[0])
    assert torch.equal(layer.wbar, statistics[1])
    torch.testing.assert_close(layer.U @ layer.U_inv, torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-12)
    kept = torch.linalg.svdvals(layer.U)
    assert kept.min() >= 0.5 - 1e-12
    assert kept.max() <= 2 + 1e-12
    assert layer.stats["unfactorizations"] == (outside > 3)


def test_decay_does_not_shrink_u_for_ever():
    layer = make_layer(lr=0.5, weight_decay=0.2, stabilize_every=10)
    layer._period = lambda rows: 10
    trained(layer, 200)
    assert 0.1 <= float(torch.linalg.norm(layer.U)) / layer.U.shape[0] ** 0.5 <= 10


# ---- autograd --------------------------------------------------------------------------------------------------------


def test_two_forwards_before_a_backward():
    layer = make_layer()
    first, second = layer(*make_batch(seed=1)), layer(*make_batch(seed=2))
    first.backward()
    before = state_of(layer)
    with pytest.raises(RuntimeError, match="state changed between forward and backward; two forwards"):
        second.backward()
    assert_same_state(layer, before)


def test_accumulated_batches_are_one_step():
    layer, other = trained(make_layer(reduction="sum"), 3), trained(make_layer(reduction="sum"), 3)
    batches = [make_batch(rows, seed=rows) for rows in (3, 8, 5)]
    gradients = []
    with layer.accumulate():
        losses = [layer(h.requires_grad_(), target) for h, target in batches]
        before = state_of(layer)
        for loss, (h, _) in zip(losses, batches, strict=True):
            loss.backward()
            gradients.append(h.grad)
        assert_same_state(layer, before)
    h = torch.cat([h.detach() for h, _ in batches]).requires_grad_()
    other(h, torch.cat([target for _, target in batches])).backward()
    torch.testing.assert_close(torch.cat(gradients), h.grad, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(layer.materialize(), other.materialize(), rtol=1e-12, atol=1e-13)
    assert layer.stats["steps"] == 4


def test_accumulation_of_different_numbers_of_targets():
    layer, other = make_layer(reduction="sum"), make_layer(reduction="sum")
    h, target = make_batch(6)
    pairs = torch.stack([target, target.flip(0)], 1)
    with layer.accumulate():
        layer(h[:3], target[:3]).backward()
        layer(h[3:], pairs[3:]).backward()
    both = pairs.clone()
    both[:3, 1] = -100
    other(h, both).backward()
    torch.testing.assert_close(layer.materialize(), other.materialize(), rtol=1e-12, atol=1e-13)


def test_an_exception_drops_what_was_accumulated():
    layer = make_layer()
    before = state_of(layer)
    with contextlib.suppress(KeyError), layer.accumulate():
        layer(*make_batch()).backward()
        raise KeyError
    assert_same_state(layer, before)
    with layer.accumulate(), pytest.raises(RuntimeError, match="must not be nested"), layer.accumulate():
        pass
    with layer.accumulate(max_rows=10):
        layer(*make_batch()).backward()
        with pytest.raises(RuntimeError, match="rows must be at most max_rows = 10"):
            layer(*make_batch()).backward()


def test_scaled_losses():
    """A loss scaled by 1024 has a gradient of h of that scale, and the layer's own step undoes it."""
    layer, other = trained(make_layer(), 2), trained(make_layer(), 2)
    h, target = make_batch()
    scaled, plain = h.clone().requires_grad_(), h.clone().requires_grad_()
    layer.set_grad_scale(1024.0)
    (layer(scaled, target) * 1024).backward()
    other(plain, target).backward()
    assert torch.equal(scaled.grad, plain.grad * 1024)
    assert_same_state(layer, state_of(other))


def test_evaluation_does_not_step():
    layer = trained(make_layer(), 2)
    before = state_of(layer)
    h, target = make_batch()
    with torch.no_grad():
        layer(h, target)
    layer.eval()
    h.requires_grad_()
    loss = layer(h, target)
    loss.backward()
    assert_same_state(layer, before)
    W = layer.materialize()
    wide = h.detach().clone().requires_grad_()
    pyops.z_loss(wide @ W.T, target).backward()
    torch.testing.assert_close(h.grad, wide.grad, rtol=1e-10, atol=1e-13)


def test_no_second_derivative():
    layer = make_layer()
    h, target = make_batch()
    h.requires_grad_()
    before = state_of(layer)
    with pytest.raises(NotImplementedError, match="no second derivative"):  # not zeros, as from once_differentiable
        torch.autograd.grad(layer(h, target), h, create_graph=True)
    assert_same_state(layer, before)


@pytest.mark.parametrize("loss", LOSSES)
def test_derivatives_of_any_order_in_evaluation(loss):
    layer = trained(make_layer(12, loss=loss, bias=True, weight=torch.rand(12, dtype=torch.float64) + 0.5), 3).eval()
    before = state_of(layer)
    h, target = make_batch(4, classes=12)
    W = layer.to_linear()
    torch.autograd.gradgradcheck(lambda x: layer(x, target), (h.clone().requires_grad_(),))

    def dense(x):
        return LOSSES[loss](W(x), target, weight=layer.weight)

    def ours(x):
        return layer(x, target)

    torch.testing.assert_close(torch.func.grad(ours)(h), torch.func.grad(dense)(h), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.func.jvp(ours, (h,), (h,)), torch.func.jvp(dense, (h,), (h,)))
    torch.testing.assert_close(torch.func.hessian(ours)(h), torch.func.hessian(dense)(h), rtol=1e-8, atol=1e-11)
    assert_same_state(layer, before)


def test_no_transforms():
    layer = make_layer()
    h, target = make_batch()
    with pytest.raises(NotImplementedError, match="transforms and forward-mode AD are not supported"):
        torch.func.grad(lambda x: layer(x, target))(h)


def test_compiled_model():
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(6, 6), nn.Tanh()).double()
    layer, other = make_layer(), make_layer()
    h, target = make_batch()

    def run(head, x):
        return head(trunk(x), target)

    compiled = torch.compile(run, backend="aot_eager")
    for _ in range(3):
        expected = run(other, h)
        expected.backward()
        loss = compiled(layer, h)
        loss.backward()
        assert torch.equal(loss, expected)
    assert_same_state(layer, state_of(other))


def test_autocast_and_narrow_inputs():
    layer, other = make_layer(dtype=torch.float32), make_layer(dtype=torch.float32)
    h, target = make_batch()
    narrow = h.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer(narrow, target)
    assert loss.dtype == torch.float32
    loss.backward()
    assert narrow.grad.dtype == torch.bfloat16
    other(narrow.detach().double(), target).backward()
    assert_same_state(layer, state_of(other))


# ---- inference, conversion -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_logits_and_best_classes(bias, monkeypatch):
    monkeypatch.setattr(factored, "BLOCK_ROWS", 16)
    layer = trained(make_layer(bias=bias), 30).eval()
    h, _ = make_batch()
    linear = layer.to_linear()
    assert isinstance(linear, nn.Linear)
    assert (linear.bias is not None) == bias
    expected = linear(h)
    torch.testing.assert_close(layer(h), expected, rtol=1e-11, atol=1e-12)
    assert torch.autograd.gradcheck(layer.logits, (h[:2].clone().requires_grad_(),))
    for k in (0, 1, 7, 20, 50):
        best = layer.topk(h, k)
        values, indices = expected.topk(k, 1)
        assert torch.equal(best.indices, indices)
        torch.testing.assert_close(best.values, values, rtol=1e-11, atol=1e-12)
    z = (expected - expected.mean(1, keepdim=True)) / expected.std(1, keepdim=True, correction=0)
    scores = layer.topk(h, 5, z_score=True)
    torch.testing.assert_close(scores.values, z.topk(5, 1).values, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_from_linear(dtype):
    linear = nn.Linear(6, 50, dtype=dtype)
    layer = FactoredSphericalLinear.from_linear(linear, bias_scale=0.25)
    assert layer.V.dtype == dtype
    assert torch.equal(layer.to_linear().weight, linear.weight)
    assert torch.equal(layer.to_linear().bias, linear.bias)
    assert not list(layer.parameters())


def test_initial_weights_are_those_of_a_linear_layer():
    layer = make_layer(4000, 16, bias=True, bias_scale=0.5)
    W = layer.materialize()
    assert W.abs().max() <= 0.25
    assert (W.std(0) - 0.25 / 3**0.5).abs().max() < 0.01
    assert layer.stats["steps"] == 0


def test_learning_rates_follow_a_schedule():
    trunk, layer = nn.Linear(6, 6).double(), make_layer()
    optimizer = torch.optim.Adam(trunk.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    hook = LRHook(optimizer, layer, scale=4.0)
    h, target = make_batch()
    seen = []
    for _ in range(3):
        layer(trunk(h), target).backward()
        optimizer.step()
        schedule.step()
        seen.append(float(layer.lr))
    assert seen == pytest.approx([0.4, 0.2, 0.1])
    hook.remove()
    layer(h, target)
    assert float(layer.lr) == pytest.approx(0.1)


# ---- saving ----------------------------------------------------------------------------------------------------------


def saved(layer: FactoredSphericalLinear) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


COPIES = {
    "state_dict": lambda layer: _loaded(make_layer(seed=5, bias=True), saved(layer)),
    "assigned": lambda layer: _loaded(make_layer(seed=5, bias=True), saved(layer), assign=True),
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
}


def _loaded(layer, state, **options):
    assert str(layer.load_state_dict(state, **options)) == "<All keys matched successfully>"
    return layer


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_trains_on_to_the_last_bit(way):
    layer = trained(make_layer(bias=True, lr=0.7), 60)
    other = COPIES[way](layer)
    trained(layer, 60, 60)
    trained(other, 60, 60)
    assert_same_state(other, state_of(layer))
    assert other.stats == layer.stats


def test_loading_into_another_precision():
    layer = trained(make_layer(), 20)
    other = _loaded(make_layer(dtype=torch.float32, state_dtype=torch.float32), saved(layer))
    assert other.U.dtype == torch.float32
    torch.testing.assert_close(other.materialize(torch.float64), layer.materialize(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("key", [*STATE, "lr", "counters"])
def test_a_changed_state_is_rejected(key):
    state = saved(trained(make_layer(), 5))
    state[key] = state[key] + 1
    layer = make_layer()
    before = state_of(layer)
    with pytest.raises(FormatError, match=f"{key} must have the checksum"):
        layer.load_state_dict(state)
    assert_same_state(layer, before)


def test_states_of_other_layers_are_rejected():
    with pytest.raises(FormatError, match="shape must be"):
        make_layer(51).load_state_dict(saved(make_layer()))
    with pytest.raises(RuntimeError, match="V_header"):
        make_layer().load_state_dict({key: value for key, value in saved(make_layer()).items() if key != "V_header"})


def test_moving_changes_no_dtype():
    layer = make_layer(dtype=torch.float32)
    before = {name: getattr(layer, name).dtype for name in (*STATE, "lr", "counters")}
    nn.Sequential(layer).half().to(torch.bfloat16).double()
    assert {name: getattr(layer, name).dtype for name in before} == before
    assert FactoredSphericalLinear(4, 9, device="meta").to_empty(device="cpu").V.shape == (9, 4)


# ---- bad calls -------------------------------------------------------------------------------------------------------

H, TARGET = make_batch()
BAD = {
    "loss": (lambda: make_layer(loss="softmax"), ValueError, "loss must be one of 'z'"),
    "irrelevant": (
        lambda: make_layer(loss="mse_onehot", a=1.0),
        ValueError,
        "a must not be given for loss='mse_onehot'",
    ),
    "a": (lambda: make_layer(a=0), ValueError, "a must be positive, got 0"),
    "smoothing": (
        lambda: make_layer(loss="taylor_softmax", label_smoothing=0.1),
        ValueError,
        "label_smoothing must be 0",
    ),
    "reduction": (lambda: make_layer(reduction="avg"), ValueError, "reduction must be one of"),
    "dtype": (lambda: make_layer(dtype=torch.float16), ValueError, "dtype must be float32 or float64, got float16"),
    "state_dtype": (
        lambda: make_layer(state_dtype=torch.bfloat16),
        ValueError,
        "state_dtype must be float32 or float64",
    ),
    "classes": (lambda: make_layer(0), ValueError, "out_features must be at least 1, got 0"),
    "weight": (lambda: make_layer(weight=torch.ones(3)), RuntimeError, r"weight must have shape \[50\], got \[3\]"),
    "lr": (lambda: make_layer(lr=-1.0), ValueError, "lr must be at least 0"),
    "decay": (lambda: make_layer(lr=2.0, weight_decay=0.5), ValueError, r"lr \* weight_decay must be below 1, got 1"),
    "no target": (lambda: make_layer()(H), ValueError, "target must be given in train"),
    "h": (lambda: make_layer()(H[:, :5], TARGET), RuntimeError, r"h must have shape \[rows, 6\], got \[8, 5\]"),
    "integers": (lambda: make_layer()(H.long(), TARGET), RuntimeError, "h must be floating, got int64"),
    "list": (lambda: make_layer()([1.0], TARGET), TypeError, "h must be a Tensor, got list"),
    "sparse": (lambda: make_layer()(H.to_sparse(), TARGET), RuntimeError, "h must be a strided tensor"),
    "device": (lambda: make_layer()(H.to("meta"), TARGET), RuntimeError, "h must be on cpu like the layer, got meta"),
    "float target": (lambda: make_layer()(H, TARGET.double()), RuntimeError, "target must be int64 or int32"),
    "target shape": (lambda: make_layer()(H, TARGET[:3]), RuntimeError, r"target must have shape \[8\]"),
    "target range": (lambda: make_layer()(H, TARGET + 50), IndexError, r"target must be in \[0, 50\)"),
    "target weight": (
        lambda: make_layer()(H, TARGET, TARGET[:2].double()),
        RuntimeError,
        "target_weight must have the shape",
    ),
    "k": (lambda: make_layer().topk(H, 51), ValueError, r"k must be an int in \[0, 50\], got 51"),
    "linear": (
        lambda: FactoredSphericalLinear.from_linear(nn.Conv1d(1, 1, 1)),
        TypeError,
        "linear must be a torch.nn.Linear",
    ),
    "scale": (lambda: make_layer().set_grad_scale(0.0), ValueError, "scale must be positive"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls(name):
    call, error, text = BAD[name]
    with pytest.raises(error, match=f"pyops::FactoredSphericalLinear: {text}"):
        call()
