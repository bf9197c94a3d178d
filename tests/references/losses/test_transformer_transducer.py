"""The transducer loss against its sum over paths, torchaudio's own numbers and closed forms; the model by loops."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch

from lossary.losses import TransducerJoiner, TransformerTransducer, limited_context_mask, rnnt_loss


def lattice(dtype=torch.float64, lead=(4,), frames=5, labels=3, classes=4):
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(*lead, frames, labels + 1, classes, generator=g, dtype=torch.float64)
    targets = torch.randint(classes - 1, (*lead, labels), generator=g)
    return logits.to(dtype), targets, torch.tensor([5, 3, 1, 4]), torch.tensor([3, 2, 3, 0])


def sum_over_paths(logits, target, blank):
    """-log of the sum, over every order of the steps, of the product of their probabilities; the last is a blank."""
    frames, labels = len(logits), len(target)
    total = 0.0
    p = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    for emits in combinations(range(frames - 1 + labels), labels):
        t = u = 0
        path = 1.0
        for step in range(frames + labels):
            if step in emits:
                path, u = path * p[t, u, target[u]], u + 1
            else:
                path, t = path * p[t, u, blank], t + 1
        total += path
    return -math.log(total)


@pytest.mark.parametrize("blank", [-1, 0, 2])
def test_it_is_the_sum_over_all_paths(blank):
    logits, targets, frames, labels = lattice()
    got = rnnt_loss(logits, targets, frames, labels, blank=blank)
    for value, z, y, t, u in zip(got.tolist(), logits.numpy(), targets.tolist(), frames.tolist(), labels.tolist()):
        assert value == pytest.approx(sum_over_paths(z[:t, : u + 1], y[:u], blank), abs=1e-10)


def test_value_and_gradient_are_those_that_torchaudio_tests_itself_by():
    """Input, cost and gradient from test/torchaudio_unittest/rnnt/utils.py of pytorch/audio, first from HawkAaron."""
    logits = torch.full((1, 2, 3, 5), 0.1)
    for t, u, k, value in ((0, 0, 1, 0.6), (0, 1, 2, 0.6), (0, 2, 3, 0.8), (1, 0, 1, 0.6), (1, 2, 0, 0.7)):
        logits[0, t, u, k] = value
    logits[0, [0, 1, 1], [2, 1, 2], 2] = 0.2
    logits.requires_grad_()
    two = torch.tensor([2], dtype=torch.int32)
    value = rnnt_loss(logits, torch.tensor([[1, 2]], dtype=torch.int32), two, two)
    assert value.item() == pytest.approx(5.09566688538, abs=1e-5)
    value.backward()
    expected = [
        [0.17703132, -0.39992708, 0.17703132, 0.17703132, -0.13116692],
        [0.12247062, 0.12247062, -0.181684, 0.12247062, -0.1857276],
        [0.06269141, 0.06269141, 0.06928471, 0.12624498, -0.32091248],
        [0.05456069, -0.2182428, 0.05456069, 0.05456069, 0.05456069],
        [0.12073967, 0.12073967, -0.48295838, 0.12073967, 0.12073967],
        [0.30741188, 0.16871123, 0.18645471, 0.16871123, -0.83128875],
    ]
    torch.testing.assert_close(logits.grad.view(6, 5), torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("frames", "labels", "classes"), [(7, 4, 3), (1, 6, 5), (9, 0, 2)])
def test_equal_logits_count_the_paths(frames, labels, classes):
    logits = torch.zeros(1, frames, labels + 1, classes, dtype=torch.float64)
    value = rnnt_loss(logits, torch.zeros(1, labels).long(), torch.tensor([frames]), torch.tensor([labels]))
    paths = math.comb(frames - 1 + labels, labels)
    assert value.item() == pytest.approx((frames + labels) * math.log(classes) - math.log(paths), abs=1e-12)


def test_the_gradient_agrees_with_finite_differences_and_is_zero_outside():
    logits, targets, frames, labels = lattice()
    logits.requires_grad_()

    def call(z):
        return rnnt_loss(z, targets, frames, labels, blank=1) * torch.tensor([1.0, -2.0, 0.5, 3.0])

    assert torch.autograd.gradcheck(call, (logits,))
    (grad,) = torch.autograd.grad(call(logits).sum(), logits)
    outside = (torch.arange(5)[:, None] >= frames[:, None, None]) | (torch.arange(4) > labels[:, None, None])
    assert outside.any()
    assert not grad[outside].any()


def test_padding_does_not_matter_and_leading_dimensions_are_a_batch():
    logits, targets, frames, labels = lattice()
    expected = rnnt_loss(logits, targets, frames, labels)
    targets[torch.arange(3) >= labels[:, None]] = -100
    logits[1, 3:] = 50
    torch.testing.assert_close(rnnt_loss(logits, targets, frames, labels), expected, rtol=0, atol=0)
    square = rnnt_loss(logits.view(2, 2, 5, 4, 4), targets.view(2, 2, 3), frames.view(2, 2), labels.view(2, 2))
    torch.testing.assert_close(square, expected.view(2, 2), rtol=0, atol=0)
    torch.testing.assert_close(rnnt_loss(logits[0], targets[0], frames[0], labels[0]), expected[0], rtol=0, atol=0)


def test_log_probabilities_pass_for_logits():
    logits, targets, frames, labels = lattice()
    logits.requires_grad_()
    (plain,) = torch.autograd.grad(rnnt_loss(logits, targets, frames, labels).sum(), logits)
    outside = rnnt_loss(logits.log_softmax(-1), targets, frames, labels)
    torch.testing.assert_close(torch.autograd.grad(outside.sum(), logits)[0], plain, rtol=0, atol=1e-14)


def test_other_precisions():
    logits, *rest = lattice()
    double = rnnt_loss(logits, *rest)
    torch.testing.assert_close(rnnt_loss(logits.float(), *rest).double(), double, rtol=1e-5, atol=1e-5)
    half = logits.bfloat16().requires_grad_()
    value = rnnt_loss(half, *rest)
    assert value.dtype == torch.bfloat16
    torch.testing.assert_close(value.double(), rnnt_loss(half.detach().double(), *rest), rtol=2**-8, atol=0)
    value.sum().backward()
    assert half.grad.isfinite().all()


def test_long_and_hopeless_utterances_stay_finite():
    logits = torch.zeros(1, 40, 11, 3)
    logits[..., 2] = 1e4
    logits.requires_grad_()
    value = rnnt_loss(logits, torch.ones(1, 10).long(), torch.tensor([40]), torch.tensor([10]))
    assert value.item() == pytest.approx(1e5 - math.log(math.comb(49, 10)), rel=1e-6)  # ten labels at 1e4 each
    value.backward()
    assert logits.grad.isfinite().all()


def test_a_target_without_a_path_costs_inf_and_has_no_gradient():
    logits, targets, frames, labels = lattice()
    logits[0, ..., targets[0, 1]] = -torch.inf
    logits.requires_grad_()
    value = rnnt_loss(logits, targets, frames, labels)
    assert value[0] == torch.inf
    assert value[1:].isfinite().all()
    value.sum().backward()
    assert not logits.grad[0].any()
    assert logits.grad.isfinite().all()


def test_second_derivatives():
    logits, targets, *_ = lattice(lead=(2,), frames=3, labels=2, classes=3)
    frames, labels = torch.tensor([3, 2]), torch.tensor([2, 1])
    logits.requires_grad_()
    weight = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda z, w: rnnt_loss(z, targets, frames, labels) * w, (logits, weight))


@pytest.mark.parametrize(
    ("name", "place", "wrong"),
    [
        ("logits", 0, torch.zeros(4, 5, 4, 4).long()),
        ("logits", 0, torch.zeros(4, 4)),
        ("targets", 1, torch.zeros(4, 3)),
        ("targets", 1, torch.zeros(4, 4).long()),
        ("logit_lengths", 2, torch.ones(3).long()),
        ("target_lengths", 3, [3, 2, 3, 0]),
    ],
)
def test_what_does_not_fit_is_refused(name, place, wrong):
    given = list(lattice())
    given[place] = wrong
    with pytest.raises(ValueError, match=rf"^{name}: "):
        rnnt_loss(*given)


@pytest.mark.parametrize("blank", [4, -5, 1.0, None])
def test_a_blank_outside_the_classes_is_refused(blank):
    with pytest.raises(ValueError, match=r"^blank: "):
        rnnt_loss(*lattice(), blank=blank)


def test_the_joiner_written_out():
    torch.manual_seed(0)
    joiner = TransducerJoiner(3, 2, hidden=4, num_classes=5).double()
    audio, label = torch.randn(2, 6, 3).double(), torch.randn(2, 3, 2).double()
    w = {name: value.detach().numpy() for name, value in joiner.named_parameters()}
    logits = joiner(audio, label).detach().numpy()
    for b, t, u in ((0, 0, 0), (1, 5, 2), (0, 3, 1)):
        inner = w["audio.weight"] @ audio[b, t].numpy() + w["audio.bias"] + w["label.weight"] @ label[b, u].numpy()
        expected = w["output.weight"] @ np.tanh(inner) + w["output.bias"]
        np.testing.assert_allclose(logits[b, t, u], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("left", "right"), [(2, 1), (0, 0), (None, 1), (1, None), (None, None)])
def test_the_mask_by_its_definition(left, right):
    mask = limited_context_mask(6, left=left, right=right)
    for i in range(6):
        for j in range(6):
            assert mask[i, j] == ((left is None or j >= i - left) and (right is None or j <= i + right))


def model(**hyper):
    torch.manual_seed(0)
    sizes = {"width": 8, "heads": 2, "feedforward": 6, "audio_layers": 2, "label_layers": 1}
    made = TransformerTransducer(3, 5, **(sizes | hyper)).double().eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.endswith("_bias"):
                weight.normal_()
    return made


def speech():
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 9, 3, generator=g, dtype=torch.float64), torch.tensor([9, 6])


def norm(x, w, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def layer(x, w, allowed):
    """One layer, pair by pair, in numpy: Transformer-XL's four terms, residuals on the normalised path."""
    x = norm(x, w, "before_attention")
    q, k, v = np.split(w["project.weight"] @ x.T + w["project.bias"][:, None], 3)
    rate = 10_000.0 ** (-np.arange(0, 8, 2) / 8)
    heard = np.zeros_like(x)
    for head in range(2):
        rows = slice(4 * head, 4 * head + 4)
        for i in range(len(x)):
            scores = np.full(len(x), -np.inf)
            for j in range(len(x)):
                if allowed(i, j):
                    r = w["offset.weight"] @ np.concatenate([np.sin((i - j) * rate), np.cos((i - j) * rate)])
                    content = (q[rows, i] + w["content_bias"][head, 0]) @ k[rows, j]
                    scores[j] = (content + (q[rows, i] + w["offset_bias"][head, 0]) @ r[rows]) / 2
            p = np.exp(scores - scores.max())
            heard[i, rows] = v[rows] @ (p / p.sum())
    y = norm(x + heard @ w["merge.weight"].T + w["merge.bias"], w, "before_dense")
    inner = np.maximum(y @ w["dense.0.weight"].T + w["dense.0.bias"], 0)
    return y + inner @ w["dense.3.weight"].T + w["dense.3.bias"]


def test_the_encoders_written_out_pair_by_pair():
    made = model(audio_left=3, audio_right=1, label_left=2)
    w = {name: value.detach().numpy() for name, value in made.named_parameters()}
    audio, lengths = speech()
    x = audio[1, :6].numpy() @ w["audio_input.weight"].T + w["audio_input.bias"]
    for n in range(2):
        of_layer = {k.removeprefix(f"audio_encoder.{n}."): v for k, v in w.items() if f"audio_encoder.{n}." in k}
        x = layer(x, of_layer, lambda i, j: i - 3 <= j <= i + 1)
    np.testing.assert_allclose(made.encode_audio(audio, lengths)[1, :6].detach(), x, rtol=0, atol=1e-12)

    y = w["label_input.weight"][[4, 2, 0, 0, 3]]  # the blank stands before the first label
    of_layer = {k.removeprefix("label_encoder.0."): v for k, v in w.items() if "label_encoder.0." in k}
    y = layer(y, of_layer, lambda i, j: i - 2 <= j <= i)
    np.testing.assert_allclose(made.encode_labels(torch.tensor([[2, 0, 0, 3]]))[0].detach(), y, rtol=0, atol=1e-12)
    logits = made(audio, lengths, torch.tensor([[2, 0, 0, 3]] * 2))
    expected = made.joiner(torch.from_numpy(x), torch.from_numpy(y))
    torch.testing.assert_close(logits[1, :6], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("left", "right"), [(1, 0), (2, 1), (None, 0), (None, None)])
def test_an_output_depends_on_what_its_layers_reach_and_on_no_padding(left, right):
    made = model(audio_left=left, audio_right=right)
    audio, lengths = speech()
    audio.requires_grad_()
    heard = made.encode_audio(audio, lengths)
    for b, t in ((0, 4), (1, 3)):
        (grad,) = torch.autograd.grad(heard[b, t].square().sum(), audio, retain_graph=True)
        first = 0 if left is None else max(t - 2 * left, 0)
        last = min(lengths[b].item() - 1, 8 if right is None else t + 2 * right)
        reached = grad[b].any(-1).nonzero().flatten().tolist()
        assert reached == list(range(first, last + 1))
    assert heard.isfinite().all()


@pytest.mark.parametrize("cap", [1, 3])
def test_transcription_is_the_greedy_path_of_each_utterance(cap):
    made = model(audio_left=2, audio_right=1)
    with torch.no_grad():
        made.joiner.output.bias[4] -= 0.2
        made.joiner.output.weight *= 3
    audio, lengths = speech()
    labels, count = made.transcribe(audio, lengths, max_symbols=cap)
    lengths_seen = []
    for b in range(2):
        said: list[int] = []
        for t in range(lengths[b]):
            for _ in range(cap):
                logits = made(audio[b : b + 1], lengths[b : b + 1], torch.tensor([said], dtype=torch.int64))
                best = logits[0, t, -1].argmax().item()
                if best == 4:
                    break
                said.append(best)
        assert labels[b].tolist() == said + [4] * (labels.shape[1] - len(said))
        assert count[b] == len(said)
        lengths_seen.append(len(said))
    assert cap < max(lengths_seen) < cap * 6


def test_a_few_steps_teach_it_one_utterance():
    torch.manual_seed(0)
    made = TransformerTransducer(3, 5, width=8, heads=2, feedforward=6, audio_layers=1, label_layers=1, dropout=0.0)
    audio, lengths = speech()
    audio, targets = audio.float(), torch.tensor([[2, 0, 3], [1, 1, 0]])
    labels = torch.tensor([3, 2])
    optimizer = torch.optim.Adam(made.parameters(), lr=0.03)
    for _ in range(50):
        optimizer.zero_grad()
        rnnt_loss(made(audio, lengths, targets), targets, lengths, labels).mean().backward()
        optimizer.step()
    said, count = made.transcribe(audio, lengths)
    assert count.tolist() == [3, 2]
    assert said.tolist() == [[2, 0, 3], [1, 1, 4]]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("num_features", 0), ("num_classes", 1), ("width", 7), ("heads", 3), ("dropout", 1.0), ("audio_left", -1)],
)
def test_a_model_that_cannot_be_is_refused(name, wrong):
    sizes = {"num_features": 3, "num_classes": 5, "width": 8, "heads": 2} | {name: wrong}
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        TransformerTransducer(**sizes)


def test_wrong_audio_and_labels_are_refused():
    made, (audio, lengths) = model(), speech()
    with pytest.raises(ValueError, match=r"^audio: expected \(batch, frames, 3\)"):
        made.encode_audio(audio[..., :2], lengths)
    with pytest.raises(ValueError, match=r"^audio_lengths: "):
        made.encode_audio(audio, lengths[:1])
    with pytest.raises(ValueError, match=r"^targets: "):
        made.encode_labels(torch.zeros(2, 3))
