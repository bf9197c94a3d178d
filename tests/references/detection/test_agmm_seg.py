"""AGMM against slow loops over images, classes and pixels, in the order of the official code, and worked cases."""

import math

import pytest
import torch

from lossary.detection import (
    absent_class_loss,
    agmm_loss,
    center_separation_loss,
    class_centers,
    gmm_maximization_loss,
    gmm_response,
    gmm_self_supervision_loss,
)

B, D, K, SIZE = 2, 5, 4, 6


@pytest.fixture
def scene():
    """Features, logits and sparse labels of two images: classes 0, 1 and 3, and classes 1 and 2."""
    g = torch.Generator().manual_seed(0)
    features = torch.randn(B, D, SIZE, SIZE, generator=g, dtype=torch.float64)
    logits = torch.randn(B, K, SIZE, SIZE, generator=g, dtype=torch.float64)
    labels = torch.full((B, SIZE, SIZE), 255)
    for image, row, column, label in (
        (0, 0, 1, 0),
        (0, 2, 2, 0),
        (0, 5, 5, 1),
        (0, 4, 0, 3),
        (1, 1, 1, 1),
        (1, 3, 5, 2),
    ):
        labels[image, row, column] = label
    return features, logits, labels


def slowly(features, logits, labels, image):
    """The five terms of one image, without the separation of centres, and its centres."""
    f, p, y = features[image], logits[image].softmax(0), labels[image].tolist()
    pixels = [(r, c) for r in range(SIZE) for c in range(SIZE)]
    known = {k: [(r, c) for r, c in pixels if y[r][c] == k] for k in range(K)}
    known = {k: at for k, at in known.items() if at}
    centers = {k: sum(f[:, r, c] for r, c in at) / len(at) for k, at in known.items()}

    def response(k, r, c):
        return math.exp(-((sum(abs(float(a - b)) for a, b in zip(f[:, r, c], centers[k])) / D) ** 2))

    def entropy(guess, truth):
        return -truth * math.log(guess + 1e-6) - (1 - truth) * math.log(1 - guess + 1e-6)

    labelled = [(r, c) for at in known.values() for r, c in at]
    seen = sum(-math.log(p[y[r][c], r, c]) for r, c in labelled) / len(labelled)
    soft = [sum(entropy(float(p[k, r, c]), response(k, r, c)) for k in known) / len(known) / 2 for r, c in pixels]
    sharp = [sum(entropy(response(k, r, c), y[r][c] == k) for k in known) / len(known) / 2 for r, c in labelled]
    absent = [sum(-math.log(1 - p[k, r, c] + 1e-6) for k in range(K) if k not in known) for r, c in pixels]
    return [seen, sum(soft) / SIZE**2, sum(sharp) / len(labelled), sum(absent) / SIZE**2], centers


def test_every_term_by_loops(scene):
    features, logits, labels = scene
    centers, present = class_centers(features, labels, K)
    response = gmm_response(features, centers, present)
    assert present.tolist() == [[True, True, False, True], [False, True, True, False]]
    assert response[~present].abs().max() == 0
    for image in range(B):
        (_, soft, sharp, absent), slow_centers = slowly(*scene, image)
        for k, center in slow_centers.items():
            torch.testing.assert_close(centers[image, k], center)
        assert gmm_self_supervision_loss(logits, response, present)[image].item() == pytest.approx(soft, rel=1e-9)
        assert gmm_maximization_loss(response, labels, present)[image].item() == pytest.approx(sharp, rel=1e-9)
        assert absent_class_loss(logits, present)[image].item() == pytest.approx(absent, rel=1e-9)


def test_the_whole_is_the_sum_of_its_terms(scene):
    (first, at_first), (second, at_second) = slowly(*scene, 0), slowly(*scene, 1)
    means = [at_first[0], (at_first[1] + at_second[1]) / 2, at_second[2], at_first[3]]
    pairs = [(i, j) for i in range(4) for j in range(i)]
    apart = sum(math.exp(-((means[i] - means[j]).abs().mean().item() ** 2)) for i, j in pairs) / len(pairs)
    assert agmm_loss(*scene).tolist() == pytest.approx([sum(first) + apart, sum(second) + apart], rel=1e-9)


def test_features_of_half_the_size_are_interpolated_before_centres_and_responses_after(scene):
    features, logits, labels = scene
    small = features[..., ::2, ::2]

    def enlarged(x):  # bilinear by two, as one-dimensional weights: 3/4 and 1/4, edges repeated
        for dim in (2, 3):
            before = torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 0, x.shape[dim] - 1)], dim)
            after = torch.cat([x.narrow(dim, 1, x.shape[dim] - 1), x.narrow(dim, x.shape[dim] - 1, 1)], dim)
            x = torch.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], dim + 1).flatten(dim, dim + 1)
        return x

    centers, present = class_centers(enlarged(small), labels, K)
    torch.testing.assert_close(class_centers(small, labels, K)[0], centers)
    response = enlarged(gmm_response(small, centers, present))
    expected = (
        agmm_loss(enlarged(small), logits, labels)
        - gmm_self_supervision_loss(logits, gmm_response(enlarged(small), centers, present), present)
        - gmm_maximization_loss(gmm_response(enlarged(small), centers, present), labels, present)
        + gmm_self_supervision_loss(logits, response, present)
        + gmm_maximization_loss(response, labels, present)
    )
    torch.testing.assert_close(agmm_loss(small, logits, labels), expected)


def test_gradients_reach_features_and_logits_through_centres_and_responses(scene):
    features, logits, labels = scene
    inputs = (features.requires_grad_(), logits.requires_grad_())
    torch.autograd.gradcheck(lambda f, z: agmm_loss(f, z, labels), inputs, fast_mode=True)


def test_padding_is_left_out(scene):
    features, logits, labels = scene
    valid = torch.ones(B, SIZE, SIZE, dtype=torch.bool)
    valid[:, -1] = False
    labels = torch.where(valid, labels, 255)
    garbage = torch.where(valid.unsqueeze(1), logits, 50 * torch.arange(K).view(K, 1, 1).double())
    torch.testing.assert_close(
        agmm_loss(features, garbage, labels, valid=valid), agmm_loss(features, logits, labels, valid=valid)
    )
    assert not torch.allclose(agmm_loss(features, garbage, labels), agmm_loss(features, logits, labels))


def test_tags_tell_of_classes_without_labelled_pixels(scene):
    features, logits, labels = scene
    _, present = class_centers(features, labels, K)
    everything = torch.ones(B, K, dtype=torch.bool)
    expected = agmm_loss(features, logits, labels) - absent_class_loss(logits, present)
    torch.testing.assert_close(agmm_loss(features, logits, labels, tags=everything), expected)


def test_images_without_labels_only_learn_what_is_absent(scene):
    features, logits, _ = scene
    none = torch.full((B, SIZE, SIZE), -1)
    features, logits = features.float().requires_grad_(), logits.float().requires_grad_()
    loss = agmm_loss(features, logits, none)
    torch.testing.assert_close(loss, absent_class_loss(logits, torch.zeros(B, K, dtype=torch.bool)))
    loss.sum().backward()
    assert features.grad.abs().max() == 0
    assert logits.grad.isfinite().all()


def test_extreme_features_and_logits_stay_finite(scene):
    features, logits, labels = scene
    f, z = (1e4 * x.float() for x in (features, logits))
    f.requires_grad_()
    z.requires_grad_()
    loss = agmm_loss(f, z, labels)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert f.grad.isfinite().all()
    assert z.grad.isfinite().all()
    assert agmm_loss(features.bfloat16(), logits.bfloat16(), labels).isfinite().all()


def test_separation_of_one_class_is_nothing():
    assert center_separation_loss(torch.ones(2, 3, 4), torch.tensor([[True, False, False]] * 2)).item() == 0


def test_refusals(scene):
    features, logits, labels = scene
    centers, present = class_centers(features, labels, K)
    with pytest.raises(ValueError, match=r"labels: expected shape \(2, height, width\), got \(6, 6\)"):
        class_centers(features, labels[0], K)
    with pytest.raises(ValueError, match="labels: expected an int64 tensor"):
        agmm_loss(features, logits, labels.float())
    with pytest.raises(ValueError, match=r"logits: expected shape \(2, 4, 6, 6\), got \(2, 4, 6, 5\)"):
        agmm_loss(features, logits[..., :5], labels)
    with pytest.raises(ValueError, match=r"centers: expected shape \(2, 4, 5\), got \(2, 4, 3\)"):
        gmm_response(features, centers[..., :3], present)
    with pytest.raises(ValueError, match=r"present: expected bool of shape \(2, 4\), got torch.float64"):
        center_separation_loss(centers, present.double())
    with pytest.raises(ValueError, match="valid: expected bool of shape"):
        agmm_loss(features, logits, labels, valid=present)
    with pytest.raises(ValueError, match="response: expected shape"):
        gmm_self_supervision_loss(logits, logits[:, :3], present)
