"""Features of a network: chosen layers and the output, from one pass over the data.

`FeatureTap` gives what every detector asks for, so that none runs the network again. What a layer puts out is
reduced to one row an input as soon as it appears and moved to the CPU, so memory grows with the number of rows
alone.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lossary import require

Batch = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Tapped:
    """What a pass found, on the CPU.

    Attributes:
        features: by layer, in the order asked for; (N, D) once reduced to rows.
        output: of the model, (N, ...): its logits, if it is a classifier.
        labels: (N,), where the batches had any, otherwise None.
    """

    features: dict[str, Tensor]
    output: Tensor
    labels: Tensor | None


class FeatureTap:
    """Collects what layers put out, and the model's output, in one pass without gradients, in evaluation mode.

    Batches are moved to the model's device; afterwards every module is back in the mode it was in and nothing
    stays attached. A layer that runs several times in a pass gives its last result. Of a layer or a model that
    puts out several things, a tuple or a dict, the logits count if they have that name, otherwise the first tensor.

    Args:
        model: any module.
        layers: names as in `model.named_modules()`; none to collect the output alone.
        average: over what to average values of more than two dimensions. "space": all that follows the
            second dimension, for (N, channels, height, width). "tokens": the second dimension, for
            (N, tokens, features); where the batch has an "attention_mask", only over its ones. None keeps
            them whole, and batches must then agree in shape.

    Raises:
        ValueError: a layer that the model does not have, with those most like it.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> found = FeatureTap(model, ["1"])(torch.ones(5, 2))
    >>> found.features["1"].shape, found.output.shape
    (torch.Size([5, 3]), torch.Size([5, 2]))
    """

    def __init__(self, model: nn.Module, layers: Sequence[str] = (), *, average: str | None = "space") -> None:
        require.one_of("average", average, ("space", "tokens", None))
        modules = dict(model.named_modules())
        for name in (layers,) if isinstance(layers, str) else layers:
            if isinstance(layers, str) or name not in modules:
                close = ", ".join(map(repr, get_close_matches(name, modules, n=3, cutoff=0.4) or list(modules)[1:4]))
                raise ValueError(f"layers: expected a list of names of modules, such as {close}, got {name!r}")
        self.model, self.average = model, average
        self._tapped = {name: modules[name] for name in layers}

    def __call__(self, data: Any, *, batch: int = 256) -> Tapped:
        """Run the model once over the data.

        Args:
            data: a tensor (N, ...); a dict of tensors with N rows each, handed over by name, as a tokenizer
                gives; or an iterable of such batches, such as a DataLoader. A batch that is a tuple starts
                with the input, and its second tensor is the labels; in a dict "labels" are.
            batch: rows at a time, where data come in one piece.

        Raises:
            ValueError: no batches, labels with some batches only, a layer that did not run.
        """
        require.whole("batch", batch, at_least=1)
        rows: dict[str, list[Tensor]] = {name: [] for name in self._tapped}
        output, labels = [], []
        device = next((t.device for t in chain(self.model.parameters(), self.model.buffers())), None)
        modes = {module: module.training for module in self.model.modules()}
        found: dict[str, Tensor] = {}
        mask: Tensor | None = None

        def note(name: str) -> Callable[..., None]:
            # Reduced at once: the next layer may work in place.
            return lambda _module, _inputs, result: found.update({name: self._row(result, mask)})

        with ExitStack() as stack, torch.no_grad():
            for module, training in modes.items():
                stack.callback(setattr, module, "training", training)
            for name, module in self._tapped.items():
                stack.callback(module.register_forward_hook(note(name)).remove)
            self.model.eval()
            for given in _batches(data, batch):
                inputs, label = _parted(given)
                found.clear()
                if isinstance(inputs, Mapping):
                    mask = inputs.get("attention_mask")
                    result = self.model(**{key: value.to(device) for key, value in inputs.items()})
                else:
                    result = self.model(inputs.to(device))
                output.append(self._row(result, mask))
                if label is not None:
                    labels.append(label.detach().cpu())
                for name, values in rows.items():
                    if name not in found:
                        raise ValueError(f"layers: {name!r} did not run in the pass")
                    values.append(found[name])
        if not output:
            raise ValueError("data: expected at least one batch, got none")
        if labels and len(labels) < len(output):
            raise ValueError(f"data: expected labels with every batch, got them with {len(labels)} of {len(output)}")
        features = {name: torch.cat(values) for name, values in rows.items()}
        return Tapped(features, torch.cat(output), torch.cat(labels) if labels else None)

    def _row(self, result: Any, mask: Tensor | None) -> Tensor:
        value = _tensor(result)
        if value.ndim > 2 and self.average == "space":
            value = value.flatten(2).mean(2)
        elif value.ndim > 2 and self.average == "tokens":
            weight = value.new_ones(value.shape[:2]) if mask is None else mask.to(value)
            if weight.shape != value.shape[:2]:
                raise ValueError(
                    f"average: expected values (rows, tokens, ...) to fit the attention_mask {tuple(weight.shape)},"
                    f" got {tuple(value.shape)}"
                )
            value = torch.einsum("nt,nt...->n...", weight / weight.sum(1, keepdim=True).clamp_min(1), value)
        return value.detach().to("cpu", copy=True)


def _batches(data: Any, rows: int) -> Iterator[Any]:
    """The data in batches: cut up if it comes in one piece."""
    if isinstance(data, Tensor):
        yield from data.split(rows)
    elif isinstance(data, Mapping):
        for start in range(0, len(next(iter(data.values()))), rows):
            yield {name: value[start : start + rows] for name, value in data.items()}
    elif isinstance(data, Iterable):
        yield from data
    else:
        raise ValueError(f"data: expected a tensor, a dict of tensors or batches of them, got {type(data).__name__}")


def _parted(given: Any) -> tuple[Batch, Tensor | None]:
    """A batch's input and its labels."""
    if isinstance(given, Mapping):
        return {name: value for name, value in given.items() if name != "labels"}, given.get("labels")
    if isinstance(given, Tensor):
        return given, None
    if isinstance(given, Sequence) and given and isinstance(given[0], Tensor):
        return given[0], given[1] if len(given) > 1 and isinstance(given[1], Tensor) else None
    raise ValueError(f"data: expected batches of tensors, dicts or tuples of them, got {type(given).__name__}")


def _tensor(result: Any) -> Tensor:
    """The logits of a dict that has them, otherwise the first tensor of whatever a module puts out."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, Mapping):
        result = [result["logits"]] if "logits" in result else list(result.values())
    for item in result if isinstance(result, Sequence) else ():
        try:
            return _tensor(item)
        except ValueError:
            continue
    raise ValueError(f"layers: expected modules that put out tensors, got {type(result).__name__}")
