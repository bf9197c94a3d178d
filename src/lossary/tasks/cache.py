"""Networks that are trained once and shared by many claims, kept on disk by a hash of all that they depend on."""

import hashlib
import inspect
import pickle
import sys
from collections.abc import Callable

import torch
from torch import nn

from lossary import cached


def trained(build: Callable[[], nn.Module], train: Callable[[nn.Module], None], *, key: str) -> nn.Module:
    """The network in evaluation mode, without gradients: from disk, or built and trained now.

    The files, in the user's cache folder, may be deleted at any time. A change of the module in which `train` stands,
    of torch's version or of the key makes a new one.

    Args:
        build: makes the network; its weights need not matter.
        train: trains it in place, from its own seeds, so that it ends the same every time.
        key: what else it depends on: sizes, steps, the version of its data.
    """
    source = inspect.getsource(sys.modules[train.__module__])
    name = hashlib.sha256("\n".join([source, torch.__version__, key]).encode()).hexdigest()[:24]
    path = cached.folder() / "networks" / f"{name}.pt"
    network = build()
    try:
        network.load_state_dict(torch.load(path, weights_only=True))
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):  # none, or a torn one, which is replaced
        with torch.enable_grad():  # whoever asks may be measuring
            train(network)
        cached.keep(path, lambda draft: torch.save(network.state_dict(), draft))
    return network.eval().requires_grad_(False)
