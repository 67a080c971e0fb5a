"""Which module is the model."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torchmetrics import MeanMetric, MetricCollection

from lightning_compress.training.submodule import choose


class PreTrainedModel(nn.Module):
    """Recognized by its name."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)


class FakeLlama(PreTrainedModel):
    pass


class MetricWithWeights(MeanMetric):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 2))


def body():
    return nn.Sequential(nn.Linear(2, 2), nn.ReLU())


def root(**children):
    module = nn.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module


def test_the_one_pretrained_model_comes_first():
    module = root(model=body(), lm=FakeLlama(), accuracy=MeanMetric())
    assert choose(module) == ("lm", module.lm)


@pytest.mark.parametrize("name", ["model", "net", "backbone"])
def test_then_the_usual_names(name):
    module = root(teacher=body(), head=body(), **{name: body()})
    assert choose(module) == (name, getattr(module, name))


@pytest.mark.parametrize("name", ["model", "net", "backbone", "layer"])
def test_one_bare_layer_means_the_module_around_it(name):
    module = root(accuracy=MeanMetric(), **{name: nn.Linear(2, 2)})
    assert choose(module) == ("", module)
    parametrize.register_parametrization(module.get_submodule(name), "weight", nn.Identity())  # as QAT does
    assert choose(module) == ("", module)
    several = root(model=nn.Linear(2, 2), encoder=body())
    assert choose(several) == ("model", several.model)


def test_what_data_parallel_holds_is_the_model():
    module = root(model=nn.DataParallel(body()))
    assert choose(module) == ("model", module.model.module)


def test_of_two_pretrained_models_the_usual_name_decides():
    module = root(teacher=FakeLlama(), model=FakeLlama())
    assert choose(module) == ("model", module.model)


def test_then_the_only_child_with_weights():
    module = root(encoder=body(), loss=nn.CrossEntropyLoss(), metric=MetricWithWeights(),
                  more=MetricCollection([MeanMetric()]))  # fmt: skip
    assert choose(module) == ("encoder", module.encoder)


def test_a_single_bare_layer_means_the_module_itself():
    module = root(layer=nn.Linear(2, 2))
    assert choose(module) == ("", module)


def test_a_name_wins_and_a_dot_means_everything():
    module = root(model=body(), parts=root(one=body()))
    assert choose(module, "parts.one") == ("parts.one", module.parts.one)
    assert choose(module, ".") == ("", module)


def test_a_compiled_module_is_looked_into():
    inner = body()
    module = root(net=torch.compile(inner, backend="eager"))
    assert choose(module) == ("net", inner)
    assert choose(module, "net") == ("net", inner)


def test_several_are_listed():
    with pytest.raises(ValueError, match="cannot tell which module") as caught:
        choose(root(encoder=body(), decoder=body(), loss=nn.MSELoss()))
    for child in ("'encoder': 'Sequential'", "'decoder': 'Sequential'", "module='<name>'"):
        assert child in str(caught.value)


def test_an_unknown_name_has_near_misses():
    with pytest.raises(ValueError, match=r"module='modle': Module has no such module; did you mean 'model'"):
        choose(root(model=body()), "modle")


def test_a_metric_is_never_the_model():
    module = root(model=body(), score=MetricWithWeights())
    with pytest.raises(ValueError, match="'score' is a torchmetrics MetricWithWeights"):
        choose(module, "score")
