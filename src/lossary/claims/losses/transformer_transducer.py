"""Transformer Transducer: the sum over paths, the reach of its attention, and token errors on made-up speech."""

import math
from itertools import combinations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from lossary.claims import Arms, Seeds, claim, tune
from lossary.losses import TransformerTransducer, rnnt_loss

SYMBOLS, BANDS, LABELS, FRAMES = 8, 6, 4, 12
NOISE = 0.5
Speech = tuple[Tensor, ...]
SETTINGS = [{"lr": lr} for lr in (0.005, 0.01)]


def _rendered_symbols(rows: int, seeds: Seeds) -> Speech:
    """Utterances of 2 to 4 symbols as noisy spectra: audio (S, rows, 12, 6), its lengths, targets and theirs.

    Each symbol is followed by one of three, lasts 2 or 3 frames, and its spectrum runs into its neighbours'.
    """
    made = []
    for rng in seeds.numpy("speech"):
        spectra = rng.normal(size=(SYMBOLS, BANDS))
        successors = np.stack([rng.permutation(SYMBOLS)[:3] for _ in range(SYMBOLS)])
        said = [rng.integers(SYMBOLS, size=rows)]
        for _ in range(LABELS - 1):
            said.append(successors[said[-1], rng.integers(3, size=rows)])
        targets, count = np.stack(said, 1), rng.integers(2, LABELS + 1, size=rows)
        ends = rng.integers(2, 4, size=targets.shape).cumsum(1)
        length = ends[np.arange(rows), count - 1]
        place = (np.arange(FRAMES)[:, None] >= ends[:, None]).sum(-1).clip(max=LABELS - 1)
        clean = np.pad(spectra[np.take_along_axis(targets, place, 1)], ((0, 0), (1, 1), (0, 0)), mode="edge")
        audio = 0.3 * clean[:, :-2] + 0.4 * clean[:, 1:-1] + 0.3 * clean[:, 2:]
        audio = audio + NOISE * rng.normal(size=audio.shape)
        made.append((audio.astype(np.float32), length, targets, count))
    speech: Speech = tuple(torch.from_numpy(np.stack(part)) for part in zip(*made))
    return speech


class _CTC(nn.Module):
    """The same audio encoder with one label or blank a frame, each independent of the others."""

    def __init__(self, *sizes: int, **hyper: Any) -> None:
        super().__init__()
        self.encoder = TransformerTransducer(*sizes, **hyper)
        self.output = nn.Linear(hyper["width"], sizes[1])

    def forward(self, audio: Tensor, audio_lengths: Tensor, targets: Tensor) -> Tensor:
        logits: Tensor = self.output(self.encoder.encode_audio(audio, audio_lengths))
        return logits

    def loss(self, logits: Tensor, targets: Tensor, audio_lengths: Tensor, target_lengths: Tensor) -> Tensor:
        return F.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1), targets, audio_lengths, target_lengths, SYMBOLS, "none"
        )

    @torch.no_grad()
    def transcribe(self, audio: Tensor, audio_lengths: Tensor) -> list[list[int]]:
        best = self(audio, audio_lengths, audio).argmax(-1)
        return [
            [k for k, last in zip(row, [SYMBOLS, *row]) if k not in (last, SYMBOLS)]
            for row in (row[:n].tolist() for row, n in zip(best, audio_lengths))
        ]


class _Transducer(TransformerTransducer):
    loss = staticmethod(rnnt_loss)

    def transcribe(self, audio: Tensor, audio_lengths: Tensor) -> list[list[int]]:  # type: ignore[override]
        labels, counts = super().transcribe(audio, audio_lengths)
        return [row[:n].tolist() for row, n in zip(labels, counts)]


def _token_error_rate(
    seeds: Seeds, *, lr: float, kind: type[Any] = _Transducer, left: int | None = None, right: int | None = None
) -> Tensor:
    """Insertions, deletions and substitutions per hundred true labels of new utterances, per seed."""
    train, test, batch = seeds.few(1600, smoke=16), seeds.few(300, smoke=2), 8
    speech = _rendered_symbols(train + test, seeds)
    sizes = {"width": 32, "heads": 2, "feedforward": 64, "audio_layers": 2, "label_layers": 1, "label_left": 2}
    models = []
    for generator in seeds.torch("init"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            models.append(kind(BANDS, SYMBOLS + 1, audio_left=left, audio_right=right, dropout=0.0, **sizes))
    model = models[0]
    parameters, _ = stack_module_state(models)
    stacked = vmap(lambda weights, *inputs: functional_call(model, weights, inputs))
    steps = seeds.few(300, smoke=2)
    optimizer = torch.optim.Adam(parameters.values(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    orders = seeds.torch("order")
    for _ in range(steps):
        rows = torch.stack([torch.randint(train, (batch,), generator=g) for g in orders])
        audio, lengths, targets, counts = (part[torch.arange(len(seeds))[:, None], rows] for part in speech)
        logits = stacked(parameters, audio, lengths, targets).flatten(0, 1)
        loss = model.loss(logits, *(part.flatten(0, 1) for part in (targets, lengths, counts)))
        optimizer.zero_grad()
        (loss.sum() / batch).backward()
        optimizer.step()
        schedule.step()
    rates = []
    for s in range(len(seeds)):
        model.load_state_dict({name: weight[s] for name, weight in parameters.items()})
        audio, lengths, targets, counts = (part[s, train:] for part in speech)
        said = model.transcribe(audio, lengths)
        truth = [row[:n].tolist() for row, n in zip(targets, counts)]
        rates.append(100 * sum(map(_edits, said, truth)) / counts.sum())
    return torch.stack(rates)


def _edits(said: list[int], truth: list[int]) -> int:
    """Levenshtein distance."""
    row = list(range(len(truth) + 1))
    for i, token in enumerate(said, start=1):
        above, row[0] = row[0], i
        for j, true in enumerate(truth, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (token != true))
    return row[-1]


def _compare(seeds: Seeds, method: dict[str, Any], baseline: dict[str, Any]) -> Arms:
    """Token error rates of two recognisers, each with its learning rate chosen among the same two."""
    rates, chosen = {}, {}
    for name, arm in (("method", method), ("baseline", baseline)):

        def score(seeds: Seeds, *, lr: float, arm: dict[str, Any] = arm) -> Tensor:
            return _token_error_rate(seeds, lr=lr, **arm)

        chosen[name] = tune(score, SETTINGS, seeds, better="lower")
        rates[name] = score(seeds, **chosen[name])
    return Arms(rates["method"], rates["baseline"], chosen)


@claim(
    says="A Transformer transducer makes fewer token errors than CTC on the same encoder",
    kind="superiority",
    metric="error rate",
    scale="made-up speech, 8 symbols, up to 12 frames; width 32, 2 + 1 layers, 300 steps of 8; 2 learning rates each",
)
def transducer_beats_ctc(seeds: Seeds) -> Arms:
    return _compare(seeds, {}, {"kind": _CTC})


@claim(
    says="Looking two frames ahead in each layer makes fewer token errors than looking back only",
    kind="superiority",
    metric="error rate",
    scale="as transducer_beats_ctc; 4 frames of left context in each of two layers, right context 2 against 0",
)
def look_ahead_beats_none(seeds: Seeds) -> Arms:
    return _compare(seeds, {"left": 4, "right": 2}, {"left": 4, "right": 0})


@claim(
    says="With four frames back and two ahead in each layer a transducer is as good as with full attention",
    kind="noninferiority",
    metric="error rate",
    scale="as transducer_beats_ctc; left context 4 and right 2 in each of two layers against all frames",
)
def look_ahead_matches_full_attention(seeds: Seeds) -> Arms:
    return _compare(seeds, {"left": 4, "right": 2}, {})


@claim(
    says="Without look-ahead, four frames of left context a layer lose little against all frames before",
    kind="noninferiority",
    metric="error rate",
    scale="as transducer_beats_ctc; right context 0, left context 4 in each of two layers against all",
)
def limited_left_context_loses_little(seeds: Seeds) -> Arms:
    return _compare(seeds, {"left": 4, "right": 0}, {"right": 0})


@claim(
    says="The transducer loss is -log of the probability summed over every alignment",
    kind="exact",
    metric="deviation",
    scale="2 to 5 frames, 0 to 4 labels, 5 classes, double precision: all 200 random lattices path by path",
    tolerance=1e-10,
)
def loss_sums_all_paths(seeds: Seeds) -> Arms:
    deviations = []
    for rng in seeds.numpy("lattices"):
        for _ in range(10):
            frames, labels = int(rng.integers(2, 6)), int(rng.integers(5))
            logits = torch.from_numpy(3 * rng.normal(size=(frames, labels + 1, 5)))
            target = torch.from_numpy(rng.integers(4, size=labels))
            value = rnnt_loss(logits, target, torch.tensor(frames), torch.tensor(labels))
            deviations.append(value.item() + math.log(_over_paths(logits.softmax(-1), target.tolist())))
    return Arms(np.array(deviations))


def _over_paths(p: Tensor, target: list[int]) -> float:
    """Every order of the labels and of all blanks but the last one, each the product of its steps."""
    frames, total = len(p), 0.0
    for emits in combinations(range(frames - 1 + len(target)), len(target)):
        t = u = 0
        path = 1.0
        for step in range(frames + len(target)):
            path *= p[t, u, target[u] if step in emits else -1].item()
            t, u = (t, u + 1) if step in emits else (t + 1, u)
        total += path
    return total
