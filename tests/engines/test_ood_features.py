"""Features tapped in one pass: equal to running the model's parts by hand, and nothing of the pass stays behind."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lossary.ood._features import FeatureTap


@pytest.fixture
def images():
    return torch.arange(7 * 3 * 6 * 6.0).view(7, 3, 6, 6).sin()


@pytest.fixture
def network():
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(), nn.Linear(64, 5)
    )
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 1, generator=g)
    return model


def test_layers_and_logits_are_those_of_the_parts_run_by_hand(network, images):
    found = FeatureTap(network, ["1", "5"])(images, batch=3)
    network.eval()
    with torch.no_grad():
        maps = network[:2](images)
        logits = network(images)
    assert list(found.features) == ["1", "5"]
    # The ReLU after layer 1 works in place; the tap has what was there before.
    torch.testing.assert_close(found.features["1"], maps.mean((2, 3)))
    torch.testing.assert_close(found.features["5"], logits)
    torch.testing.assert_close(found.output, logits)
    assert found.labels is None
    whole = FeatureTap(network, ["1"], average=None)(images).features["1"]
    torch.testing.assert_close(whole, maps)


def test_the_model_runs_once_a_batch_and_no_more(network, images):
    seen = []
    network[0].register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    FeatureTap(network, ["0", "1", "2", "3", "5"])(images, batch=3)
    assert seen == [3, 3, 1]


def test_modes_hooks_and_gradients_are_as_before(network, images):
    network.train()
    network[1].eval()  # frozen statistics, as in fine-tuning
    modes, statistics = [m.training for m in network.modules()], network[1].running_mean.clone()
    found = FeatureTap(network, ["1"])(images)
    assert not found.output.requires_grad
    assert [m.training for m in network.modules()] == modes
    assert torch.equal(network[1].running_mean, statistics)
    with pytest.raises(RuntimeError):
        FeatureTap(network, ["1"])(images[:, :2])  # a pass that fails half way
    assert [m.training for m in network.modules()] == modes
    assert not any(m._forward_hooks for m in network.modules())


def test_a_loader_brings_its_labels_along(network, images):
    labels = torch.arange(7) % 3
    loader = DataLoader(TensorDataset(images, labels), batch_size=2, shuffle=True)
    found = FeatureTap(network, ["1"])(loader)
    plain = FeatureTap(network, ["1"])(images)
    order = torch.cdist(found.features["1"], plain.features["1"]).argmin(1)
    assert sorted(order.tolist()) == list(range(7))
    assert torch.equal(found.labels, labels[order])
    with pytest.raises(ValueError, match=r"data: expected labels with every batch, got them with 1 of 2"):
        FeatureTap(network, ["1"])([(images, labels), images])


def test_the_first_tensor_counts_unless_there_are_logits():
    class Twice(nn.Module):
        def forward(self, x):
            return None, (x + 1, x + 2)

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice = Twice()

        def forward(self, x, y):
            self.twice(x)
            return {"loss": x.sum(), "logits": x * y}

    x = torch.arange(6.0).view(3, 2)
    found = FeatureTap(Named(), ["twice"])({"x": x, "y": 2 * x, "labels": torch.tensor([4, 5, 6])}, batch=2)
    assert torch.equal(found.features["twice"], x + 1)
    assert torch.equal(found.output, 2 * x * x)
    assert found.labels.tolist() == [4, 5, 6]


def test_tokens_are_averaged_over_the_mask_in_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.BertModel(config).train()
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    batch = {"input_ids": torch.arange(1, 13).view(3, 4) * mask, "attention_mask": mask}
    found = FeatureTap(model, ["encoder.layer.0", "encoder.layer.1.attention.self", "pooler"], average="tokens")(
        batch, batch=2
    )
    assert model.training
    model.eval()
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True)
    for got, tokens in (
        (found.features["encoder.layer.0"], states.hidden_states[1]),
        (found.output, states.last_hidden_state),
    ):
        torch.testing.assert_close(got, torch.stack([t[m > 0].mean(0) for t, m in zip(tokens, mask)]))
    torch.testing.assert_close(found.features["pooler"], states.pooler_output)
    assert found.features["encoder.layer.1.attention.self"].shape == (3, 8)  # of a tuple with the attention weights


def test_refusals_name_the_argument(network, images):
    with pytest.raises(ValueError, match=r"layers: .*such as 'encoder.0', 'encoder', got 'encodr.0'"):
        FeatureTap(nn.ModuleDict({"encoder": nn.Sequential(nn.ReLU())}), ["encodr.0"])
    with pytest.raises(ValueError, match=r"layers: expected a list of names of modules.*got '1'"):
        FeatureTap(network, "1")
    with pytest.raises(ValueError, match=r"average: expected one of 'space', 'tokens', None, got 'time'"):
        FeatureTap(network, average="time")
    with pytest.raises(ValueError, match=r"data: expected at least one batch, got none"):
        FeatureTap(network)([])
    with pytest.raises(ValueError, match=r"data: expected .* batches of them, got int"):
        FeatureTap(network)(3)
    skips = nn.Module()
    skips.used, skips.spare, skips.forward = network[0], nn.Identity(), lambda x: network[0](x)
    with pytest.raises(ValueError, match=r"layers: 'spare' did not run in the pass"):
        FeatureTap(skips, ["spare"])(images)
    skips.forward = lambda attention_mask: images
    with pytest.raises(ValueError, match=r"average: .*attention_mask"):
        FeatureTap(skips, average="tokens")([{"attention_mask": torch.ones(7, 2)}])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees_and_results_come_back(network, images):
    expected = FeatureTap(network, ["1"])(images)
    got = FeatureTap(network.cuda(), ["1"])(images)
    assert got.features["1"].device.type == "cpu"
    torch.testing.assert_close(got.features["1"], expected.features["1"])
    torch.testing.assert_close(got.output, expected.output)
