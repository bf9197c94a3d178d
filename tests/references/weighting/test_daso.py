"""DASO against the official code over six steps, and its memory against queues of lists."""

from collections import deque

import pytest
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lossary.weighting import DASO, BalancedPrototypeMemory, daso_blend, semantic_alignment_loss
from tests.processes import in_two


def wave(*shape, step):
    return torch.sin(torch.arange(torch.Size(shape).numel()) * step).reshape(shape)


WEIGHT = 4 * wave(4, 3, step=1.9)
SETTING = {"temperature": 1.5, "threshold": 0.4, "warmup": 2, "period": 2, "size": 3, "similarity_temperature": 0.2}
# loss_cons and loss_assign of DASOModel in ytaek-oh/daso, in turn with its FeatureQueue and DistributionLogger.
OFFICIAL = [
    (4.016541004180908, 0.0),
    (1.2924174070358276, 0.0),
    (2.6829745769500732, 5.253206253051758),
    (6.929676532745361, 1.0690842866897583),
    (5.116183280944824, 2.84883975982666),
    (0.6738317608833313, 1.4193133115768433),
]
PROTOTYPES = [
    [-0.4006, 0.1508, 0.3175],
    [0.5608, 0.1370, -0.7264],
    [0.6523, 0.4228, -0.4938],
    [-0.1227, 0.1906, 0.1573],
]


def batch(step):
    """Labelled features with labels, and weak and strong features of unlabelled rows."""
    y = torch.tensor([(step + i * i) % 4 for i in range(5)])
    return wave(5, 3, step=0.37 * (step + 1)), y, *wave(12, 3, step=0.53 * (step + 1)).chunk(2)


def take(daso, step):
    x, y, weak, strong = batch(step)
    daso.memory.push(x, y)
    return daso(weak @ WEIGHT.T, weak, strong @ WEIGHT.T, strong)


def test_six_steps_are_the_official_codes():
    daso = DASO(4, 3, **SETTING)
    for step, expected in enumerate(OFFICIAL):
        got = [values.mean().item() for values in take(daso, step)]
        assert got == pytest.approx(expected, abs=1e-4)
    assert torch.allclose(daso.memory.prototypes(), torch.tensor(PROTOTYPES), atol=1e-4)


def test_a_run_resumes_from_its_state():
    daso, other = DASO(4, 3, **SETTING), DASO(4, 3, **SETTING)
    for step in range(3):
        take(daso, step)
    other.load_state_dict(daso.state_dict())
    for step in range(3, 6):
        for mine, theirs in zip(take(daso, step), take(other, step)):
            assert torch.equal(mine, theirs)


def test_replicas_do_what_they_would_alone():
    stack, alone = DASO(4, 3, replicas=(2,), **SETTING), [DASO(4, 3, **SETTING) for _ in range(2)]
    for step in range(5):
        both = [batch(step), batch(step + 3)]
        x, y, weak, strong = (torch.stack(pair) for pair in zip(*both))
        stack.memory.push(x, y)
        got = stack(weak @ WEIGHT.T, weak, strong @ WEIGHT.T, strong)
        for s, one in enumerate(alone):
            own, labels, u, v = both[s]
            one.memory.push(own, labels)
            for mine, theirs in zip(got, one(u @ WEIGHT.T, u, v @ WEIGHT.T, v)):
                assert torch.allclose(mine[s], theirs, atol=1e-6)
    assert torch.equal(stack.distribution, torch.stack([one.distribution for one in alone]))


def test_evaluation_counts_nothing():
    daso = DASO(4, 3, **SETTING).eval()
    take(daso, 0)
    assert daso.calls == 0
    assert not daso.counts.any()


@pytest.mark.parametrize("size", [1, 2, 7])
def test_the_memory_is_a_queue_for_each_class(size):
    memory, queues = BalancedPrototypeMemory(3, 2, size=size), [deque(maxlen=size) for _ in range(3)]
    g = torch.Generator().manual_seed(0)
    for n in (1, 6, 2, 9, 4):
        features, y = torch.randn(n, 2, generator=g), torch.randint(2, (n,), generator=g)  # class 2 never comes
        memory.push(features, y)
        for feature, c in zip(features, y):
            queues[c].append(feature)
        expected = [torch.stack(list(q)).mean(0) if q else torch.zeros(2) for q in queues]
        assert torch.allclose(memory.prototypes(), torch.stack(expected), atol=1e-6)
    similarity = memory(features)
    cosine = F.cosine_similarity(features.unsqueeze(1), torch.stack(expected).unsqueeze(0), dim=-1)
    assert torch.allclose(similarity, cosine / 0.05, atol=1e-4)
    assert not similarity[:, 2].any()


def test_blending_follows_the_class_that_the_linear_classifier_favours():
    p, q = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7]]), torch.full((3, 3), 1 / 3)
    got = daso_blend(p, q, torch.tensor([80.0, 10.0, 0.0]), temperature=1.5)
    v = [1.0, (1 / 8) ** (1 / 1.5), 0.0]  # 1/4
    expected = [[(1 - v[k]) * value + v[k] / 3 for value in row] for k, row in enumerate(p.tolist())]
    assert v[1] == pytest.approx(0.25)
    assert torch.allclose(got, torch.tensor(expected))
    assert torch.equal(daso_blend(p, q, torch.zeros(3)), p)  # nothing was handed out yet


def test_alignment_teaches_the_strong_view_alone():
    weak, strong = (wave(4, 3, step=s).requires_grad_() for s in (0.9, 1.4))
    loss = semantic_alignment_loss(weak, strong)
    assert torch.allclose(loss, F.cross_entropy(strong, weak.softmax(1), reduction="none"))
    loss.sum().backward()
    assert weak.grad is None
    assert torch.allclose(strong.grad, (strong.softmax(1) - weak.softmax(1)).detach(), atol=1e-6)


def test_gradients_reach_the_strong_view_and_no_pseudo_label():
    daso = DASO(4, 3, **{**SETTING, "warmup": 0})
    x, y, weak, strong = batch(2)
    daso.memory.push(x, y)
    inputs = [t.requires_grad_() for t in (weak @ WEIGHT.T, weak, strong @ WEIGHT.T, strong)]
    torch.stack(daso(*inputs)).sum().backward()
    assert [t.grad is None for t in inputs] == [True, True, False, False]


def test_it_takes_torchs_moving_average_of_an_encoder():
    encoder = torch.nn.Linear(3, 3)
    average = AveragedModel(encoder, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    daso = DASO(4, 3, **{**SETTING, "warmup": 0})
    x, y, weak, strong = batch(0)
    daso.memory.push(average(x), y)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    torch.stack(
        daso(encoder(weak) @ WEIGHT.T, encoder(weak), encoder(strong) @ WEIGHT.T, encoder(strong))
    ).mean().backward()
    optimizer.step()
    average.update_parameters(encoder)
    assert not daso.memory.bank.requires_grad


def _one_of_two(rank):
    daso = DASO(4, 3, **SETTING)
    for step in range(4):
        x, y, weak, strong = batch(step)
        daso.memory.push(x[2 * rank : 2 + 3 * rank], y[2 * rank : 2 + 3 * rank])  # two rows and three
        u, v = weak[3 * rank : 3 + 3 * rank], strong[3 * rank : 3 + 3 * rank]
        values = daso(u @ WEIGHT.T, u, v @ WEIGHT.T, v)
    return [value.tolist() for value in values], daso.state_dict()


def test_two_processes_share_memory_and_counts(tmp_path):
    values, state = in_two(_one_of_two, tmp_path)[0]
    daso = DASO(4, 3, **SETTING)
    for step in range(4):
        expected = take(daso, step)
    for name, value in daso.state_dict().items():
        assert torch.equal(value, state[name]), name
    for mine, theirs in zip(values, expected):
        assert mine == pytest.approx(theirs[:3].tolist(), abs=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match=r"threshold: expected a number >= 0 and <= 1, got 2"):
        DASO(4, 3, threshold=2.0)
    with pytest.raises(ValueError, match=r"features: expected shape \(5, 3\), got \(5, 2\)"):
        BalancedPrototypeMemory(4, 3).push(torch.zeros(5, 2), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"semantic: expected shape \(2, 3\), got \(2, 4\)"):
        daso_blend(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(3))
    with pytest.raises(ValueError, match="temperature: expected a number, got a tensor"):
        daso_blend(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3), temperature=torch.tensor(1.0))
