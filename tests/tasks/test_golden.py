"""Golden numbers: a task whose numbers move needs a new version, or verdicts that rest on it would not be stale.

Raise the version at the task's `@task` and here, together with the numbers.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lossary import tasks
from lossary.diffusion._discrete import absorbing
from lossary.diffusion._distil import OneStepGenerator, ScoreDistillation, log_uniform
from lossary.tasks import Data, Seeds

SEEDS = Seeds((0, 7))


def checksum(*tensors: Tensor) -> float:
    """A sum that depends on every value and its place."""
    flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    return float(flat @ torch.cos(torch.arange(len(flat), dtype=torch.float64)))


def of_data(data: Data) -> float:
    return checksum(data.x, data.y) if data.group is None else checksum(data.x, data.y, data.group)


def of_parts(result: object) -> float:
    return checksum(*(value for value in vars(result).values() if isinstance(value, Tensor)))


def of_model(model: nn.Module) -> float:
    return checksum(*model.parameters())


def scored() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 50, 3, generator=generator), torch.randint(3, (2, 50), generator=generator)


def trained() -> nn.Module:
    data = tasks.digits()
    model = tasks.stacked_mlp((64, 16, 10), SEEDS).double()
    tasks.fit(model, data.x.double(), data.y, loss=tasks.cross_entropy, seeds=SEEDS, steps=30)
    return model


def sharpness() -> Tensor:
    x, y = tasks.wine().x.double().expand(2, -1, -1), tasks.wine().y.expand(2, -1)
    model = tasks.stacked_mlp((13, 8, 3), SEEDS, activation="tanh").double()
    return tasks.top_hessian_eigenvalue(model, x, y, loss=tasks.cross_entropy, seeds=SEEDS, iterations=40)


def targets() -> Tensor:
    return torch.arange(200) % 4


def heads() -> tuple[nn.Module, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tasks.conv_head(4, 2, generator=generator), torch.randn(2, 4, 8, 8, generator=generator)


def found() -> tuple[Tensor, Tensor]:
    """Class scores and boxes of two scenes, as a network might say them: the true boxes, shifted."""
    scenes = seen()
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 6, 6, generator=generator)
    return noise + torch.nn.functional.one_hot(scenes.labels, 6) * scenes.mask[..., None], scenes.boxes + 2 * noise[
        ..., :4
    ]


def seen() -> tasks.ShapeScenes:
    return tasks.shape_scenes(2, family="crowded", generator=SEEDS.numpy("scenes")[0])


def drift() -> float:
    """How far a step of training goes, coarsely: where a gradient is almost 0, single precision tosses the sign."""
    start = tasks.ConvDetector(generator=torch.Generator().manual_seed(0)).backbone[0][0].weight
    end = tasks.trained_detector("plain", steps=1).backbone[0][0].weight
    return round(float((end - start).detach().abs().mean()), 5)


def line() -> nn.Module:
    layer = tasks.stacked_mlp((3, 1), SEEDS).double()
    x = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = torch.Generator().manual_seed(1)
    tasks.train_detector(
        lambda rows: layer(x[:, rows]).square().mean(), layer.parameters(), n=20, steps=5, generator=order
    )
    return layer


def points() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 2, 30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()


def denoiser() -> nn.Module:
    model = tasks.stacked_denoiser(3, SEEDS, hidden=(8,)).double()
    tasks.fit_denoiser(model, lambda n, generators: (points()[0][:, :n],), seeds=SEEDS, steps=5, batch=30)
    return model


def distilled() -> nn.Module:
    players = [tasks.stacked_denoiser(2, SEEDS, hidden=(8,)).double() for _ in range(2)]
    truth, levels = tasks.uneven_ring(), log_uniform(0.1, 5.0)
    procedure = ScoreDistillation(OneStepGenerator(players[0]), players[1], truth.denoise, levels=levels)
    batch = points()[0][..., :2]
    tasks.distil(procedure, lambda generators: {"latent": batch}, seeds=SEEDS, steps=5, lr=0.002)
    return procedure


def fitted_to_the_ring() -> float:
    """How far two steps go, coarsely, as in `drift`."""
    seeds = Seeds(SEEDS.ids, smoke=True)
    networks = tasks.ring_denoiser(seeds), tasks.stacked_denoiser(2, seeds)
    end, start = (nn.utils.parameters_to_vector(network.parameters()).detach() for network in networks)
    return round(float((end - start).abs().mean()), 5)


def fitted_to_digits() -> float:
    """As `fitted_to_the_ring`."""
    seeds = Seeds(SEEDS.ids, smoke=True)
    networks = tasks.digit_student(seeds), tasks.stacked_denoiser(64, seeds, hidden=(128, 128))
    end, start = (nn.utils.parameters_to_vector(network.parameters()).detach() for network in networks)
    return round(float((end - start).abs().mean()), 5)


def learned() -> float:
    """How large the weights are after a step, coarsely, as in `drift`."""
    weight = tasks.digit_denoiser(steps=1, channels=8).network.first.weight
    return round(float(weight.abs().mean()), 3)


def judged() -> float:
    """As `learned`."""
    return round(float(tasks.digit_classifier(steps=1)[1].weight.abs().mean()), 4)


def apart() -> float:
    """How much farther noise is than digits, roughly in powers of a thousand: the judge is trained."""
    x = tasks.digit_images()[0][:500]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    digits, other = tasks.digit_distance(torch.stack([x, noise]))
    return round(float((other / digits).log() / math.log(1000)))


def languages() -> list:
    return tasks.chains(4, 5, SEEDS)


def token_net() -> nn.Module:
    return tasks.stacked_token_net(5, 5, 4, SEEDS, hidden=(8,))


def learned_tokens() -> float:
    """How far five steps go, coarsely, as in `drift`."""
    network, process = token_net(), absorbing(4)
    start = nn.utils.parameters_to_vector(network.parameters()).detach()

    def loss(network, clean, t, generators):
        logits = network(tasks.noised_tokens(process, clean, t, generators), t)
        return tasks.cross_entropy(logits, clean).mean(-1)

    tasks.fit_tokens(network, tasks.texts_of(languages()), loss=loss, seeds=SEEDS, steps=5)
    return round(float((nn.utils.parameters_to_vector(network.parameters()) - start).detach().abs().mean()), 5)


GOLDEN: dict[str, tuple[int, Callable[[], float], float]] = {
    "accuracy": (1, lambda: checksum(tasks.accuracy(*scored())), 42.04786),
    "auroc": (1, lambda: checksum(tasks.auroc(scored()[0][..., 1], scored()[1] == 1)), 82.1211963),
    "balanced_accuracy": (1, lambda: checksum(tasks.balanced_accuracy(*scored())), 44.5369778),
    "blurred_masks": (1, lambda: of_parts(tasks.blurred_masks(SEEDS, 3)), 33.461927),
    "breast_cancer": (1, lambda: of_data(tasks.breast_cancer()), 49.7896426),
    "chains": (1, lambda: sum(map(of_parts, languages())), 1.90563579),
    "conv_head": (1, lambda: of_model(heads()[0]), 0.576202202),
    "crowded_boxes": (1, lambda: of_parts(tasks.crowded_boxes(SEEDS, 3)), 156.153295),
    "dense_loss": (
        1,
        lambda: float(tasks.dense_loss(*found(), found()[0] / 2, found()[1] + 1, found()[0][..., 0])),
        9.08111572,
    ),
    "dense_predictions": (1, lambda: checksum(*tasks.dense_predictions(heads()[1], tasks.grid_points())), 143.794972),
    "detection_ap": (1, lambda: tasks.detection_ap(tasks.detections(*found()), seen()), 67.0049505),
    "detections": (1, lambda: checksum(*tasks.detections(*found(), iou_threshold=0.5)[1]), 165.537974),
    "diabetes": (1, lambda: of_data(tasks.diabetes()), 52.873351),
    "digit_classifier": (1, judged, 0.0621),
    "digit_denoiser": (1, learned, 0.183),
    "digit_distance": (1, apart, 1.0),
    "digit_images": (1, lambda: sum(checksum(*tasks.digit_images(size)) for size in (8, 16)), 301.802472),
    "digit_sets": (1, lambda: sum(map(of_data, tasks.digit_sets(SEEDS, 5, test=5))), 7.9469941),
    "digit_student": (1, fitted_to_digits, 0.0039),
    "digits": (1, lambda: of_data(tasks.digits()), 156.544383),
    "distil": (1, lambda: of_model(distilled()), 0.335753055),
    "energy_distance": (1, lambda: checksum(tasks.energy_distance(*points())), 0.280254589),
    "face_collages": (1, lambda: of_parts(tasks.face_collages(SEEDS, 1, pairs=True)), 303.663519),
    "fit": (1, lambda: of_model(trained()), -10.1835211),
    "fit_denoiser": (1, lambda: of_model(denoiser()), -0.856620435),
    "fit_tokens": (1, learned_tokens, 0.00707),
    "flip_labels": (1, lambda: checksum(*tasks.flip_labels(targets(), 0.3, SEEDS)), -7.60400379),
    "frechet_distance": (1, lambda: checksum(tasks.frechet_distance(points()[0], points()[1][0])), 0.878211688),
    "gaussian_blobs": (1, lambda: of_parts(tasks.gaussian_blobs(SEEDS, 20, classes=3, dimensions=4)), 5.97976999),
    "generated": (1, lambda: checksum(tasks.generated(torch.sin, SEEDS)), -57.9260391),
    "hide_positives": (1, lambda: checksum(tasks.hide_positives(torch.ones(50, 3), 0.5, SEEDS)), -10.3780266),
    "linear_regression_prompts": (
        1,
        lambda: of_parts(tasks.linear_regression_prompts(SEEDS, 3, noise=0.1)),
        10.0440723,
    ),
    "log_loss": (1, lambda: checksum(tasks.log_loss(*scored())), 2.11327285),
    "long_tail": (1, lambda: checksum(tasks.long_tail(targets(), 10.0, SEEDS)), -195.330346),
    "mean_average_precision": (
        1,
        lambda: checksum(tasks.mean_average_precision(scored()[0], (scored()[1].unsqueeze(-1) == torch.arange(3)))),
        60.4150111,
    ),
    "mnist5k": (1, lambda: of_data(tasks.mnist5k()), -19.7690989),
    "optdigits_writers": (1, lambda: of_data(tasks.optdigits_writers()), -188.193087),
    "page_blocks": (1, lambda: of_data(tasks.page_blocks()), 166.953796),
    "pair_error": (
        1,
        lambda: checksum(tasks.pair_error(tasks.texts_of(languages())(50, SEEDS.torch("texts")), languages())),
        24.3479205,
    ),
    "ring_denoiser": (1, fitted_to_the_ring, 0.00354),
    "ring_distance": (1, lambda: checksum(tasks.ring_distance(points()[0][..., :2].float(), SEEDS)), 0.805951687),
    "shape_scenes": (1, lambda: of_parts(seen()), -79.1263889),
    "sliced_wasserstein": (1, lambda: checksum(tasks.sliced_wasserstein(*points())), 0.538888169),
    "small_cnn": (1, lambda: of_model(tasks.small_cnn(3, generator=SEEDS.torch("init")[0])), 1.77439147),
    "split": (1, lambda: of_parts(tasks.split(tasks.digits(), SEEDS)), 1029.04148),
    "spurious_groups": (1, lambda: sum(map(of_data, tasks.spurious_groups(SEEDS))), 39.0280627),
    "stacked_denoiser": (1, lambda: of_model(tasks.stacked_denoiser(3, SEEDS, hidden=(5,))), -0.226257329),
    "stacked_token_net": (1, lambda: of_model(token_net()), 7.53146398),
    "stacked_mlp": (1, lambda: of_model(tasks.stacked_mlp((4, 5, 3), SEEDS)), 0.971097844),
    "top_hessian_eigenvalue": (1, lambda: checksum(sharpness()), 1.863413),
    "train_detector": (1, lambda: of_model(line()), 0.0359143377),
    "trained_detector": (1, drift, 0.003),
    "transformer_detector": (
        1,
        lambda: of_model(tasks.transformer_detector(generator=SEEDS.torch("init")[0], inputs=4)),
        -21.4314973,
    ),
    "uneven_ring": (1, lambda: of_parts(tasks.uneven_ring()), 0.778118523),
    "wine": (1, lambda: of_data(tasks.wine()), 5.09965637),
    "winequality_red": (1, lambda: of_data(tasks.winequality_red()), 42.7299721),
    "worst_group_accuracy": (
        1,
        lambda: checksum(tasks.worst_group_accuracy(*scored(), scored()[1].roll(1, -1))),
        32.8033568,
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    _, compute, golden = GOLDEN[name]
    assert compute() == pytest.approx(golden, rel=1e-6, abs=1e-6)


def test_every_task_has_its_golden_number() -> None:
    assert tasks.versions() == {name: version for name, (version, _, _) in GOLDEN.items()}
