"""Transformer Transducer: speech to text by two Transformer encoders and a loss that sums over all alignments.

One encoder reads frames of audio, the other the labels so far; a joiner mixes every frame with every label history
into logits over the labels and a blank, which moves on to the next frame. The loss is minus the logarithm of the
summed probability of all paths through that lattice, so no alignment is needed. With attention limited to a few
frames on either side the model transcribes while it listens. Take it where output follows input in the same order, it
may be shorter, and it must start before the input ends. CTC is cheaper, but there a label does not depend on those
before it; and where order differs, as in translation, neither will do.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lossary import require
from lossary.paper import Paper

PAPER = Paper(
    title="Transformer Transducer: A Streamable Speech Recognition Model with Transformer Encoders and RNN-T Loss",
    year=2020,
    helps=("inference-cost",),
    departs=(
        "greedy search in place of beam search",
        "frames are recomputed rather than cached when streaming",
        "no audio front end: filter banks, stacking of frames and SpecAugment are left to the caller",
    ),
    equation=(
        r"\begin{aligned} "
        r"\ell&=-\log\bigl[\alpha(T,U)\,p(\varnothing\mid T,U)\bigr],\qquad\alpha(1,0)=1\\ "
        r"\alpha(t,u)&=\alpha(t-1,u)\,p(\varnothing\mid t-1,u)+\alpha(t,u-1)\,p(y_u\mid t,u-1)\\ "
        r"p(\cdot\mid t,u)&=\operatorname{softmax}\bigl(W\tanh(A\,\mathrm{audio}_t+B\,\mathrm{labels}_u+b)+c\bigr) "
        r"\end{aligned}"
    ),
    url="https://www.arxiv-vanity.com/papers/2002.02562/",
)


def rnnt_loss(
    logits: Float[Tensor, "*batch frames histories classes"],
    targets: Int[Tensor, "*batch labels"],
    logit_lengths: Int[Tensor, "*batch"],
    target_lengths: Int[Tensor, "*batch"],
    *,
    blank: int = -1,
) -> Float[Tensor, "*batch"]:
    """Transducer loss: -log of the summed probability of all alignments, in nats per utterance.

    A path starts at frame 0 with no label. Blank moves on to the next frame, any other class is emitted and stays; it
    ends with a blank at the last frame, all labels emitted. Arguments and values are those of
    `torchaudio.functional.rnnt_loss` with reduction="none". Logits may be log-probabilities too: the softmax applied
    here leaves them as they are.

    The gradient is softmax times the posterior probability of being at a frame and history, less the posteriors of
    the blank and the label that leave it. Forward and backward take one step for each anti-diagonal of the lattice;
    half precision is summed in single. Second derivatives are autograd's, slower. Lengths and labels are not looked at.
    A target without a path, because logits are -inf, costs inf and has no gradient.

    Args:
        logits: from a joiner; histories are the first 0, 1, ..., all labels, so one more than labels.
        targets: class numbers, int32 or int64; what lies beyond an utterance's length is ignored.
        logit_lengths: frames of each utterance, 1 to all.
        target_lengths: labels of each utterance, 0 to all.
        blank: class number of the blank, negative from the end.

    Raises:
        ValueError: shapes or dtypes that do not fit, a blank that is none of the classes.

    >>> import torch
    >>> two, one = torch.tensor([2]), torch.tensor([1])
    >>> rnnt_loss(torch.zeros(1, 2, 2, 4), torch.tensor([[0]]), two, one)  # 2 paths of 3 steps: log 4^3 / 2
    tensor([3.4657])
    """
    require.floating("logits", logits, at_least_dims=3)
    *lead, _, histories, classes = logits.shape
    _whole_numbers("targets", targets, (*lead, histories - 1))
    _whole_numbers("logit_lengths", logit_lengths, tuple(lead))
    _whole_numbers("target_lengths", target_lengths, tuple(lead))
    require.whole("blank", blank, at_least=-classes, at_most=classes - 1)
    beyond = torch.arange(histories - 1, device=targets.device) >= target_lengths.unsqueeze(-1)
    flat: Tensor = _TransducerLoss.apply(  # type: ignore[no-untyped-call]
        logits.reshape(-1, *logits.shape[-3:]),
        targets.long().masked_fill(beyond, 0).reshape(math.prod(lead), histories - 1),
        logit_lengths.long().reshape(-1),
        target_lengths.long().reshape(-1),
        blank,
    )
    return flat.view(lead)


class TransducerJoiner(nn.Module):
    """Mixes every frame with every label history: Linear(tanh(Linear(audio) + Linear(history))).

    Args:
        audio_features: width of the encoded audio.
        label_features: width of the encoded histories.
        hidden: width in which both are added.
        num_classes: labels and blank together.

    Raises:
        ValueError: a width below 1, fewer than two classes.

    >>> import torch
    >>> joiner = TransducerJoiner(8, 4, hidden=16, num_classes=6)
    >>> joiner(torch.zeros(2, 10, 8), torch.zeros(2, 3, 4)).shape
    torch.Size([2, 10, 3, 6])
    """

    def __init__(self, audio_features: int, label_features: int, *, hidden: int, num_classes: int) -> None:
        super().__init__()
        require.whole("audio_features", audio_features, at_least=1)
        require.whole("label_features", label_features, at_least=1)
        require.whole("hidden", hidden, at_least=1)
        require.whole("num_classes", num_classes, at_least=2)
        self.audio = nn.Linear(audio_features, hidden)
        self.label = nn.Linear(label_features, hidden, bias=False)
        self.output = nn.Linear(hidden, num_classes)

    def forward(
        self, audio: Float[Tensor, "*batch frames width"], label: Float[Tensor, "*batch histories depth"]
    ) -> Float[Tensor, "*batch frames histories classes"]:
        """Logits, as `rnnt_loss` takes them."""
        joint = self.audio(audio).unsqueeze(-2) + self.label(label).unsqueeze(-3)
        logits: Tensor = self.output(torch.tanh(joint))
        return logits


def limited_context_mask(
    length: int, *, left: int | None = None, right: int | None = None, device: torch.device | str | None = None
) -> Bool[Tensor, "length length"]:
    """Who may attend to whom: position i to j where i - left <= j <= i + right, true where allowed.

    Context adds up over layers: behind n layers an output depends on n * left positions before it and n * right after.

    Args:
        length: of the sequence.
        left: positions before, at least 0; None is all.
        right: positions after, at least 0; None is all.
        device: of the mask.

    Raises:
        ValueError: a number below 0.

    >>> limited_context_mask(4, left=1, right=0).int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [0, 1, 1, 0],
            [0, 0, 1, 1]], dtype=torch.int32)
    """
    require.whole("length", length)
    mask = torch.ones(length, length, dtype=torch.bool, device=device)
    if right is not None:
        require.whole("right", right)
        mask = mask.tril(right)
    if left is not None:
        require.whole("left", left)
        mask = mask.triu(-left)
    return mask


class TransformerTransducer(nn.Module):
    """A speech recogniser: Transformers over audio frames and over labels, joined into logits for `rnnt_loss`.

        logits = model(audio, audio_lengths, targets)
        rnnt_loss(logits, targets, audio_lengths, target_lengths).mean().backward()
        labels, lengths = model.transcribe(audio, audio_lengths)

    Each layer is y = LN(x) + attention(LN(x)), then LN(y) + feed-forward(LN(y)): the residual path is normalised too.
    Positions enter relatively, as in Transformer-XL. The blank is the last class and stands before the first label.
    Memory of the logits is batch * frames * histories * classes, so stack or subsample frames first.

    Args:
        num_features: width of a frame.
        num_classes: labels and the blank together.
        width: of both encoders and of the joiner, even and a multiple of `heads`.
        heads: of attention.
        feedforward: hidden width of a layer's feed-forward part.
        audio_layers: of the audio encoder.
        label_layers: of the label encoder.
        audio_left: frames before that a frame attends to in each layer; None is all.
        audio_right: frames after; each layer delays the output by as many.
        label_left: labels before that a label attends to in each layer.
        dropout: rate after attention and in the feed-forward part, 0 to below 1.

    Raises:
        ValueError: a number out of range, tensors whose shapes or dtypes do not fit.

    >>> import torch
    >>> model = TransformerTransducer(5, 4, width=8, heads=2, feedforward=16, audio_layers=1, label_layers=1)
    >>> model(torch.zeros(2, 7, 5), torch.tensor([7, 6]), torch.tensor([[0, 1], [2, 0]])).shape
    torch.Size([2, 7, 3, 4])
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        width: int = 512,
        heads: int = 8,
        feedforward: int = 2048,
        audio_layers: int = 18,
        label_layers: int = 2,
        audio_left: int | None = None,
        audio_right: int | None = None,
        label_left: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        whole = {"num_features": num_features, "heads": heads, "feedforward": feedforward}
        for name, value in (whole | {"audio_layers": audio_layers, "label_layers": label_layers}).items():
            require.whole(name, value, at_least=1)
        require.whole("num_classes", num_classes, at_least=2)
        require.whole("width", width, at_least=2)
        if width % 2 or width % heads:
            raise ValueError(f"width: expected an even multiple of heads = {heads}, got {width}")
        require.number("dropout", dropout, at_least=0.0, below=1.0)
        for name, reach in {"audio_left": audio_left, "audio_right": audio_right, "label_left": label_left}.items():
            if reach is not None:
                require.whole(name, reach)
        self.audio_reach, self.label_reach = (audio_left, audio_right), (label_left, 0)
        self.blank = num_classes - 1
        self.audio_input = nn.Linear(num_features, width)
        self.label_input = nn.Embedding(num_classes, width)
        self.audio_encoder, self.label_encoder = (
            nn.ModuleList(_Layer(width, heads, feedforward, dropout) for _ in range(layers))
            for layers in (audio_layers, label_layers)
        )
        self.joiner = TransducerJoiner(width, width, hidden=width, num_classes=num_classes)

    def forward(
        self,
        audio: Float[Tensor, "batch frames features"],
        audio_lengths: Int[Tensor, " batch"],
        targets: Int[Tensor, "batch labels"],
    ) -> Float[Tensor, "batch frames histories classes"]:
        """Logits of every frame and every history of `targets`, whose padding may be any label."""
        logits: Tensor = self.joiner(self.encode_audio(audio, audio_lengths), self.encode_labels(targets))
        return logits

    def encode_audio(
        self, audio: Float[Tensor, "batch frames features"], audio_lengths: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch frames width"]:
        """The frames, each seen with its context, as the joiner takes them."""
        require.floating("audio", audio, dims=3)
        if audio.shape[-1] != self.audio_input.in_features:
            wanted = f"(batch, frames, {self.audio_input.in_features})"
            raise ValueError(f"audio: expected {wanted}, got shape {tuple(audio.shape)}")
        _whole_numbers("audio_lengths", audio_lengths, tuple(audio.shape[:1]))
        frames = audio.shape[1]
        near = limited_context_mask(frames, left=self.audio_reach[0], right=self.audio_reach[1], device=audio.device)
        real = torch.arange(frames, device=audio.device) < audio_lengths.unsqueeze(-1)
        itself = torch.eye(frames, dtype=torch.bool, device=audio.device)  # so that padding attends to something
        mask = (near & real.unsqueeze(-2)) | itself
        x: Tensor = self.audio_input(audio)
        for layer in self.audio_encoder:
            x = layer(x, mask)
        return x

    def encode_labels(self, targets: Int[Tensor, "batch labels"]) -> Float[Tensor, "batch histories width"]:
        """The histories of 0, 1, ..., all labels, as the joiner takes them."""
        _whole_numbers("targets", targets, tuple(targets.shape[:1]) + tuple(targets.shape[-1:]))
        left, right = self.label_reach
        mask = limited_context_mask(targets.shape[1] + 1, left=left, right=right, device=targets.device)
        x: Tensor = self.label_input(F.pad(targets, (1, 0), value=self.blank))
        for layer in self.label_encoder:
            x = layer(x, mask)
        return x

    @torch.no_grad()
    def transcribe(
        self,
        audio: Float[Tensor, "batch frames features"],
        audio_lengths: Int[Tensor, " batch"],
        *,
        max_symbols: int = 4,
    ) -> tuple[Int[Tensor, "batch labels"], Int[Tensor, " batch"]]:
        """The best class at each step: a label is written, a blank moves on to the next frame.

        Args:
            audio, audio_lengths: as in training.
            max_symbols: labels that one frame may emit.

        Returns:
            The labels, with blanks behind the end of an utterance, and how many each has.
        """
        require.whole("max_symbols", max_symbols, at_least=1)
        heard = self.encode_audio(audio, audio_lengths)
        row = torch.arange(len(audio), device=audio.device)
        frame, count, here = torch.zeros(3, len(audio), dtype=torch.int64, device=audio.device)
        labels = torch.full((len(audio), 0), self.blank, device=audio.device)
        while (listening := frame < audio_lengths).any():
            history = self.encode_labels(labels)[row, count]
            at = heard[row, frame.clamp_max(audio.shape[1] - 1)]
            best = self.joiner(at.unsqueeze(1), history.unsqueeze(1)).flatten(1).argmax(-1)
            move = (best == self.blank) | (here == max_symbols)
            write = listening & ~move
            if (count + write).max() > labels.shape[1]:
                labels = F.pad(labels, (0, 1), value=self.blank)
            labels[row[write], count[write]] = best[write]
            frame, count = frame + move.long(), count + write.long()
            here = torch.where(move, 0, here + 1)
        return labels, count


class _Layer(nn.Module):
    """Multi-headed attention with relative positions, then two dense layers."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_dense = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.offset = nn.Linear(width, width, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(heads, 1, width // heads))
        self.offset_bias = nn.Parameter(torch.zeros(heads, 1, width // heads))
        self.dense = nn.Sequential(
            nn.Linear(width, feedforward), nn.ReLU(), nn.Dropout(dropout), nn.Linear(feedforward, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.before_attention(x)
        x = self.before_dense(x + self.dropout(self.attend(x, mask)))
        y: Tensor = x + self.dropout(self.dense(x))
        return y

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        """Scores are (q + content_bias) k_j + (q + offset_bias) r_(i - j), r a projected sinusoid."""
        length, width = x.shape[-2:]
        q, k, v = self.project(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-2, -3)
        waves = _sinusoids(torch.arange(1 - length, length, device=x.device, dtype=x.dtype), width)
        r = self.offset(waves).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        place = torch.arange(length, device=x.device)
        offset = place.unsqueeze(1) - place + length - 1
        by_offset = (q + self.offset_bias) @ r.mT
        by_offset = by_offset.gather(-1, offset.expand(*by_offset.shape[:-1], length))
        scores = ((q + self.content_bias) @ k.mT + by_offset) / math.sqrt(k.shape[-1])
        scores = scores.masked_fill(~mask.unsqueeze(-3), -torch.inf)
        merged: Tensor = self.merge((torch.softmax(scores, -1) @ v).transpose(-2, -3).flatten(-2))
        return merged


class _TransducerLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, frames: Tensor, labels: Tensor, blank: int) -> Tensor:
        values, *lattice = _values(logits, targets, frames, labels, blank)
        ctx.blank = blank
        ctx.save_for_backward(logits, targets, frames, labels, *lattice)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, frames, labels, log_p, leave, emit, alpha = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted: left to autograd
            values = _values(logits, targets, frames, labels, ctx.blank, twice=True)[0]
            return *torch.autograd.grad(values, logits, grad, create_graph=True), None, None, None, None
        # The odds that a path in a cell came by a blank, not by a label; no number where no path comes.
        odds = (alpha[:-1, 1:] + leave[:-1, 1:] - alpha[:-1, :-1] - emit[:-1]).nan_to_num_(0.0, torch.inf, -torch.inf)
        left = F.pad(odds.sigmoid(), (0, 0, 1, 0), value=1.0)
        emitted = odds.neg_().sigmoid_()
        end = _end(frames, labels)
        posterior = torch.zeros_like(alpha)
        posterior[end] = last = grad.to(alpha) * (alpha[end] + leave[end]).isfinite()
        cells = posterior.unbind()
        for here, after, by_leave, by_emit in zip(cells[-2::-1], cells[:0:-1], left.flip(0), emitted.flip(0)):
            here.addcmul_(after, by_leave)
            here[:-1].addcmul_(after[1:], by_emit)
        left = F.pad(left.mul_(posterior[1:]), (0, 0, 0, 0, 0, 1))
        left[end] = last
        emitted = F.pad(emitted.mul_(posterior[1:, 1:]), (0, 0, 0, 0, 0, 1))
        by_logits = log_p.exp().mul_(_straight(posterior, logits.shape[1]).unsqueeze(-1))
        by_logits[..., ctx.blank] -= _straight(left, logits.shape[1])
        emitted = _straight(emitted, logits.shape[1]).unsqueeze(-1)
        by_logits[:, :, :-1].scatter_add_(-1, _of_frames(targets, logits), -emitted)
        return by_logits.to(logits.dtype), None, None, None, None


def _values(
    logits: Tensor, targets: Tensor, frames: Tensor, labels: Tensor, blank: int, *, twice: bool = False
) -> tuple[Tensor, ...]:
    """The losses, and log-probabilities of classes, of leaving and emitting at a cell, and of coming by it.

    The last three are held by anti-diagonals, (frame + label, label, batch): one depends on the one before it alone.
    With `twice` it can be differentiated, twice too, which infinities and the quicker logaddexp do not allow.
    """
    never = -1e30 if twice else -torch.inf
    log_p = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    leave = _skewed(log_p[..., blank], targets.shape[1], never)
    emit = _skewed(log_p[:, :, :-1].gather(-1, _of_frames(targets, logits)).squeeze(-1), targets.shape[1], never)
    start = torch.full_like(leave[0], never)
    start[0] = 0
    arrivals = [start]
    for by_leave, by_emit in zip(leave[:-1], emit[:-1]):
        emitted = F.pad(arrivals[-1][:-1] + by_emit, (0, 0, 1, 0), value=never)
        ways = arrivals[-1] + by_leave, emitted
        arrivals.append(torch.stack(ways).logsumexp(0) if twice else torch.logaddexp(*ways))
    alpha = torch.stack(arrivals)
    end = _end(frames, labels)
    return -(alpha[end] + leave[end]).to(logits.dtype), log_p, leave, emit, alpha


def _end(frames: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Where the paths of each utterance end: diagonal, label, utterance."""
    return frames - 1 + labels, labels, torch.arange(len(labels), device=labels.device)


def _of_frames(targets: Tensor, logits: Tensor) -> Int[Tensor, "batch frames labels 1"]:
    return targets[:, None, :, None].expand(-1, logits.shape[1], -1, 1)


def _skewed(x: Float[Tensor, "batch frames rows"], labels: int, never: float) -> Float[Tensor, "diagonals rows batch"]:
    """x[b, t, u] at [t + u, u, b], and `never` where there is no such frame."""
    batch, frames, rows = x.shape
    padded = F.pad(x.permute(2, 1, 0), (0, 0, 0, labels + 1), value=never)
    cut = padded.flatten(0, 1)[: rows * (frames + labels)]
    return cut.view(rows, frames + labels, batch).transpose(0, 1).contiguous()


def _straight(x: Float[Tensor, "diagonals rows batch"], frames: int) -> Float[Tensor, "batch frames rows"]:
    """`_skewed` undone."""
    diagonals, rows, batch = x.shape
    padded = F.pad(x.transpose(0, 1).flatten(0, 1), (0, 0, 0, rows))
    return padded.view(rows, diagonals + 1, batch)[:, :frames].permute(2, 1, 0)


def _sinusoids(place: Float[Tensor, " places"], width: int) -> Float[Tensor, "places width"]:
    rate = 10_000 ** (-torch.arange(0, width, 2, device=place.device, dtype=place.dtype) / width)
    angle = place.unsqueeze(-1) * rate
    return torch.cat([angle.sin(), angle.cos()], -1)


def _whole_numbers(name: str, tensor: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: expected an int32 or int64 tensor, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
