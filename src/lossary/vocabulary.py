"""The two closed vocabularies: symptoms that a paper may help with, and facts that a data profile supplies."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

# Symptom -> the words people use for it. `Paper.helps` draws on the keys; search matches the words.
SYMPTOMS: dict[str, str] = {
    "class-imbalance": "class imbalance, imbalanced, long tail, rare classes, few positives, skewed labels",
    "label-noise": "label noise, noisy labels, wrong labels, mislabelled, flipped, corrupted annotations",
    "missing-labels": "missing labels, unlabelled, partial labels, positive unlabelled, missing positives",
    "few-labels": "few labels, small data, semi-supervised, scarce annotations, few shot",
    "worst-group": "worst group, subgroups, spurious correlation, fairness, minority group, shortcut",
    "train-test-shift": "train test shift, distribution shift, covariate shift, domain shift, drift",
    "heavy-tails": "heavy tails, outliers in the target, extreme values, robust regression",
    "overconfidence": "overconfidence, overconfident, calibration, miscalibrated probabilities",
    "uncertainty": "uncertainty, prediction sets, intervals, coverage, guarantee, conformal, risk control",
    "strange-inputs": "strange inputs, out of distribution, anomaly, novelty, ood, unusual, adversarial inputs",
    "adversarial-attacks": "adversarial attacks, adversarial robustness, perturbation, worst-case input",
    "overfitting": "overfitting, generalisation, generalization, sharp minima, regularisation, regularization",
    "training-cost": "training cost, slow training, wasted data, redundant data, data pruning, speed up",
    "inference-cost": "inference cost, slow inference, latency, memory traffic, speed",
    "model-size": "model size, compression, pruning, quantisation, quantization, small model",
    "slow-sampling": "slow sampling, few steps, fast sampler, one step generation",
    "crowded-scenes": "crowded scenes, overlapping objects, occlusion, duplicate detections, nms",
    "odd-shapes": "odd shapes, polygons, contours, curved text, rotated boxes, star-convex, cells, nuclei, landmarks",
    "counting": "counting, crowd counting, density maps, how many",
    "guidance": "guidance, classifier-free guidance, oversaturation, artefacts, prompt alignment, conditions",
    "rare-modes": "rare modes, minority samples, mode collapse, diversity, missing modes",
    "inverse-problems": "inverse problems, inpainting, reconstruction, editing, masks, subsampling, measurements",
    "text-generation": "text generation, tokens, discrete diffusion, language, categorical data",
    "density-estimation": "density estimation, score matching, likelihood, sampling from an unnormalised density",
    "multi-task": "multi-task, several tasks, task balancing, loss balancing, task weights",
    "in-context-learning": "in-context learning, transformers, prompts, linear attention, theory",
}

# Facts about the data. A hyper-parameter with one of these names is filled from the profile.
PROFILE_FIELDS: dict[str, str] = {
    "num_samples": "rows in the training data",
    "num_features": "columns after encoding",
    "num_classes": "distinct classes",
    "num_groups": "distinct groups",
    "class_counts": "rows per class, a tuple",
    "label_noise": "estimated share of labels that disagree with the features, 0 to 1",
}


class MissingFact(LookupError):
    """A part needs a fact that the profile at hand does not have; the message names it."""


def asked(call: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Of the keyword arguments on offer (index, group, mask, ...), those that a part names; all if it takes any."""
    parameters = inspect.signature(getattr(call, "forward", call)).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(offered)
    return {name: value for name, value in offered.items() if name in parameters}


def fill(part: Callable[..., Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The profile facts that `part` asks for by parameter name.

    Raises:
        MissingFact: a parameter named like a profile field has no default and `facts` lacks it.
    """
    filled = {}
    for name, parameter in inspect.signature(part).parameters.items():
        if name not in PROFILE_FIELDS:
            continue
        if facts.get(name) is not None:
            filled[name] = facts[name]
        elif parameter.default is inspect.Parameter.empty:
            raise MissingFact(f"needs {name} ({PROFILE_FIELDS[name]}), which this data does not have")
    return filled
