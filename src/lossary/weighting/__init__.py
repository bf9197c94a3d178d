"""Weightings and selectors: how much each sample counts, and whether it is seen at all.

A weighting is `w(losses, *, target, group, index)`: it asks by keyword for what it needs and returns one
weight per sample, without gradient, to be multiplied with the losses before their mean is taken. What it
remembers lives in buffers, by group or by the sample's index. A selector is a `torch.utils.data.Sampler`; one
object may be both. Where networks pick samples for one another, it is a procedure, driven by
`lossary.roles.advance`.

| Your trouble | Try first | Then |
|---|---|---|
| a known group fares worst | `GroupDRO` with strong weight decay | its `adjustment`, where groups are small |
| wrong labels, two networks affordable | `CompressedCoTeaching` | |
| wrong labels, one network | `NestedDropout` before the last layer | a robust loss from `lossary.losses` |
| training takes too long | `InfoBatch` | |
"""

from lossary.catalogue import lazy_room

__getattr__, __dir__ = lazy_room(__name__)
