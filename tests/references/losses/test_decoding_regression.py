"""Tokens against the official tests' table and exact fractions; the head against torch's Transformer and by leaves."""

import math
from fractions import Fraction
from itertools import pairwise, product

import pytest
import torch
from torch import nn

from lossary.losses import DecodingRegressionHead, constrained_decode, digit_detokenize, digit_tokenize


def doubles(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize(
    ("number", "written", "back"),
    [
        (123.4, "++21234", 123.4),
        (12345, "++41234", 12340),
        (0.1234, "+-11234", 0.1234),
        (-123.4, "-+21234", -123.4),
        (-12345, "-+41234", -12340),
        (-0.1234, "--11234", -0.1234),
        (1.234e-9, "+-91234", 1.234e-9),
        (-1.2e-9, "--91200", -1.2e-9),
        (1.2e9, "++91200", 1.2e9),
        (1.2345e9, "++91234", 1.234e9),
        (5.0, "++05000", 5.0),
        (-1.0, "-+01000", -1.0),
        (1.234e-10, "+-00000", 0.0),
        (-1.234e-10, "--00000", 0.0),
        (0.0, "++00000", 0.0),
        (-0.0, "++00000", 0.0),
    ],
)
def test_the_float_scheme_is_that_of_the_official_tests(number, written, back):
    """From optformer/common/serialization/numeric/tokens_test.py of google-research/optformer; 5 and -1 by hand."""
    tokens = digit_tokenize(doubles(number), base=10, digits=4, exponent_digits=1)
    assert "".join("0123456789+-"[t] for t in tokens[0]) == written
    assert digit_detokenize(tokens, base=10, exponent_digits=1).item() == pytest.approx(back, rel=1e-15)


@pytest.mark.parametrize(
    ("number", "back"), [(1000.0, 1000.0), (0.001, 0.001), (999.9999, 999.9), (1e12, 9.999e9), (-math.inf, -9.999e9)]
)
def test_powers_of_the_base_and_numbers_too_large(number, back):
    tokens = digit_tokenize(doubles(number), base=10, digits=4, exponent_digits=1)
    assert digit_detokenize(tokens, base=10, exponent_digits=1).item() == pytest.approx(back, rel=1e-14)


def test_what_is_too_small_is_nothing():
    tokens = digit_tokenize(doubles(0.49, -0.3, 0.5), base=2, digits=3, exponent_digits=1)
    assert tokens.tolist() == [[2, 3, 0, 0, 0, 0], [3, 3, 0, 0, 0, 0], [2, 3, 1, 1, 0, 0]]


@pytest.mark.parametrize(("base", "digits"), [(2, 9), (3, 5), (10, 3), (7, 1)])
def test_the_normalised_scheme_by_its_definition(base, digits):
    numbers = [0.0, 0.3137, 0.5, 0.70703125, 0.999999, 1.0, -0.2, 1.7]
    tokens = digit_tokenize(doubles(*numbers), base=base, digits=digits)
    for y, row in zip(numbers, tokens.tolist()):
        inside = min(max(Fraction(y), 0), 1 - Fraction(1, base**digits))
        assert row == [int(inside * base**k) % base for k in range(1, digits + 1)]
    assert digit_detokenize(tokens, base=base)[2].item() == pytest.approx(
        int(base**digits / 2) / base**digits, abs=1e-15
    )


@pytest.mark.parametrize(("base", "digits"), [(2, 10), (3, 6), (10, 3)])
def test_every_number_of_the_normalised_scheme_gets_its_tokens_back(base, digits):
    numbers = torch.arange(base**digits, dtype=torch.float64) / base**digits
    tokens = digit_tokenize(numbers, base=base, digits=digits)
    assert tokens.tolist() == [list(row) for row in product(range(base), repeat=digits)]
    torch.testing.assert_close(digit_detokenize(tokens, base=base), numbers, rtol=0, atol=0)


@pytest.mark.parametrize(("base", "digits", "exponent_digits"), [(10, 2, 1), (2, 4, 3), (3, 2, 2)])
def test_every_number_of_the_float_scheme_gets_its_tokens_back(base, digits, exponent_digits):
    most = base**exponent_digits - 1
    numbers = [
        s * m * float(base) ** (e - digits + 1)
        for s in (1, -1)
        for e in range(-most, most + 1)
        for m in range(base ** (digits - 1), base**digits)
    ]
    tokens = digit_tokenize(doubles(*numbers), base=base, digits=digits, exponent_digits=exponent_digits)
    back = digit_detokenize(tokens, base=base, exponent_digits=exponent_digits)
    torch.testing.assert_close(back, doubles(*numbers), rtol=1e-14, atol=0)
    assert len(tokens.unique(dim=0)) == len(numbers)
    again = digit_tokenize(back, base=base, digits=digits, exponent_digits=exponent_digits)
    assert torch.equal(again, tokens)


def head(**hyper):
    torch.manual_seed(0)
    return DecodingRegressionHead(3, **({"base": 3, "digits": 4, "width": 8, "heads": 2} | hyper)).double()


def features(n=5):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_decoder_is_torchs_transformer():
    made = head(layers=2)
    written = torch.tensor([[0, 2, 1], [1, 1, 0], [2, 2, 2], [0, 0, 1], [1, 2, 0]])
    x = nn.functional.embedding(written, made.token.weight)
    x = torch.cat([nn.functional.linear(features(), made.start.weight, made.start.bias)[:, None], x], 1)
    x = x + made.place.weight[None, :4]
    for layer in made.layers:
        peer = nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True, layer_norm_eps=1e-6).double()
        peer.self_attn.load_state_dict(
            {
                "in_proj_weight": layer.project.weight,
                "in_proj_bias": layer.project.bias,
                "out_proj.weight": layer.merge.weight,
                "out_proj.bias": layer.merge.bias,
            }
        )
        for theirs, ours in (
            (peer.linear1, layer.dense[0]),
            (peer.linear2, layer.dense[2]),
            (peer.norm1, layer.after_attention),
            (peer.norm2, layer.after_dense),
        ):
            theirs.load_state_dict(ours.state_dict())
        x = peer(x, src_mask=nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64), is_causal=True)
    torch.testing.assert_close(made(features(), written), made.output(x), rtol=0, atol=1e-12)


def test_the_leaves_are_products_of_digit_probabilities_and_the_density_integrates_to_one():
    made = head()
    centre, log_p = made.leaves(features())
    torch.testing.assert_close(centre, (torch.arange(81).double() + 0.5) / 81, rtol=0, atol=1e-15)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(5).double(), rtol=0, atol=1e-12)
    for leaf, digits in ((0, (0, 0, 0, 0)), (47, (1, 2, 0, 2)), (80, (2, 2, 2, 2))):
        for b in range(5):
            expected = 0.0
            for k, digit in enumerate(digits):
                logits = made(features()[b : b + 1], torch.tensor([digits[:k]], dtype=torch.int64))[0, -1]
                expected += (logits[digit] - logits.logsumexp(0)).item()
            assert log_p[b, leaf].item() == pytest.approx(expected, abs=1e-12)
    y = torch.full((5,), 47.3 / 81, dtype=torch.float64)
    torch.testing.assert_close(made.loss(features(), y), -log_p[:, 47], rtol=0, atol=1e-12)
    torch.testing.assert_close(made.log_prob(features(), y), log_p[:, 47] + math.log(81), rtol=0, atol=1e-12)


def test_the_float_schemes_masses_and_widths():
    """All 2 * 2 * 4 * 4 token sequences have mass 1; a density is the mass over the gap to the next larger number."""
    made = head(base=2, digits=2, exponent_digits=2)
    phi = features(1)
    signs = [(s, e) for s in (2, 3) for e in (2, 3)]
    every = torch.tensor([[*s, *rest] for s in signs for rest in product(range(2), repeat=4)])
    log_p = made(phi.expand(len(every), 3), every[:, :-1]).log_softmax(-1)
    mass = log_p.gather(-1, every.unsqueeze(-1)).squeeze(-1).sum(-1)
    torch.testing.assert_close(mass.exp().sum(), doubles(1.0)[0], rtol=0, atol=1e-12)

    grid = sorted(m * 2.0 ** (e - 1) for e in range(-3, 4) for m in (2, 3))
    for n, (y, above) in enumerate(pairwise(grid)):
        for sign in (1, -1):
            inside = doubles(sign * (0.4 * y + 0.6 * above))
            code = digit_tokenize(inside, base=2, digits=2, exponent_digits=2)
            expected = mass[(every == code).all(-1)].item() - math.log(above - y)
            assert made.log_prob(phi, inside).item() == pytest.approx(expected, abs=1e-12), n
    small = made.log_prob(phi, doubles(0.05)) - made.log_prob(phi, doubles(0.1))
    assert small.item() == 0
    assert made.loss(phi, doubles(0.05)).item() == pytest.approx(
        -made.log_prob(phi, doubles(0.05)).item() - math.log(1 / 8), abs=1e-12
    )


def test_signs_and_digits_stand_in_their_places_only():
    made = head(base=2, digits=2, exponent_digits=1)
    logits = made(features(), torch.tensor([[2, 3, 0, 1]] * 5))
    expected = torch.tensor([[False, False, True, True]] * 2 + [[True, True, False, False]] * 3)
    assert torch.equal(logits.isfinite(), expected.expand(5, 5, 4))


def test_samples_follow_the_density():
    made = head(base=2, digits=3)
    phi = features(2)
    drawn = made.sample(phi, 4000, generator=torch.Generator().manual_seed(2))
    assert drawn.shape == (4000, 2)
    _, log_p = made.leaves(phi)
    for b in range(2):
        share = (drawn[:, b, None] * 8).floor().eq(torch.arange(8)).double().mean(0)
        p = log_p[b].exp()
        assert ((share - p).abs() < 4.5 * (p * (1 - p) / 4000).sqrt()).all()
    within = drawn * 8 % 1
    assert abs(within.mean().item() - 0.5) < 4.5 * math.sqrt(1 / 12 / 8000)
    cold = made.sample(phi, 50, generator=torch.Generator().manual_seed(2), temperature=1e-5)
    spelled = digit_tokenize(cold, base=2, digits=3)
    assert (spelled == spelled[0]).all()


def test_samples_of_the_float_scheme_lie_where_their_tokens_say():
    made = head(base=2, digits=2, exponent_digits=1)
    phi = features(1).expand(300, 3)
    drawn = made.sample(phi, 1, generator=torch.Generator().manual_seed(3))[0]
    tokens = constrained_decode(
        lambda written: made(phi, written)[:, -1], made.allowed, 300, generator=torch.Generator().manual_seed(3)
    )
    sound = (tokens[:, 3] == 1) & ~((tokens[:, 1] == 3) & (tokens[:, 2] == 0))  # no leading zero, no exponent -0
    assert (drawn[sound] < 0).any()
    assert (drawn[sound] > 0).any()
    again = digit_tokenize(drawn[sound], base=2, digits=2, exponent_digits=1)
    assert torch.equal(again, tokens[sound])
    assert made.log_prob(phi, drawn).isfinite().all()


@pytest.mark.parametrize("estimate", ["mean", "median", "mode"])
def test_predictions_by_leaves_and_by_samples(estimate):
    made = head()
    centre, log_p = made.leaves(features())
    got = made.predict(features(), estimate)
    for b in range(5):
        p, total = log_p[b].exp().tolist(), 0.0
        if estimate == "mean":
            expected = math.fsum(c * q for c, q in zip(centre.tolist(), p))
        elif estimate == "mode":
            expected = (p.index(max(p)) + 0.5) / 81
        else:
            for leaf, q in enumerate(p):
                total += q
                if total >= 0.5:
                    expected = (leaf + 0.5) / 81
                    break
        assert got[b].item() == pytest.approx(expected, abs=1e-12)
    if estimate != "mode":
        sampled = made.predict(features(), estimate, samples=4000, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(sampled, got, rtol=0, atol=0.06)


def test_constrained_decoding_takes_the_likeliest_or_draws_among_the_allowed():
    table = torch.tensor([[0.0, 1.0, 5.0], [3.0, 2.0, 1.0], [0.0, 0.5, 0.0]])
    allowed = torch.tensor([[True, True, False], [False, True, True], [True, True, True]])

    def step(written):
        return table[written.shape[1]].expand(len(written), 3)

    assert constrained_decode(step, allowed, 2).tolist() == [[1, 1, 1], [1, 1, 1]]
    drawn = constrained_decode(step, allowed, 5000, generator=torch.Generator().manual_seed(0), temperature=2.0)
    assert (drawn[:, 0] != 2).all()
    assert (drawn[:, 1] != 0).all()
    share = (drawn[:, 0] == 1).double().mean().item()
    assert share == pytest.approx(1 / (1 + math.exp(-0.5)), abs=4.5 * math.sqrt(0.25 / 5000))


def test_it_learns_the_shares_of_the_bins():
    """The likeliest decoder of a sample is its histogram."""
    torch.manual_seed(0)
    made = DecodingRegressionHead(1, base=2, digits=2, width=8)
    y = torch.tensor([0.1] * 5 + [0.3] * 1 + [0.6] * 3 + [0.9] * 1)
    phi = torch.ones(10, 1)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.05)
    for _ in range(80):
        optimizer.zero_grad()
        made.loss(phi, y).mean().backward()
        optimizer.step()
    _, log_p = made.leaves(phi[:1])
    torch.testing.assert_close(log_p.exp()[0], torch.tensor([0.5, 0.1, 0.3, 0.1]), rtol=0, atol=0.01)


def test_leading_dimensions_and_dtypes():
    made, y = head(), torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
    phi = features(6)
    torch.testing.assert_close(made.loss(phi.view(2, 3, 3), y.view(2, 3)), made.loss(phi, y).view(2, 3))
    torch.testing.assert_close(made.leaves(phi.view(2, 3, 3))[1], made.leaves(phi)[1].view(2, 3, 81))
    assert made.loss(phi[0], y[0]).shape == ()
    half = made.bfloat16()
    assert half.log_prob(phi.bfloat16(), y).dtype == torch.bfloat16
    assert half.log_prob(phi.bfloat16(), y).isfinite().all()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("y", lambda h, x: digit_tokenize(x.long())),
        ("base", lambda h, x: digit_tokenize(x, base=1)),
        ("digits", lambda h, x: digit_tokenize(x, base=2, digits=53)),
        ("exponent_digits", lambda h, x: digit_tokenize(x, exponent_digits=0)),
        ("exponent_digits", lambda h, x: digit_tokenize(x, exponent_digits=3)),
        ("tokens", lambda h, x: digit_detokenize(x)),
        ("tokens", lambda h, x: digit_detokenize(torch.zeros(2, 3).long(), exponent_digits=1)),
        ("allowed", lambda h, x: constrained_decode(lambda w: x, x, 3)),
        ("step", lambda h, x: constrained_decode(lambda w: x, torch.ones(2, 2).bool(), 3)),
        ("temperature", lambda h, x: constrained_decode(lambda w: x, torch.ones(2, 2).bool(), 3, temperature=0.0)),
        ("width", lambda h, x: head(width=7)),
        ("layers", lambda h, x: head(layers=0)),
        ("features", lambda h, x: h.loss(x, x)),
        ("y", lambda h, x: h.loss(features(), x)),
        ("written", lambda h, x: h(features(), torch.zeros(5, 4).long())),
        ("estimate", lambda h, x: h.predict(features(), "middle")),
        ("samples", lambda h, x: h.predict(features(), "mode", samples=3, generator=torch.Generator())),
        ("samples", lambda h, x: h.predict(features(), samples=3)),
        ("n", lambda h, x: h.sample(features(), 0, generator=torch.Generator())),
        ("exponent_digits", lambda h, x: head(exponent_digits=1).leaves(features())),
    ],
)
def test_what_does_not_fit_is_refused(name, call):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        call(head(), torch.ones(4, dtype=torch.float64))
