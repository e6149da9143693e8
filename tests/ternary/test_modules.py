"""BitLinear and PackedBitLinear: their state, copies, layouts and threads. What they compute: the contract."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import random
import threading

import pytest
import safetensors.torch
import torch
from contract import assert_accurate, assert_same_bits, in_fresh_process, native, recorded_ops, running_on
from torch import nn
from torch.nn import functional

import pyops
from pyops.nn import BitLinear, PackedBitLinear
from pyops.ternary import _compute_layout, bitlinear, quantize_weight

N, K = 37, 45  # no multiple of any block
OPTIONS = {
    "plain": {},
    "median": {"measure": "absmedian"},
    "rows": {"granularity": "row"},
    "median of rows, 128": {"measure": "absmedian", "granularity": "row", "qmax": 128},
    "eps added": {"eps": 1e-2, "eps_mode": "add"},
    "layernorm": {"norm": "layernorm"},
    "rmsnorm": {"norm": "rmsnorm"},
    "scale": {"scale": 0.02},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
both_formats = pytest.mark.parametrize("fmt", ["t2", "t5"])
FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*(shape or (5, K)), generator=torch.Generator().manual_seed(1)).to(dtype)


def bit_layer(n: int = N, k: int = K, **options) -> BitLinear:
    torch.manual_seed(3)
    return BitLinear(k, n, **options).eval()


def packed_layer(fmt: str = "t2", **options) -> PackedBitLinear:
    return bit_layer(**options).pack(fmt)


def copied_state(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def assert_same_state(state: dict, expected: dict) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert_same_bits(tensor, expected[name], name)


# ---- BitLinear -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_stands_in_for_a_linear(bias):
    """Same constructor, same state, either way; the same initial weights for the same seed."""
    torch.manual_seed(0)
    linear = nn.Linear(K, N, bias, dtype=torch.bfloat16)
    torch.manual_seed(0)
    layer = BitLinear(K, N, bias, dtype=torch.bfloat16)
    assert_same_state(layer.state_dict(), linear.state_dict())
    layer.load_state_dict(nn.Linear(K, N, bias).state_dict())
    linear.load_state_dict(layer.state_dict())
    assert isinstance(layer, nn.Linear)


@every_option
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_calls_the_function(options, dtype):
    layer, x = bit_layer(dtype=dtype, **options), tokens(2, 3, K, dtype=dtype)
    given = dict(options)
    norm, scale = given.pop("norm", None), given.pop("scale", None)
    expected = {
        None: lambda: x,
        "layernorm": lambda: functional.layer_norm(x, (K,)),
        "rmsnorm": lambda: functional.rms_norm(x, (K,), eps=1e-5),
    }[norm]()
    given["weight_measure"] = given.pop("measure", "absmean")
    given["scale"] = None if scale is None else torch.tensor(scale)
    assert_same_bits(layer(x), bitlinear(expected, layer.weight, layer.bias, **given))


def test_options_that_training_changes():
    layer, x = bit_layer(act_bits=None), tokens()
    assert_same_bits(layer(x), bitlinear(x, layer.weight, layer.bias, act_bits=None))
    layer.lambda_ = 0.25
    assert_same_bits(layer(x), bitlinear(x, layer.weight, layer.bias, act_bits=None, lambda_=0.25))


def test_norm_of_its_own():
    norm = nn.LayerNorm(K)
    nn.init.normal_(norm.weight)
    layer, x = bit_layer(norm=norm), tokens()
    assert set(layer.state_dict()) == {"weight", "bias", "norm.weight", "norm.bias"}
    assert_same_bits(layer(x), bitlinear(norm(x), layer.weight, layer.bias))
    packed = layer.pack()
    assert_same_bits(packed(x), layer(x))
    assert packed.norm is not norm
    assert not packed.training
    assert not packed.norm.training
    assert layer.train().pack().training
    assert set(packed.state_dict()) >= {"norm.weight", "norm.bias"}


def test_from_linear_shares_parameters():
    linear = nn.Linear(K, N, dtype=torch.bfloat16).eval()
    layer = BitLinear.from_linear(linear, measure="absmedian", scale=0.5)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert (layer.measure, layer.training, layer.scale.item(), layer.scale.is_meta) == ("absmedian", False, 0.5, False)
    back = layer.to_linear()
    assert back.weight is linear.weight
    assert type(back) is nn.Linear
    assert BitLinear.from_linear(nn.Linear(K, N, bias=False)).bias is None


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_scales(granularity):
    """A number or tensor is a buffer, a Parameter learns; either stays float32."""
    shape = (N,) if granularity == "row" else ()
    layer = bit_layer(granularity=granularity, scale=0.03)
    assert layer.scale.shape == shape
    assert "scale" in layer.state_dict()
    layer.half()
    assert (layer.scale.dtype, layer.weight.dtype) == (torch.float32, torch.float16)
    learned = bit_layer(granularity=granularity, scale=nn.Parameter(torch.full(shape, 0.03)))
    assert "scale" in dict(learned.named_parameters())
    learned(tokens()).square().sum().backward()
    assert learned.scale.grad.abs().min() > 0
    learned.bfloat16()
    assert (learned.scale.dtype, learned.scale.grad.dtype) == (torch.float32, torch.float32)
    given = bit_layer(granularity=granularity, scale=0.03).bfloat16()
    x = tokens(dtype=torch.bfloat16)
    assert_same_bits(learned(x), given(x))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"measure": "mean"},
            ValueError,
            "pyops::BitLinear: measure must be one of 'absmean', 'absmedian', got 'mean'",
        ),
        ({"granularity": "group"}, ValueError, "pyops::BitLinear: granularity must be one of"),
        ({"qmax": 126}, ValueError, "pyops::BitLinear: qmax must be one of 127, 128, got 126"),
        ({"eps": 0.0}, ValueError, "pyops::BitLinear: eps must be positive, got 0"),
        ({"eps_mode": "max"}, ValueError, "pyops::BitLinear: eps_mode must be"),
        ({"act_bits": 4}, ValueError, "pyops::BitLinear: act_bits must be one of 8, None, got 4"),
        ({"lambda_": 1.5}, ValueError, "pyops::BitLinear: lambda_ must be in [0, 1], got 1.5"),
        ({"norm": "batchnorm"}, ValueError, "pyops::BitLinear: norm must be None, 'layernorm', 'rmsnorm' or a Module"),
        ({"norm": 3}, TypeError, "pyops::BitLinear: norm must be"),
        ({"scale": -1.0}, ValueError, "pyops::BitLinear: scale must be positive, got -1"),
    ],
    ids=str,
)
def test_bad_options(options, error, text):
    with pytest.raises(error) as raised:
        BitLinear(4, 3, **options)
    assert str(raised.value).startswith(text)


@pytest.mark.parametrize("measure", ["absmean", "absmedian"])
@pytest.mark.parametrize("options", [{}, {"granularity": "row", "qmax": 128}, {"norm": "rmsnorm"}], ids=str)
def test_two_layers_train(measure, options):
    """Classes that no linear map of the inputs tells apart: the loss falls to a fifth of a guess's."""
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    target = (x[:, 0] * x[:, 1] > 0).long()
    model = nn.Sequential(
        BitLinear(16, 128, measure=measure, **options), nn.ReLU(), BitLinear(128, 2, measure=measure, **options)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(150):
        loss = functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.5
    assert min(losses[-10:]) < 0.14, losses[::15]
    pyops.pack(model)
    assert functional.cross_entropy(model(x), target).item() < 0.2


@pytest.mark.row("R30")
@every_option
def test_copies_of_a_trainable_layer(options):
    layer, x = bit_layer(**options), tokens()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        assert_same_bits(other(x), layer(x))
        with torch.no_grad():
            other.weight.add_(1)
        assert not torch.equal(other(x), layer(x))


# ---- packing ---------------------------------------------------------------------------------------------------


@pytest.mark.row("R47")
@every_option
@both_formats
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_packed_equals_trained_to_the_last_bit(options, fmt, dtype, count_cases):
    sizes = list(itertools.product((1, 16, N), (1, 20, K, 256)))
    for n, k in sizes:
        layer = bit_layer(n, k, dtype=dtype, **options)
        packed = layer.pack(fmt)
        for shape in ((k,), (1, k), (2, 5, k), (0, k)):
            for size in (1, 1e-3):  # eps counts for small tokens
                x = tokens(*shape, dtype=dtype) * size
                assert_same_bits(packed(x), layer(x), f"{n} x {k}, {shape}, {size}")
    count_cases(len(sizes) * 8)


@both_formats
def test_packed_without_rounding_of_activations(fmt):
    layer, x = bit_layer(act_bits=None), tokens()
    ours = layer.pack(fmt)(x)
    ternary, gamma = quantize_weight(layer.weight)
    weight = ternary * gamma
    exact = functional.linear(x.double(), ternary.double() * gamma.double(), layer.bias.double()).detach()
    assert_accurate(ours, functional.linear(x, weight, layer.bias).detach(), exact)


@pytest.mark.row("R17")
def test_gradients_of_a_packed_layer_are_those_of_the_trained_one():
    layer = bit_layer()
    inputs = [tokens().requires_grad_() for _ in range(2)]
    for one, x in zip((layer, layer.pack()), inputs, strict=True):
        one(x).square().sum().backward()
    assert_same_bits(inputs[1].grad, inputs[0].grad)


@pytest.mark.row("R6")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@both_formats
def test_weights_that_are_not_finite_cannot_be_packed(value, fmt):
    layer = bit_layer()
    with torch.no_grad():
        layer.weight[4, 7] = value
    with pytest.raises(ValueError, match=rf"^pyops::pack: weight must be finite, got {value:g} at \[4, 7\]$"):
        layer.pack(fmt)


def test_what_cannot_be_packed():
    with pytest.raises(ValueError, match=r"^pyops::pack: lambda_ must be 1, got 0.5$"):
        bit_layer(lambda_=0.5).pack()
    with pytest.raises(ValueError, match=r"^pyops::pack: fmt must be one of t2, t5, got 't2x16'$"):
        bit_layer().pack("t2x16")
    with pytest.raises(ValueError, match=r"^pyops::pack: scale must be finite"):
        bit_layer(scale=torch.tensor(float("nan"))).pack()


def test_packing_shares_nothing():
    layer, x = bit_layer(), tokens()
    packed = layer.pack()
    before = packed(x)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    assert_same_bits(packed(x), before)


@every_option
@both_formats
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_unpacked_equals_packed_to_the_last_bit(options, fmt, dtype):
    packed, x = packed_layer(fmt, dtype=dtype, **options), tokens(dtype=dtype)
    layer = packed.unpack()
    assert type(layer) is BitLinear
    assert layer.weight.requires_grad
    assert layer.weight.dtype == dtype
    assert_same_bits(layer(x), packed(x))
    assert_same_bits(layer.pack(fmt)(x), packed(x))


def test_what_cannot_be_unpacked():
    groups = PackedBitLinear(512, 3, granularity="group")
    with pytest.raises(ValueError, match=r"^pyops::unpack: weight_gamma must have one element, or one per row"):
        groups.unpack()
    small = PackedBitLinear(8, 3)
    small.weight_gamma.fill_(1e-7)
    with pytest.raises(ValueError, match=r"^pyops::unpack: weight_gamma must be at least eps = 1e-05"):
        small.unpack()
    with pytest.raises(ValueError, match=r"^pyops::unpack: lowrank_A must not be there"):
        bit_layer().pack(lorc_rank=2).unpack()


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_dequantized_linear(granularity):
    gamma = torch.rand({"tensor": (), "row": (3,), "group": (3, 2)}[granularity]) + 0.5
    ternary = torch.randint(-1, 2, (3, 512), dtype=torch.int8)
    layer = PackedBitLinear.from_packed(
        pyops.ternary.pack(ternary, "t5"), gamma, torch.randn(3), fmt="t5", in_features=512, out_features=3
    )
    linear = layer.to_linear()
    wide = gamma.reshape(3, -1, 1) if granularity == "group" else gamma.reshape(-1, 1, 1)
    assert_same_bits(linear.weight.detach(), (ternary.reshape(3, 2, 256) * wide).reshape(3, 512))
    assert_same_bits(linear.bias.detach(), layer.bias)
    assert layer.granularity == granularity
    assert f"granularity={granularity}" in repr(layer)


@pytest.mark.row("R13")
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"packed": torch.full((3, 2), 0b11000000, dtype=torch.uint8)}, "weight_packed must hold the codes 0, 1 and 2"),
        (
            {"packed": torch.full((3, 2), 243, dtype=torch.uint8), "fmt": "t5"},
            "weight_packed must hold bytes below 243",
        ),
        ({"packed": torch.zeros(3, 3, dtype=torch.uint8)}, "weight_packed must have shape [3, 2], got [3, 3]"),
        ({"packed": torch.zeros(3, 2, dtype=torch.int8)}, "weight_packed must be torch.uint8"),
        ({"gamma": torch.tensor(0.0)}, "weight_gamma must be positive and finite, got 0"),
        ({"gamma": torch.tensor(-1.0)}, "weight_gamma must be positive and finite, got -1"),
        ({"gamma": torch.tensor(float("nan"))}, "weight_gamma must be positive and finite, got nan"),
        ({"gamma": torch.tensor(float("inf"))}, "weight_gamma must be positive and finite, got inf"),
        ({"gamma": torch.ones(4)}, "weight_gamma must have shape [3], got [4]"),
        ({"gamma": torch.ones((), dtype=torch.bfloat16)}, "weight_gamma must be torch.float32"),
        ({"bias": torch.zeros(2)}, "bias must have shape [3], got [2]"),
        ({"lowrank": (torch.zeros(3, 1), torch.zeros(1, 8))}, "lowrank_B must have shape [1, 7], got [1, 8]"),
    ],
    ids=str,
)
def test_malformed_packed_tensors(changes, text):
    given = {"packed": torch.zeros(3, 2, dtype=torch.uint8), "gamma": torch.tensor(1.0), "fmt": "t2"} | changes
    with pytest.raises(pyops.FormatError) as raised:
        PackedBitLinear.from_packed(**given, in_features=7, out_features=3)
    assert text in str(raised.value)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"fmt": "t2x16"}, ValueError),
        ({"fmt": 2}, TypeError),
        ({"granularity": "column"}, ValueError),
        ({"granularity": "group"}, ValueError),
        ({"qmax": 1}, ValueError),
        ({"eps": -1.0}, ValueError),
        ({"act": 8}, ValueError),
        ({"norm": "none"}, ValueError),
        ({"lorc_rank": 4}, ValueError),
        ({"lorc_rank": True}, TypeError),
    ],
    ids=str,
)
def test_bad_options_of_a_packed_layer(options, error):
    with pytest.raises(error, match=r"^pyops::PackedBitLinear: "):
        PackedBitLinear(4, 3, **options)


def test_a_new_packed_layer_gives_zeros():
    x = tokens()
    for fmt in ("t2", "t5"):
        layer = PackedBitLinear(K, N, fmt=fmt)
        assert_same_bits(layer(x), torch.zeros(5, N))


# ---- the layout for the processor ------------------------------------------------------------------------------


def repacks(layer: PackedBitLinear, x: torch.Tensor) -> int:
    """How often the layout was built in a call, whose result is right."""
    with recorded_ops() as counts:
        y = layer(x)
    ternary = pyops.ternary.unpack(layer.weight_packed, layer.fmt, layer.in_features)
    expected = pyops.ternary.linear_packed(
        x, ternary, layer.weight_gamma, layer.bias, fmt="int8", in_features=layer.in_features
    )
    assert_same_bits(y, expected)
    return counts["ternary_repack"]


@both_formats
def test_layout_is_built_once(fmt):
    layer, x = packed_layer(fmt), tokens()
    assert [repacks(layer, x) for _ in range(3)] == [1, 0, 0]
    with torch.inference_mode():
        assert repacks(layer, x) == 0
    layer.half().float()
    assert repacks(layer, x) == 1


def test_layout_is_built_anew_when_the_weights_change():
    layer, x = packed_layer(), tokens()
    other = bit_layer(measure="absmedian").pack()
    assert repacks(layer, x) == 1
    layer.weight_packed.copy_(other.weight_packed)
    assert [repacks(layer, x), repacks(layer, x)] == [1, 0]
    layer.weight_packed = packed_layer().weight_packed
    assert [repacks(layer, x), repacks(layer, x)] == [1, 0]
    for assign in (False, True):
        layer.load_state_dict(other.state_dict(), assign=assign)
        assert [repacks(layer, x), repacks(layer, x)] == [1, 0]
    layer.weight_packed.data = packed_layer().weight_packed
    assert [repacks(layer, x), repacks(layer, x)] == [1, 0]
    memory = bytearray(bytes(other.weight_packed.flatten().tolist()))  # another tensor at the address of the last
    layer.weight_packed = torch.frombuffer(memory, dtype=torch.uint8).reshape(N, -1)
    assert [repacks(layer, x), repacks(layer, x)] == [1, 0]
    memory[:] = bytes([0b01010101] * len(memory))
    layer.weight_packed = torch.frombuffer(memory, dtype=torch.uint8).reshape(N, -1)
    assert [repacks(layer, x), repacks(layer, x)] == [1, 0]
    swapped = other.state_dict()
    assert_same_bits(torch.func.functional_call(layer, swapped, (x,)), other(x))
    assert repacks(layer, x) == 1


def test_layout_first_built_in_inference_mode_serves_training():
    layer = packed_layer()
    with torch.inference_mode():
        expected = layer(tokens())
    x = tokens().requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert_same_bits(y.detach(), expected)
    assert x.grad.abs().sum() > 0


def test_layers_made_in_inference_mode():
    """Such tensors do not count writes; the packed layer's do, or it goes without a layout."""
    with torch.inference_mode():
        layer = packed_layer()
        assert not layer.weight_packed.is_inference()
        layer.weight_packed = layer.weight_packed.clone()
        assert layer.weight_packed.is_inference()
        assert [repacks(layer, tokens()) for _ in range(2)] == [0, 0]
        layer.weight_packed.fill_(0b01010101)
        assert_same_bits(layer(tokens()), layer.bias.expand(5, N))
        state = layer.state_dict()
    packed_layer().load_state_dict(state)


def test_layouts_for_processors():
    """t2x16, but t5x16 for t5 where it has instructions of its own; a lower cap goes back to t2x16."""
    detected = native().detected_isa()
    for fmt, cap in itertools.product(("t2", "t5"), (None, "avx2")):
        native().force_isa(cap)
        try:
            found = _compute_layout.compute_format(fmt, torch.device("cpu"))
        finally:
            native().force_isa(None)
        best = fmt == "t5" and cap is None and detected == "avx512vnni"
        assert found == ("t5x16" if best else "t2x16")
    assert _compute_layout.compute_format("t2", torch.device("meta")) == "t2"


@pytest.mark.routed
def test_backends_without_a_layout_read_the_stored_format():
    layer, x = packed_layer("t5"), tokens()
    expected = layer(x)
    with running_on("reference"):
        assert_same_bits(layer(x), expected)
        assert repacks(layer, x) == 0
        assert _compute_layout.compute_format("t5", torch.device("cpu")) == "t5"


def test_layouts_are_neither_saved_nor_copied():
    layer, x = packed_layer(), tokens()
    before = len(pickle.dumps(layer))
    layer(x)
    assert len(pickle.dumps(layer)) == before
    assert set(layer.state_dict()) == {"weight_packed", "weight_gamma", "bias", "weight_header"}
    twin = copy.deepcopy(layer)
    assert repacks(twin, x) == 1
    assert repacks(layer, x) == 0


@pytest.mark.row("R28")
@both_formats
def test_threads_share_a_layer(fmt):
    """Eight threads that start together on a fresh layer give the bits of one, and build the layout once."""
    torch.manual_seed(0)
    layer = BitLinear(256, 384).pack(fmt)
    inputs = [torch.randn(1 + number, 256) for number in range(8)]
    expected = [copy.deepcopy(layer)(x) for x in inputs]
    built = []
    repack = _compute_layout.repack

    def counting(*arguments):
        built.append(threading.get_ident())
        return repack(*arguments)

    barrier, wrong = threading.Barrier(8), []

    def work(number: int) -> None:
        barrier.wait()
        for _ in range(50):
            if not torch.equal(layer(inputs[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_compute_layout, "repack", counting)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert len(built) == 1


# ---- copies and dtypes -----------------------------------------------------------------------------------------


@pytest.mark.row("R30")
@every_option
@both_formats
def test_copies_of_a_packed_layer(options, fmt):
    layer, x = packed_layer(fmt, **options), tokens()
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        assert_same_bits(other(x), expected)
        other.weight_packed.zero_()
        assert not torch.equal(other(x), expected)
    assert_same_bits(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_gamma_stays_float32(dtype, bias):
    layer = packed_layer(bias=bias)
    gamma, expected = layer.weight_gamma.clone(), layer(tokens())
    assert layer.to(dtype) is layer
    assert_same_bits(layer.weight_gamma, gamma)
    assert layer.weight_packed.dtype == torch.uint8
    assert layer.dtype == dtype
    assert layer.to_linear().weight.dtype == dtype
    assert layer(tokens(dtype=dtype)).dtype == dtype
    if not bias:
        assert_same_bits(layer(tokens()), expected)
    assert layer.double().weight_gamma.dtype == torch.float32


def test_meta_device_and_back():
    layer, x = packed_layer(), tokens()
    empty = PackedBitLinear(K, N, device="meta")
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    assert empty(x.to("meta")).shape == (5, N)
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert_same_bits(empty(x), layer(x))
    filled = PackedBitLinear(K, N, device="meta").to_empty(device="cpu")
    filled.load_state_dict(layer.state_dict())
    assert_same_bits(filled(x), layer(x))
    assert bit_layer().to("meta").pack()(x.to("meta")).shape == (5, N)


# ---- state -----------------------------------------------------------------------------------------------------


@every_option
@both_formats
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_state_round_trips(options, fmt, dtype, tmp_path):
    """By memory, by torch.load that runs no code, by safetensors; copied or assigned."""
    layer, x = packed_layer(fmt, dtype=dtype, **options), tokens(dtype=dtype)
    state = layer.state_dict()
    torch.save(state, tmp_path / "state.pt")
    safetensors.torch.save_file(state, tmp_path / "state.safetensors")
    states = (
        state,
        torch.load(tmp_path / "state.pt", weights_only=True),
        safetensors.torch.load_file(tmp_path / "state.safetensors"),
    )
    like = {"fmt": fmt, "granularity": options.get("granularity", "tensor"), "dtype": dtype}
    like |= {name: options[name] for name in ("qmax", "eps", "norm") if name in options}
    for read, assign in itertools.product(states, (False, True)):
        other = PackedBitLinear(K, N, **like)
        assert not torch.equal(other(x), layer(x))
        assert str(other.load_state_dict(read, assign=assign)) == "<All keys matched successfully>"
        assert_same_bits(other(x), layer(x))
        assert_same_state(other.state_dict(), state)


def test_header_follows_the_tensors():
    """A cast, a write to the bias or to the weights: the next state is consistent, and loads."""
    layer = packed_layer()
    first = layer.state_dict()["weight_header"]
    assert layer.state_dict()["weight_header"].data_ptr() == first.data_ptr()  # nothing has changed
    for change in (layer.half, lambda: layer.bias.add_(1), lambda: layer.weight_packed.fill_(0b01010101)):
        before = layer.state_dict()["weight_header"].tolist()
        change()
        state = layer.state_dict()
        assert state["weight_header"].tolist() != before
        PackedBitLinear(K, N, dtype=torch.float16).load_state_dict(state)


def corruptions(state: dict[str, torch.Tensor], kind: str, source: random.Random) -> dict[str, torch.Tensor]:
    """A damaged copy of a state."""
    state = {name: tensor.clone() for name, tensor in state.items()}
    name = source.choice(sorted(state))
    if kind == "bit":
        whole = state[name].reshape(-1).view(torch.uint8)
        whole[source.randrange(len(whole))] ^= 1 << source.randrange(8)
    elif kind == "truncated":
        flat = state[name].reshape(-1)
        state[name] = flat[: source.randrange(len(flat))]
    elif kind == "missing":
        del state[source.choice(("weight_packed", "weight_gamma", "weight_header"))]
    elif kind == "swapped":
        first, second = source.sample(sorted(state), 2)
        state[first], state[second] = state[second], state[first]
    elif kind == "shuffled":  # any order of the bytes but the present one
        whole = state[name].reshape(-1).view(torch.uint8)
        first = source.randrange(len(whole))
        second = next(i for i in range(len(whole)) if whole[i] != whole[first])
        whole[first], whole[second] = whole[second].clone(), whole[first].clone()
    elif kind == "dtype":
        state[name] = state[name].to(source.choice((torch.float64, torch.int16)))
    return state


@pytest.mark.row("R40")
@pytest.mark.parametrize("kind", ["bit", "truncated", "missing", "swapped", "shuffled", "dtype"])
@pytest.mark.parametrize("strict", [True, False])
def test_damaged_states_leave_the_layer_as_it_was(kind, strict, count_cases):
    good = bit_layer(measure="absmedian").pack().state_dict()
    layer, x = packed_layer(), tokens()
    state, y, source = copied_state(layer), layer(x), random.Random(kind)
    for assign in (False, True):
        for _ in range(50):
            with pytest.raises(pyops.FormatError):
                layer.load_state_dict(corruptions(good, kind, source), strict=strict, assign=assign)
            assert_same_state(layer.state_dict(), state)
    assert_same_bits(layer(x), y)
    count_cases(100)
    layer.load_state_dict(good)
    assert not torch.equal(layer(x), y)


@pytest.mark.row("R40")
@pytest.mark.parametrize(
    ("other", "text"),
    [
        (lambda: packed_layer("t5"), "layout must be t2 as in the layer, got t5"),
        (lambda: packed_layer(granularity="row"), "granularity must be tensor as in the layer, got row"),
        (lambda: bit_layer(N + 1, K).pack(), f"shape must be [{N}, {K}] as in the layer, got [{N + 1}, {K}]"),
        (lambda: bit_layer(N, K - 1).pack(), f"shape must be [{N}, {K}] as in the layer, got [{N}, {K - 1}]"),
        (lambda: packed_layer(bias=False), "bias must be there, got nothing"),
        (lambda: bit_layer().pack(lorc_rank=2), "lowrank_A must not be there, got a tensor"),
    ],
    ids=["layout", "granularity", "rows", "columns", "bias", "correction"],
)
def test_states_of_other_layers(other, text):
    """The error names the layer in its model, which stays as it was."""
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "second": packed_layer()})
    state = copied_state(model["second"])
    wrong = {f"second.{name}": tensor for name, tensor in other().state_dict().items()}
    with pytest.raises(pyops.FormatError) as raised:
        model.load_state_dict(model["first"].state_dict(prefix="first.") | wrong)
    assert str(raised.value) == f"second: {text}"
    assert_same_state(model["second"].state_dict(), state)


def test_the_state_of_a_float_layer_changes_nothing():
    layer = packed_layer()
    state = copied_state(layer)
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"weight_packed".*Unexpected key.*"weight"'):
        layer.load_state_dict(nn.Linear(K, N).state_dict())
    assert_same_state(layer.state_dict(), state)


def test_checksums_can_be_left_out():
    """PYOPS_VERIFY=0 takes a changed bias, still not another shape."""
    script = """
        import torch, pyops
        layer = pyops.nn.BitLinear(8, 4).pack()
        state = layer.state_dict()
        state["bias"] = state["bias"] + 1
        layer.load_state_dict(state)
        assert torch.equal(layer.bias, state["bias"])
        state["bias"] = torch.zeros(5)
        try:
            layer.load_state_dict(state)
        except pyops.FormatError as error:
            print(error)
    """
    assert "bias must have shape [4], got [5]" in in_fresh_process(script, PYOPS_VERIFY="0")


# ---- torch.compile, export, transforms, autocast ---------------------------------------------------------------


@pytest.mark.row("R24")
@pytest.mark.parametrize("dynamic", [False, True])
@every_option
def test_compiled_whole(options, dynamic):
    """One graph, the same bits, gradients too; a write to the packed weights is seen."""
    torch._dynamo.reset()
    layer = bit_layer(**options)
    packed = layer.pack("t5")
    for one in (layer, packed):
        run = torch.compile(one, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        inputs = [tokens().requires_grad_() for _ in range(2)]
        results = [function(x) for function, x in zip((one, run), inputs, strict=True)]
        for result in results:
            result.square().sum().backward()
        if "norm" in options:  # a decomposed norm rounds otherwise
            assert torch.allclose(*results)
            continue
        assert_same_bits(results[1].detach(), results[0].detach())
        assert_same_bits(inputs[1].grad, inputs[0].grad)
    packed.weight_packed.fill_(121)
    assert_same_bits(run(tokens()), packed.bias.expand(5, N))


@pytest.mark.row("R24")
def test_compiled_with_inductor():
    torch._dynamo.reset()
    layer, x = packed_layer(), tokens()
    layer(x)
    assert_same_bits(torch.compile(layer, fullgraph=True)(x), layer(x))


@pytest.mark.row("R25")
@pytest.mark.parametrize("which", ["trained", "packed", "corrected"])
def test_exported_runs_in_a_fresh_process(which, tmp_path):
    layer = bit_layer()
    layer = {"trained": lambda: layer, "packed": layer.pack, "corrected": lambda: layer.pack(lorc_rank=2)}[which]()
    layer(tokens())
    tokens_dim = torch.export.Dim("tokens", min=2)
    program = torch.export.export(layer, (tokens(),), dynamic_shapes=({0: tokens_dim},))
    called = {str(node.target) for node in program.graph.nodes if "pyops" in str(node.target)}
    assert any("bitlinear" in name or "ternary_linear" in name for name in called), called
    assert not any("repack" in name for name in called), called
    torch.export.save(program, tmp_path / "layer.pt2")
    x = tokens(9, K)
    torch.save({"x": x, "y": layer(x).detach()}, tmp_path / "example.pt")
    script = """
        import sys, torch, pyops
        module = torch.export.load(sys.argv[1]).module()
        example = torch.load(sys.argv[2])
        print(torch.equal(module(example["x"]), example["y"]))
    """
    assert in_fresh_process(script, tmp_path / "layer.pt2", tmp_path / "example.pt").strip() == "True"


@pytest.mark.row("R22")
def test_vmap_over_a_packed_layer():
    layer, x = packed_layer(), tokens(4, 3, K)
    layer(x)  # a layout that was built before is of no use here

    def function(one):
        return pyops.ternary.linear_packed(one, layer.weight_packed, layer.weight_gamma, layer.bias, in_features=K)

    assert_same_bits(torch.vmap(layer)(x), torch.vmap(function)(x))
    first, second = (torch.func.grad(lambda one, f=f: f(one).sum())(x[0]) for f in (layer, function))
    assert_same_bits(first, second)
    assert repacks(layer, x) == 0
    fresh = packed_layer()  # nothing that belongs to a transform is kept
    assert_same_bits(torch.func.grad(lambda one: fresh(one).sum())(x[0]), second)
    assert repacks(fresh, x) == 1


@pytest.mark.row("R26")
@pytest.mark.parametrize("norm", [None, "layernorm", "rmsnorm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(norm, dtype):
    layer, x = bit_layer(norm=norm), tokens()
    packed = layer.pack()
    with torch.autocast("cpu", dtype):
        assert layer(x).dtype == dtype
        assert_same_bits(packed(x), layer(x))


def test_shows_what_it_is():
    assert repr(bit_layer(4, 8, qmax=128, norm="rmsnorm", scale=1.0)) == (
        "BitLinear(in_features=8, out_features=4, bias=True, measure=absmean, granularity=tensor, qmax=128, "
        "norm=rmsnorm, scale given)"
    )
    assert repr(bit_layer(4, 8, act_bits=None).pack("t5", lorc_rank=2)) == (
        "PackedBitLinear(in_features=8, out_features=4, bias=True, fmt=t5, granularity=tensor, act=None, rank=2)"
    )
