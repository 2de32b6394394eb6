"""A model becomes one of few bits and a float model again; what holds on to it in between stays right."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kaisa.errors import ConfigurationError, StateError
from kaisa.quantize import QuantConfig, convert, load_ranges, prepare, quantized_layers, ranges_of, set_mode

ALL_BITS = QuantConfig(
    activation_bits=None, weight_bits=None, bias_bits=None, gradient_bits=None, weight_gradient_bits=None
)
PRODUCTS = ("mm", "addmm", "bmm", "convolution", "mkldnn_linear")


class Network(nn.Module):
    """Every type of layer that is quantised."""

    def __init__(self) -> None:
        super().__init__()
        self.signal = nn.Conv1d(2, 4, 3, padding=1)
        self.image = nn.Conv2d(1, 2, 3, padding="same", padding_mode="circular")
        self.volume = nn.Conv3d(1, 1, (1, 2, 2), stride=(1, 2, 2), bias=False)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.signal(x).relu()
        x = self.image(x[:, None]).relu()
        x = self.volume(x[:, None])[:, 0].flatten(1).unflatten(1, (-1, 4))
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


@pytest.fixture
def model() -> nn.Module:
    return Network()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 2, 8)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_a_prepared_model_is_the_same_object_with_the_same_parameters_and_keys(model: nn.Module) -> None:
    parameters, keys = list(model.parameters()), list(model.state_dict())
    assert prepare(model) is model
    assert all(own is before for own, before in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert list(quantized_layers(model)) == ["signal", "image", "volume", "attention", "head"]


def test_states_go_from_the_float_model_to_the_prepared_one_and_back(model: nn.Module) -> None:
    other = Network()
    prepare(model).load_state_dict(other.state_dict())
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_model_converted_back_is_the_float_model(model: nn.Module, x: Tensor) -> None:
    before, kinds, names = model(x), [type(m) for m in model.modules()], [sorted(vars(m)) for m in model.modules()]
    prepare(model)(x)
    convert(model)
    assert [type(module) for module in model.modules()] == kinds
    assert [sorted(vars(module)) for module in model.modules()] == names
    assert not list(model.buffers())
    assert torch.equal(model(x), before)


def test_in_exact_mode_outputs_and_gradients_are_those_of_the_float_model(model: nn.Module, x: Tensor) -> None:
    before, expected = model(x), gradients(model, x)
    set_mode(prepare(model), "exact")
    assert torch.equal(model(x), before)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, x), expected, strict=True))


def test_with_all_the_bits_there_are_every_layer_computes_as_in_float(model: nn.Module, x: Tensor) -> None:
    before, expected = model(x), gradients(model, x)
    prepare(model, ALL_BITS)
    torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(gradients(model, x), expected)


def test_qat_and_fqt_compute_the_same_forward_pass(model: nn.Module, x: Tensor) -> None:
    prepare(model, QuantConfig(gradient_bits=2, ranges="batch"))
    assert torch.equal(model(x), set_mode(model, "qat")(x))


def test_a_prepared_model_is_not_the_float_model(model: nn.Module, x: Tensor) -> None:
    before = model(x)
    assert not torch.equal(prepare(model)(x), before)


class Counter(TorchDispatchMode):
    """Counts products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in PRODUCTS
        return function(*args, **(kwargs or {}))


def products(model: nn.Module, x: Tensor) -> int:
    with Counter() as counter:
        model(x)
    return counter.count


def test_a_prepared_model_makes_no_more_products_in_the_forward_pass(model: nn.Module, x: Tensor) -> None:
    before = products(model, x)
    assert before == 6
    assert products(prepare(model), x) == before


def test_a_forward_hook_is_called_once(model: nn.Module, x: Tensor) -> None:
    calls = []
    prepare(model).head.register_forward_hook(lambda *arguments: calls.append(1))
    model(x)
    assert calls == [1]


def test_a_copy_is_prepared_too_and_independent(model: nn.Module, x: Tensor) -> None:
    prepare(model, QuantConfig(ranges="batch"))
    other = copy.deepcopy(model)
    assert torch.equal(other(x), model(x))
    convert(other)
    assert len(quantized_layers(model)) == 5


def test_examples_without_a_batch_are_computed_like_a_batch_of_one() -> None:
    for layer, shape in ((nn.Linear(4, 3), (4,)), (nn.Conv2d(1, 2, 2), (1, 4, 4))):
        prepare(layer, QuantConfig(ranges="batch"))
        x = torch.randn(shape)
        assert torch.equal(layer(x), layer(x[None])[0])


# ------------------------------------------------------------------------------------------------------ choosing


def test_layers_are_left_out_by_name_by_type_and_by_a_function(model: nn.Module) -> None:
    def chosen(skip: object) -> list[str]:
        return list(quantized_layers(prepare(convert(model), QuantConfig(skip_layers=skip))))

    assert chosen(["^head$"]) == ["signal", "image", "volume", "attention"]
    assert chosen(["^Conv", "Attention$"]) == ["head"]
    assert chosen(lambda name, module: not isinstance(module, nn.Conv1d)) == ["signal"]


def test_a_second_call_has_the_new_options_alone(model: nn.Module) -> None:
    prepare(model)
    prepare(model, QuantConfig(skip_layers=["^Linear$"], mode="qat"))
    assert type(model.head) is nn.Linear
    assert {layer.quantization.mode for layer in quantized_layers(model).values()} == {"qat"}


def test_gradients_have_bits_by_layer(model: nn.Module) -> None:
    prepare(model, QuantConfig(gradient_bits={"head": 3}))
    branches = {name: layer.quantization.branches.inputs for name, layer in quantized_layers(model).items()}
    assert branches.pop("head").bits == 3
    assert set(branches.values()) == {None}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "int4"}, "unknown mode 'int4'; choose from exact, qat, fqt"),
        ({"quantizer": "column"}, "unknown quantizer 'column'; choose from ptq, psq, bhq"),
        ({"weight_gradient_quantizer": "bhq"}, "choose from ptq, column"),
        ({"ranges": "fixed"}, "unknown ranges"),
        ({"execution": "fast"}, "unknown execution"),
        ({"weight_bits": 9}, "weight_bits is 9; give a whole number from 2 to 8"),
        ({"gradient_bits": 1}, "gradient_bits is 1"),
        ({"gradient_bits": {"head": 2.5}}, "gradient_bits of head is 2.5"),
        ({"bias_bits": 17}, "from 2 to 16"),
        ({"momentum": 0}, "momentum"),
        ({"skip_layers": "head"}, "skip_layers is the text 'head'; give a list"),
        ({"gradient_bits": 5.0}, r"gradient_bits is 5\.0; give a whole number"),
        ({"gradient_bits": {"head": 5.0}}, r"gradient_bits of head is 5\.0"),
        ({"momentum": lambda step: 0.1}, "momentum is <function"),
        ({"skip_layers": ["("]}, "which is no pattern"),
        ({"skip_layers": [nn.Linear]}, "which is no pattern"),
        ({"skip_layers": None}, "skip_layers is None; give a list"),
        ({"execution": "int8", "activation_bits": None}, "execution is 'int8', but activation_bits or weight_bits"),
        ({"execution": "int8", "weight_bits": None}, "execution is 'int8'"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        QuantConfig(**options)


def test_a_short_text_stands_for_options() -> None:
    assert QuantConfig.read("bhq:5") == QuantConfig(quantizer="bhq", gradient_bits=5)
    assert QuantConfig.read("ptq") == QuantConfig(quantizer="ptq", gradient_bits=8)
    assert QuantConfig.read("qat:6") == QuantConfig(mode="qat", activation_bits=6, weight_bits=6)


@pytest.mark.parametrize("text", ["", "bhq:", "bhq:9", "bhq:1", "bhq:x", "int8", "column:4", "bhq:5:4"])
def test_a_text_that_stands_for_nothing_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="such as bhq:5"):
        QuantConfig.read(text)


def test_a_model_in_which_nothing_is_quantised_is_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigurationError, match="no layer is left to be quantised"):
        prepare(nn.Sequential(nn.ReLU()))
    with pytest.raises(ConfigurationError, match="no layer is left"):
        prepare(model, QuantConfig(skip_layers=["."]))
    with pytest.raises(ConfigurationError, match="call prepare"):
        set_mode(model, "qat")


def test_a_refused_model_is_as_it_was(model: nn.Module) -> None:
    model.other = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    with pytest.raises(ConfigurationError, match="other has add_bias_kv or add_zero_attn"):
        prepare(model)
    with pytest.raises(ConfigurationError, match="gradient_bits names 'heat', which is no layer"):
        prepare(model, QuantConfig(gradient_bits={"heat": 3}, skip_layers=["other"]))
    with pytest.raises(ConfigurationError, match="skip_layers has 'heat', which fits no layer; such are signal, image"):
        prepare(model, QuantConfig(skip_layers=["other", "heat"]))
    assert not quantized_layers(model)


def test_a_layer_without_shapes_is_refused() -> None:
    lazy = nn.Sequential(nn.LazyConv1d(2, 3), nn.Flatten(), nn.LazyLinear(2))
    with pytest.raises(ConfigurationError, match="0 has no shapes yet"):
        prepare(lazy)
    lazy(torch.randn(4, 1, 5))
    assert list(quantized_layers(prepare(lazy))) == ["0", "2"]


# -------------------------------------------------------------------------------------------------------- ranges


def test_in_evaluation_an_example_does_not_depend_on_its_batch(model: nn.Module, x: Tensor) -> None:
    prepare(model)(x)
    model.eval()
    torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=1e-5, atol=1e-6)


def test_with_ranges_of_the_batch_it_does(model: nn.Module, x: Tensor) -> None:
    prepare(model, QuantConfig(ranges="batch"))(x)
    model.eval()
    assert (model(x)[:1] - model(x[:1])).abs().max() > 1e-4


def test_running_ranges_average_those_of_training_and_not_of_evaluation() -> None:
    layer = prepare(nn.Linear(2, 2), QuantConfig(momentum=0.25))
    assert ranges_of(layer)[""].isnan().all()
    layer(torch.tensor([[-1.0, 3.0]]))
    layer(torch.tensor([[-5.0, 1.0]]))
    layer.eval()(torch.tensor([[-100.0, 100.0]]))
    torch.testing.assert_close(ranges_of(layer)[""], torch.tensor([[-2.0, 2.5]]))


def test_attention_has_a_running_range_for_each_of_its_inputs() -> None:
    module = prepare(nn.MultiheadAttention(4, 2))
    query = torch.linspace(-1, 1, 24).view(3, 2, 4)
    module(query, 2 * query, 3 * query)
    ranges = ranges_of(module)[""]
    torch.testing.assert_close(ranges[:3], torch.tensor([[-1.0, 1.0], [-2.0, 2.0], [-3.0, 3.0]]))
    assert bool((ranges[3].abs() < 3).all())  # of what was attended to: means of projected values


def test_running_ranges_are_kept_beside_the_state(model: nn.Module, x: Tensor) -> None:
    other = prepare(copy.deepcopy(model))
    prepare(model)(x)
    load_ranges(other, ranges_of(model))
    assert torch.equal(other.eval()(x[:2]), model.eval()(x[:2]))


def test_ranges_of_other_shapes_are_refused_before_any_is_set(model: nn.Module) -> None:
    ranges = {name: torch.zeros_like(own) for name, own in ranges_of(prepare(model)).items()}
    with pytest.raises(StateError, match=r"the ranges of attention have the shape \(1, 2\), the model's \(4, 2\)"):
        load_ranges(model, {**ranges, "attention": torch.zeros(1, 2)})
    assert all(own.isnan().all() for own in ranges_of(model).values())


def test_ranges_of_other_layers_are_refused(model: nn.Module) -> None:
    prepare(model, QuantConfig(skip_layers=["^head$"]))
    with pytest.raises(StateError, match="only one of the two has head"):
        load_ranges(model, {**ranges_of(model), "head": torch.zeros(1, 2)})
