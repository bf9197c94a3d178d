"""LongAlign against transformers' CLIP sentence by sentence, orthogonal projections, and gradients step by step."""

import json
from types import SimpleNamespace

import pytest
import torch

from lossary.diffusion import (
    ReweightedPreferenceLoss,
    decompose_preference,
    segment_encode,
    segment_mean,
    spaced_gradients,
    split_segments,
)
from lossary.diffusion._samplers import euler, karras_sigmas


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_sentences():
    prompts = ["One? Two!  Three; four", "a.b", "...", "", "no end"]
    segments, index = split_segments(prompts)
    assert segments == ["One.", "Two.", "Three.", "four.", "a.", "b.", "...", "", "no end."]
    assert index.tolist() == [0, 0, 0, 0, 1, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP text encoder with 8 tokens of room, random weights and an alphabet for a vocabulary."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(97, 123)] + ["."]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8, unk_token="<|endoftext|>"
    )
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    torch.manual_seed(0)
    return tokenizer, transformers.CLIPTextModel(config).eval()


def test_each_sentence_is_encoded_alone(clip):
    """Letters are tokens: start, letters, stop; of "abcdefgh." start and six letters have room before the end."""
    tokenizer, model = clip
    prompts = ["ab. c", "", "abcdefgh"]
    found = segment_encode(prompts, tokenizer, model, length=12)
    assert found.shape == (3, 12, 16)
    start, end = len(tokenizer) - 2, len(tokenizer) - 1

    def states(*letters):
        ids = [start, *(tokenizer.convert_tokens_to_ids(letter) for letter in letters), end]
        with torch.no_grad():
            return model(torch.tensor([ids])).last_hidden_state[0, :-1]

    with torch.no_grad():
        filler = model(torch.tensor([[start] + 7 * [end]])).last_hidden_state[0].mean(0)
    expected = [
        torch.cat([states("a", "b</w>", ".</w>"), states("c</w>", ".</w>")]),
        states(),
        states(*"abcdef"),
    ]
    for row, own in zip(found, expected):
        torch.testing.assert_close(row[: len(own)], own)
        torch.testing.assert_close(row[len(own) :], filler.expand(12 - len(own), -1))
    short = segment_encode(prompts, tokenizer, model, length=5)
    torch.testing.assert_close(short, found[:, :5])
    alone = segment_encode(["c. ab"], tokenizer, model, length=7)[0]
    torch.testing.assert_close(alone[:3], expected[0][4:])  # order of the sentences does not matter to their states
    assert not found.requires_grad


def test_what_fills_up_is_the_end_of_the_padding():
    class Tokenizer:
        model_max_length, pad_token_id, eos_token_id = 77, 0, 2

        def __call__(self, texts, *, padding, **room):
            return SimpleNamespace(input_ids=torch.arange(77 if padding == "max_length" else 3)[None])

    found = segment_encode(["a"], Tokenizer(), lambda ids: [ids[..., None].double()], length=4)[0, :, 0]
    assert found.tolist() == [1.0, 46.5, 46.5, 46.5]  # the mean of 17 to 76


def test_means_of_unit_segments():
    embeddings, index = 3 * torch.randn(6, 4, generator=rng()), torch.tensor([1, 0, 1, 3, 1, 0])
    found = segment_mean(embeddings, index)
    for prompt in range(4):
        own = [e / e.norm() for e, i in zip(embeddings, index) if i == prompt]
        expected = sum(own) / len(own) if own else torch.zeros(4)
        torch.testing.assert_close(found[prompt], expected)
    assert segment_mean(embeddings, index, prompts=6)[4:].abs().sum() == 0


def test_parts_are_those_of_a_rotation():
    """In a basis whose first vector is the common direction, the first coordinate is the irrelevant part."""
    text = 0.5 + torch.randn(5, 4, generator=rng(), dtype=torch.float64)
    image = torch.randn(5, 4, generator=rng(1), dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([text.mean(0)[:, None], torch.eye(4)[:, :3]], dim=1)).Q
    turned, seen = text @ basis, (image / image.norm(dim=1, keepdim=True)) @ basis
    relevant, irrelevant = decompose_preference(image, text)
    torch.testing.assert_close(irrelevant, turned[:, 0] * seen[:, 0])
    torch.testing.assert_close(relevant, (turned[:, 1:] * seen[:, 1:]).sum(1))
    for weight in (0.0, 0.3, 1.0):
        loss = ReweightedPreferenceLoss(weight)(image, text)
        direct = text - (1 - weight) * turned[:, :1] * basis[:, 0]
        scores = (direct * (image / image.norm(dim=1, keepdim=True))).sum(1)
        torch.testing.assert_close(loss, (1 - scores) / 2)
    cosine = torch.nn.functional.cosine_similarity(image, text / text.norm(dim=1, keepdim=True))
    unit = ReweightedPreferenceLoss(1.0)(image, text / text.norm(dim=1, keepdim=True))
    torch.testing.assert_close(unit, (1 - cosine) / 2)


def test_gradients_go_to_images_alone_and_ignore_their_size():
    text, image = (torch.randn(4, 3, generator=rng(s), dtype=torch.float64).requires_grad_() for s in (0, 1))
    ReweightedPreferenceLoss()(image, text).sum().backward()
    assert text.grad is None
    torch.testing.assert_close((image.grad * image).sum(-1), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    slope = image.grad.clone()
    image.grad = None
    ReweightedPreferenceLoss(0.0)(image, text).sum().backward()
    v = text.mean(0) / text.mean(0).norm()
    x = image / image.norm(dim=1, keepdim=True)
    along = (text @ v)[:, None] * v
    common = (along - (along * x).sum(1, keepdim=True) * x) / image.norm(dim=1, keepdim=True)
    torch.testing.assert_close(slope, image.grad - 0.15 * common.detach())


def test_replicas_and_a_mean_from_elsewhere():
    text, image = torch.randn(2, 3, 5, 4, generator=rng()).unbind()
    loss = ReweightedPreferenceLoss(0.3)
    for s in range(3):
        torch.testing.assert_close(loss(image, text)[s], loss(image[s], text[s]))
    halves = [loss(image[0, half], text[0, half], common=7 * text[0].mean(0)) for half in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(torch.cat(halves), loss(image[0], text[0]))
    alone = loss(image[0, :1], text[0, :1], common=text[0].mean(0))
    torch.testing.assert_close(alone, loss(image[0], text[0])[:1])


@pytest.mark.parametrize("offset", [0, 2])
def test_gradients_of_the_chosen_steps(offset):
    """x_0 is linear in the noises that the network said; only steps `offset`, `offset` + 3, ... are asked to change."""
    shift, sigmas = torch.zeros(8, dtype=torch.float64, requires_grad=True), karras_sigmas(8, low=0.1, high=5.0)
    asked = []

    def denoise(x, sigma):
        step = int((sigmas - sigma).abs().argmin())
        asked.append(torch.is_grad_enabled())
        return x - sigma * (torch.sin(x) + shift[step])

    start = torch.ones(1, dtype=torch.float64, requires_grad=True)
    x = euler(spaced_gradients(denoise, sigmas, every=3, offset=offset), start, sigmas)
    x.backward()
    widths = sigmas[:-1] - sigmas[1:]
    chosen = torch.arange(8) % 3 == offset
    torch.testing.assert_close(shift.grad, torch.where(chosen, -widths, 0.0))
    assert asked == chosen.tolist()
    assert start.grad.item() == pytest.approx(1.0)
    torch.testing.assert_close(x.detach(), euler(denoise, start, sigmas).detach())
    asked.clear()
    with torch.no_grad():
        euler(spaced_gradients(denoise, sigmas), start, sigmas)
    assert asked == [False] * 8


def test_other_precisions():
    text, image = torch.randn(2, 5, 4, generator=rng()).bfloat16().unbind()
    found = ReweightedPreferenceLoss()(image, text)
    assert found.dtype is torch.bfloat16
    assert found.isfinite().all()
    assert ReweightedPreferenceLoss()(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [0.5, 0.5]


def test_refusals():
    z, sigmas = torch.zeros(2, 3), torch.tensor([2.0, 1.0, 0.0])
    for call, message in (
        (lambda: split_segments("one prompt"), "prompts: expected a list"),
        (lambda: split_segments([]), "prompts: expected a list"),
        (lambda: segment_encode(["a"], None, None, length=0), "length: expected a whole number >= 1"),
        (lambda: segment_mean(z, torch.zeros(3, dtype=torch.long)), "index: expected shape"),
        (lambda: decompose_preference(z, z[:1]), "text: expected shape"),
        (lambda: decompose_preference(z, z, common=z), "common: expected shape"),
        (lambda: decompose_preference(z[:1], z[:1]), "common: expected a mean of texts for a batch of 1"),
        (lambda: ReweightedPreferenceLoss()(z[:0], z[:0]), "common: expected a mean of texts for a batch of 0"),
        (lambda: ReweightedPreferenceLoss(1.5), "weight: expected a number"),
        (lambda: spaced_gradients(None, sigmas[:1]), "sigmas: expected at least 2 levels"),
        (lambda: spaced_gradients(None, sigmas, every=2, offset=2), "offset: expected a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
