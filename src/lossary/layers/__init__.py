"""Layers: what stands between input and output of a network, as modules and as plain functions of tensors.

There is no engine: a part is an `nn.Module` or has the signature of the torch function that it replaces.

| Your trouble | Try first | Then |
|---|---|---|
| softmax over rows that do not fit the cache | `two_pass_softmax` | |
| sums of exponentials in pieces, merged in any order | `ext_exp` and `ext_add` | |
"""

from lossary.catalogue import lazy_room

__getattr__, __dir__ = lazy_room(__name__)
