"""The planned models have the parameters and the layers that were published, and no storage."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kaisa.errors import ConfigurationError
from kaisa.kfac.placement import LayerShape
from kaisa.recipes.distributed import layer_shapes
from kaisa.recipes.imagenet_resnets import resnet18
from kaisa.recipes.language_models import Bert, Gpt2, Llama, Width, _rotated
from kaisa.recipes.zoo import MODELS, planned_model

PUBLISHED = {
    # torchvision's documentation, "Params" of each ResNet: 11.69, 25.56, 44.55 and 60.19 million
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    # Transformers' BertForPreTraining, GPT2LMHeadModel and LlamaForCausalLM of the published checkpoints
    "bert-base": 110_106_428,
    "bert-large": 336_226_108,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "llama-1b": 1_235_814_400,
    "llama-8b": 8_030_261_248,
    # He et al. 2016, table 6: 0.27 and 0.46 million
    "resnet20": 269_722,
    "resnet32": 464_154,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_has_the_published_number_of_parameters(name: str) -> None:
    model, _ = MODELS[name].on_meta()
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_a_model_has_storage(name: str) -> None:
    model, inputs = MODELS[name].on_meta(2)
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers(), *inputs])
    assert all(tensor.shape[0] == 2 for tensor in inputs)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_takes_the_inputs_that_belong_to_it(name: str) -> None:
    model, inputs = MODELS[name].on_meta(2)
    with torch.device("meta"):
        outputs = model(*inputs)
    scores = outputs[0] if isinstance(outputs, tuple) else outputs
    assert scores.shape[0] == 2


def dense_layers(name: str) -> Mapping[str, LayerShape]:
    shapes = layer_shapes(MODELS[name].build)
    return {shape.name: shape for shape in shapes if not (shape.a.is_diagonal or shape.a.blocks > 1)}


# Factors of the convolutions and linear layers in MiB of float32: (4 / 2**20) * sum of a² + g² over published shapes.
FACTORS = {"resnet50": 587, "resnet152": 1486}


@pytest.mark.parametrize("name", FACTORS)
def test_dense_factors_are_as_large_as_was_derived_from_published_shapes(name: str) -> None:
    numbers = sum(shape.a.elements + shape.g.elements for shape in dense_layers(name).values())
    assert round(4 * numbers / 2**20) == FACTORS[name]


@pytest.mark.parametrize(
    ("name", "layer", "a", "g"),
    [
        ("resnet50", "conv1", 147, 64),
        ("resnet50", "layer1.0.conv3", 64, 256),
        ("resnet50", "layer4.2.conv2", 4608, 512),
        ("resnet50", "fc", 2049, 1000),
        ("resnet152", "layer3.35.conv2", 2304, 256),
        ("resnet18", "layer4.0.downsample.0", 256, 512),
        ("bert-large", "blocks.23.narrow", 4097, 1024),
        ("bert-base", "blocks.0.query", 769, 768),
        ("gpt2-xl", "blocks.47.c_proj", 6401, 1600),
        ("gpt2-xl", "blocks.0.c_attn", 1601, 4800),
        ("llama-8b", "blocks.0.k_proj", 4096, 1024),
        ("llama-8b", "blocks.31.up_proj", 4096, 14_336),
    ],
)
def test_a_layer_has_factors_of_the_published_sides(name: str, layer: str, a: int, g: int) -> None:
    shape = dense_layers(name)[layer]
    assert (shape.a.size, shape.g.size) == (a, g)


def test_a_tied_prediction_is_one_layer_with_the_embedding() -> None:
    (tied,) = [shape for shape in layer_shapes(MODELS["gpt2"].build) if shape.uses > 1]
    assert (tied.name, tied.a.size, tied.g.size) == ("wte", 50_257, 768)


SMALL = Width(2, 16, 4, 32, 11, 8)


@pytest.mark.parametrize(("kind", "width"), [(Gpt2, SMALL), (Llama, Width(2, 16, 4, 32, 11, 8, shared_heads=2))])
def test_a_decoder_does_not_look_ahead(kind: type[nn.Module], width: Width) -> None:
    model = kind(width).double()
    tokens = torch.randint(11, (2, 8))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_an_encoder_looks_both_ways() -> None:
    model = Bert(SMALL).double()
    tokens, segments = torch.randint(11, (2, 8)), torch.zeros(2, 8, dtype=torch.long)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 11
    before, after = model(tokens, segments)[0], model(changed, segments)[0]
    assert not torch.allclose(before[:, 0], after[:, 0])


def test_rotation_makes_products_depend_on_the_distance_alone() -> None:
    query, key = torch.randn(8), torch.randn(8)
    queries, keys = (_rotated(vector.double().expand(1, 6, 8).contiguous(), 2) for vector in (query, key))
    products = torch.einsum("ipf,iqf->pq", queries.float().double(), keys.float().double())
    for distance in range(-3, 4):
        diagonal = torch.diagonal(products, distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)


def test_a_resnet_computes_what_its_definition_says() -> None:
    model = resnet18().eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.isfinite(model(x)).all()
    block = model.get_submodule("layer2.0")
    state = {name: value.double() for name, value in block.state_dict().items()}
    x = torch.randn(2, 64, 9, 9, dtype=torch.float64)

    def normalized(y: Tensor, name: str) -> Tensor:
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        scaled = (y - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        return scaled * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]

    y = normalized(functional.conv2d(x, state["conv1.weight"], stride=2, padding=1), "bn1").clamp(min=0)
    y = normalized(functional.conv2d(y, state["conv2.weight"], padding=1), "bn2")
    shortcut = normalized(functional.conv2d(x, state["downsample.0.weight"], stride=2), "downsample.1")
    torch.testing.assert_close(block.double()(x), (y + shortcut).clamp(min=0))


def test_an_unknown_model_is_refused_with_the_names_of_those_that_are_known() -> None:
    with pytest.raises(ConfigurationError, match=r"unknown model 'vgg'; choose from mlp, .*llama-8b"):
        planned_model("vgg")
