"""Random weights in cascade, and ranks: against scipy, and against what must stay as it was."""

import math

import pytest
import torch
from scipy.stats import rankdata, spearmanr

from tests.zfnet.networks import Branches, zfnet_like
from zfnet.sanity import cascade, randomised, rank_correlation, ranks
from zfnet.tracing import trace


@pytest.mark.parametrize("values", [torch.arange(6.0), torch.tensor([2.0, -1, 2, 0, 0, 0]), torch.zeros(3)])
def test_ranks_against_scipy(values):
    assert ranks(values).tolist() == rankdata(values.numpy()).tolist()


@pytest.mark.parametrize("kinds", [1000, 7])
def test_correlation_against_scipy(kinds):
    one, other = torch.randint(kinds, (2, 3, 5, 40), generator=torch.Generator().manual_seed(0)).float()
    expected = spearmanr(one.flatten(), other.flatten()).statistic
    assert rank_correlation(one, other) == pytest.approx(expected, abs=1e-12)


def test_correlation_of_known_pairs():
    x = torch.randn(50)
    assert rank_correlation(x, 3 * x.exp()) == pytest.approx(1)  # any increasing function
    assert rank_correlation(x, -x) == pytest.approx(-1)
    assert math.isnan(rank_correlation(x, torch.ones(50)))


def test_a_cascade_is_the_layer_and_all_beneath_it_from_the_top():
    graph = trace(zfnet_like(classes=3), (3, 224, 224))
    assert cascade(graph, "conv3") == ("conv3", "conv2", "conv1")
    assert cascade(graph, "fc8")[:2] == ("fc8", "fc6")


def test_a_cascade_leaves_other_branches_out():
    graph = trace(Branches().eval(), (3, 32, 32))
    for layer in graph.layers:
        assert set(cascade(graph, layer)) == set(graph.layers) & set(graph.ancestors([layer]))
        assert cascade(graph, layer)[0] == layer


def test_only_the_named_layers_are_random_and_keep_their_scale():
    network = zfnet_like(maps=(32, 32, 8, 8, 8), classes=3)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = randomised(network, ["conv2", "fc6"], 0)
    for name, tensor in found.state_dict().items():
        assert torch.equal(network.state_dict()[name], before[name])
        if name.startswith(("conv2", "fc6")):
            assert not torch.equal(tensor, before[name]) or not before[name].std()
            if name.endswith("weight"):
                assert float(tensor.std()) == pytest.approx(float(before[name].std()), rel=0.05)
                assert abs(float(torch.corrcoef(torch.stack([tensor.flatten(), before[name].flatten()]))[0, 1])) < 0.05
        else:
            assert tensor.data_ptr() == network.state_dict()[name].data_ptr()  # shared, not copied
    assert found.training == network.training


def test_a_draw_depends_on_seed_and_name_alone():
    network = zfnet_like(classes=3)
    alone, after = randomised(network, ["conv1"], 0), randomised(randomised(network, ["conv5"], 0), ["conv1"], 0)
    assert torch.equal(alone.conv1.weight, after.conv1.weight)
    assert not torch.equal(alone.conv1.weight, randomised(network, ["conv1"], 1).conv1.weight)
