"""What claims and comparisons run on: data, small models with a seed dimension, their training, measures.

Everything that carries randomness takes `Seeds` and gives tensors whose leading dimension S is the seed, so
that S runs cost little more than one. What is computed for one seed does not depend on the others.

A task is a function whose results verdicts rest on. It has an integer version, raised when its golden
numbers move: `used()` tells which tasks ran, and at which version, so that a verdict knows when it is stale.
"""

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_EXPORTS = {
    "data": "Data Split breast_cancer diabetes digits mnist5k optdigits_writers page_blocks split wine winequality_red",
    "detection": (
        "ConvDetector ShapeScenes TransformerDetector conv_head dense_loss dense_predictions detection_ap detections"
        " grid_points shape_scenes train_detector trained_detector transformer_detector"
    ),
    "diffusion": (
        "Tally distil drawn_from energy_distance fit_denoiser generated ring_denoiser"
        " ring_distance sliced_wasserstein stacked_denoiser uneven_ring v_error"
    ),
    "faces": "FaceScenes face_candidates face_collages face_networks",
    "measures": (
        "accuracy auroc balanced_accuracy log_loss mean_average_precision top_hessian_eigenvalue worst_group_accuracy"
    ),
    "models": "StackedLinear StackedMLP small_cnn stacked_mlp",
    "pictures": (
        "Unet digit_classifier digit_denoiser digit_distance digit_images digit_student digit_teacher drawn_digits"
        " frechet_distance sheet"
    ),
    "seeds": "Seeds",
    "synthetic": (
        "Blobs Masks Prompts Scenes blurred_masks crowded_boxes digit_sets flip_labels gaussian_blobs"
        " hide_positives linear_regression_prompts long_tail spurious_groups"
    ),
    "tokens": "StackedTokenNet chains fit_tokens noised_tokens pair_error stacked_token_net texts_of",
    "training": "PerSeed cross_entropy fit minimise per_seed spread_times",
    "cache": "trained",
    "workers": "JobError cores run_all warm",
}
_HOMES = {name: module for module, names in _EXPORTS.items() for name in names.split()}

_versions: dict[str, int] = {}
_used: dict[str, int] = {}


def task(*, version: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Mark a function as a task at an integer version; each call of it is noted for `used`."""

    def register(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__name__
        _versions[name] = version

        @wraps(function)
        def noted(*args: P.args, **kwargs: P.kwargs) -> R:
            _used[name] = version
            return function(*args, **kwargs)

        return noted

    return register


def used() -> dict[str, int]:
    """Name and version of the tasks called in this process since `forget`, by name."""
    return dict(sorted(_used.items()))


def forget() -> None:
    """Start a new account of what is `used`."""
    _used.clear()


def versions(*names: str) -> dict[str, int]:
    """Name and present version of the tasks named, or of every task here, called or not, by name.

    The answer does not depend on what else this process has imported or defined.
    """
    for module in {_HOMES[name] for name in names} if names else _EXPORTS:
        import_module(f"{__name__}.{module}")
    return {name: _versions[name] for name in sorted(names or _HOMES) if name in _versions}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*_HOMES, "forget", "task", "used", "versions"])
