"""Checkpoint diffusion: permuted networks are the same functions, and exact posteriors sample exact updates."""

import pytest
import torch
from torch import nn

from lossary.diffusion import CheckpointDiffusion, CheckpointTransformer, ParameterTokenizer, permute_hidden_units
from lossary.diffusion._process import cosine, flow, variance_preserving
from lossary.diffusion._samplers import ancestral

SIZES = (3, 5, 4, 2)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network() -> nn.Sequential:
    layers = [nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)]
    return nn.Sequential(*layers).double()


def output(theta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    net = network()
    nn.utils.vector_to_parameters(theta, net.parameters())
    return net(x).detach()


def test_a_permuted_network_is_the_same_function():
    count = sum(p.numel() for p in network().parameters())
    theta, later = torch.randn(2, 6, count, generator=rng(), dtype=torch.float64).unbind()
    moved, moved_later = permute_hidden_units(theta, later, sizes=SIZES, generator=rng(1))
    x = torch.randn(7, 3, generator=rng(2), dtype=torch.float64)
    for a, b in ((theta, moved), (later, moved_later)):
        for one, other in zip(a, b):
            torch.testing.assert_close(output(other, x), output(one, x))
    assert (moved != theta).any(1).all()
    torch.testing.assert_close(moved.sort(-1).values, theta.sort(-1).values)
    # the same orders for both: what lies between two checkpoints moves along
    torch.testing.assert_close(
        permute_hidden_units(later - theta, sizes=SIZES, generator=rng(1))[0], moved_later - moved
    )
    assert len({tuple(row) for row in (moved[:, -2:] - theta[:, -2:]).tolist()}) == 1  # the last biases stay
    numbers = torch.arange(float(count)).expand(3000, -1)
    first = permute_hidden_units(numbers, sizes=SIZES, generator=rng(3))[0][:, 15]  # the bias of the first unit
    assert torch.bincount(first.long() - 15, minlength=5).tolist() == pytest.approx([600] * 5, abs=80)


def test_replicas_have_generators_of_their_own():
    theta = torch.randn(2, 4, 54, generator=rng())
    stacked = permute_hidden_units(theta, sizes=SIZES, generator=[rng(5), rng(6)])[0]
    torch.testing.assert_close(stacked[1], permute_hidden_units(theta[1], sizes=SIZES, generator=rng(6))[0])


def test_tokens_are_the_layers_in_chunks():
    tokenizer = ParameterTokenizer((3, 5, 2), 8, chunk=6, vectors=2).double()
    assert tokenizer.pieces == [6, 6, 3, 5, 6, 4, 2]
    theta, other = torch.randn(2, 4, 32, generator=rng(), dtype=torch.float64).unbind()
    tokens = tokenizer.encode(theta, other)
    weights = [encoder.weight for encoder in tokenizer.encoders]
    torch.testing.assert_close(tokens[:, 2], theta[:, 12:15] @ weights[2].T)
    torch.testing.assert_close(tokens[:, 7 + 4], other[:, 20:26] @ weights[11].T)
    assert (tokenizer.decode(tokens) == 0).all()
    for decoder in tokenizer.decoders:
        nn.init.normal_(decoder.weight, generator=rng(1))
    by_hand = torch.cat([tokens[:, i] @ d.weight.T for i, d in enumerate(tokenizer.decoders)], dim=1)
    torch.testing.assert_close(tokenizer.decode(tokens), by_hand)


def test_the_transformer_sees_everything_and_decodes_the_noised_vector():
    torch.manual_seed(0)
    net = CheckpointTransformer((2, 4, 1), width=16, depth=1, heads=2, chunk=3)
    nn.init.normal_(net.place, std=0.5)
    for decoder in net.tokenizer.decoders:
        nn.init.normal_(decoder.weight)
    given = [torch.randn(3, 17), torch.rand(3), torch.randn(3, 17), torch.rand(3), torch.rand(3)]
    base = net(*given)
    assert base.shape == (3, 17)
    for i, part in enumerate(given):
        assert (net(*given[:i], part + 0.1, *given[i + 1 :]) - base).abs().max() > 1e-4
    base.sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    angle = 0.25 * net.frequencies
    assert net.frequencies.tolist() == pytest.approx([2 ** (14 * k / 15) for k in range(16)])
    seen = {}
    net.scalars[2].register_forward_hook(lambda _, inputs, out: seen.update(prompt=inputs[0]))
    net(*given[:4], torch.full((3,), 0.25))
    torch.testing.assert_close(seen["prompt"][0], torch.cat([angle.sin(), angle.cos(), torch.tensor([0.25])]))


@pytest.mark.parametrize("process", [variance_preserving(), cosine()])
def test_the_loss_by_hand(process):
    def net(x, t, theta, loss, prompt):
        return x.sin() * t[:, None] + theta * (prompt - loss)[:, None]

    theta, target = torch.randn(2, 6, 4, generator=rng(), dtype=torch.float64).unbind()
    loss, prompt = torch.rand(2, 6, generator=rng(1), dtype=torch.float64).unbind()
    found = CheckpointDiffusion(net, scale=3.0, process=process).loss(theta, target, loss, prompt, generator=rng(2))
    g = rng(2)
    t = 1e-3 + (1 - 1e-3) * torch.rand(6, generator=g, dtype=torch.float64)
    x = process.alpha(t)[:, None] * 3 * target
    x = x + process.sigma(t)[:, None] * torch.randn(6, 4, generator=g, dtype=torch.float64)
    expected = ((net(x, t, 3 * theta, loss, prompt) + 3 * theta - 3 * target) ** 2).mean(1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("sampler", [None, ancestral])
def test_with_exact_predictions_updates_have_the_right_law(sampler):
    """theta* | theta, prompt ~ N(theta + prompt, 0.4^2): the clean prediction is then known in closed form."""
    process, scale, spread = variance_preserving(), 2.0, 0.4

    def net(x, t, theta, loss, prompt):
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        mean, variance = theta + scale * prompt[:, None], (scale * spread) ** 2
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        return mean + gain * (x - alpha * mean) - theta

    n = 4000
    theta = torch.tensor([1.0, -2.0], dtype=torch.float64).expand(n, -1)
    prompt = torch.full((n,), 0.3, dtype=torch.float64)
    named = {} if sampler is None else {"sampler": sampler}
    found = CheckpointDiffusion(net, scale=scale).sample(theta, 0 * prompt, prompt, steps=200, generator=rng(), **named)
    torch.testing.assert_close(found.mean(0), theta[0] + 0.3, atol=0.03, rtol=0)
    torch.testing.assert_close(found.std(0), torch.full((2,), spread, dtype=torch.float64), atol=0.02, rtol=0)


@pytest.mark.parametrize("process", [variance_preserving(), cosine(), flow()])
def test_processes_that_end_in_noise_alone_are_sampled_in_single_precision(process):
    """theta* ~ N(theta + prompt, 0.4^2) again; at time 1 sigma / alpha would be huge or infinite."""
    scale = torch.tensor([[[2.0]], [[0.5]]])  # of two replicas

    def net(x, t, theta, loss, prompt):
        alpha, sigma = process.alpha(t)[..., None], process.sigma(t)[..., None]
        mean, variance = theta + scale * prompt[..., None], (0.4 * scale) ** 2
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        return mean + gain * (x - alpha * mean) - theta

    theta, prompt = torch.tensor([1.0, -2.0]).expand(2, 2000, -1), torch.full((2, 2000), 0.3)
    model = CheckpointDiffusion(net, scale=scale, process=process)
    found = model.sample(theta, 0 * prompt, prompt, steps=200, generator=[rng(), rng(1)])
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.mean(1), (theta + 0.3)[:, 0], atol=0.04, rtol=0)
    torch.testing.assert_close(found.std(1), torch.full((2, 2), 0.4), atol=0.03, rtol=0)
    assert torch.equal(model.state_dict()["scale"], scale)


def test_training_finds_the_way_down():
    """Checkpoints of gradient descent on a bowl: asked for less, the transformer's update ends nearer the bottom."""
    torch.manual_seed(0)
    directions = nn.functional.normalize(torch.randn(200, 3, generator=rng()), dim=1)
    radii = torch.tensor([1.0, 0.6, 0.3, 0.1])
    model = CheckpointDiffusion(CheckpointTransformer((2, 1), width=16, depth=1, heads=2, max_log2=3.0), scale=1.0)
    optimizer, g = torch.optim.Adam(model.parameters(), lr=0.01), rng(1)
    for _ in range(150):
        run = torch.randint(200, (64,), generator=g)
        last = torch.randint(1, 4, (64,), generator=g)
        theta, target = directions[run], directions[run] * radii[last][:, None]
        optimizer.zero_grad()
        model.loss(theta, target, torch.ones(64), radii[last] ** 2, generator=g).mean().backward()
        optimizer.step()
    start = nn.functional.normalize(torch.randn(50, 3, generator=rng(9)), dim=1)
    norms = [
        model.sample(start, torch.ones(50), torch.full((50,), r**2), steps=10, generator=rng()).norm(dim=1).mean()
        for r in (0.1, 0.6)
    ]
    assert norms[1] < 0.75  # starts have norm 1
    assert norms[0] < 0.7 * norms[1]


def test_refusals():
    x, one = torch.zeros(2, 7), torch.ones(2)
    model = CheckpointDiffusion(nn.Identity())
    for call, message in (
        (lambda: permute_hidden_units(x, sizes=(1, 3, 1)), "parameters: expected 10 numbers"),
        (lambda: permute_hidden_units(sizes=(1, 2, 1)), "parameters: expected at least one"),
        (lambda: permute_hidden_units(x, x[:1], sizes=(1, 2, 1)), "parameters: expected shape"),
        (lambda: permute_hidden_units(x, sizes=(7,)), "sizes: expected at least two"),
        (lambda: ParameterTokenizer((1, 2), 0), "width: expected a whole number"),
        (lambda: CheckpointTransformer((1, 2), width=10, heads=4), "width: expected a multiple of heads"),
        (lambda: CheckpointDiffusion(nn.Identity(), scale=0.0), "scale: expected a number > 0"),
        (lambda: model.loss(x, x[:1], one, one), "target: expected shape"),
        (lambda: model.sample(x, one, one[:1]), "prompt: expected shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
