"""Losses: what is minimised, one value per sample.

The engine is `_softmax.log_prob`: the log-probability of the true class with a lean gradient. A loss that is a
function of it costs no more than cross-entropy, whatever the function.

| Your trouble | Try first | Then |
|---|---|---|
| noisy labels | `comp_sum_loss` with tau 1.7 | `ALDRKLLoss`, `ldr_kl_loss` with a large lam |
| rare classes, few positives | `poly1_cross_entropy` with epsilon -1 | `poly1_focal_loss` |
| nothing in particular | `poly1_cross_entropy` with epsilon 1 to 2 | `comp_sum_loss` with tau near 1 |
| adversarial inputs | `smooth_adversarial_comp_sum_loss` | |
"""

from lossary.catalogue import lazy_room

__getattr__, __dir__ = lazy_room(__name__)
