"""Detection: what is done with boxes, masks and keypoints, before and after the network.

The engine is `_suppress.suppress`: take the best detection left, decay the scores of those that it overlaps, drop
what falls below a floor, repeat. A suppressor is an overlap and a decay, each written once as a function of numbers:
numba compiles the loop around them where it is installed (`pip install lossary[fast]`), numpy runs it where it is
not. `_overlap.box_iou` is the overlap of boxes. `_average_precision` holds COCO's measure, with which claims compare.

| Your trouble | Try first | Then |
|---|---|---|
| objects in crowds, true boxes that overlap | `soft_nms` with method "gaussian" | method "linear" |
| several classes at once | `batched_soft_nms` | |
| plain suppression without torchvision | `soft_nms` with method "hard" | |
"""

from lossary.catalogue import lazy_room

__getattr__, __dir__ = lazy_room(__name__)
