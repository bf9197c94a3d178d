"""Losses: what is minimised, one value per sample; the user takes the mean, or `lossary.criterion.Criterion` does.

The engine is `_softmax.log_prob`: the log-probability of the true class, at a temperature and with a margin, with a
lean gradient. A loss that is a function of it costs no more than cross-entropy, whatever the function.

| Your trouble | Try first | Then |
|---|---|---|
| noisy labels | `comp_sum_loss` with tau 1.3 to 1.7 | `aldr_kl_loss` or `ldr_kl_loss` with normalize=True |
| rare classes, few positives | `poly1_cross_entropy` with epsilon -1 | `poly1_focal_loss` |
| overconfidence | `squentropy_loss` | `TempNet` |
| the right class among the first few is enough | `ldr_top_k_loss` | `z_loss`, for very many classes |
| ten thousand classes or more | `FactoredOutput` with `z_loss_from_sums` | |
| some contexts have one answer, others many | `TempNet` with `tau_cross_entropy` | `robust_temperature_loss` |
| adversarial inputs | `smooth_adversarial_comp_sum_loss` with `margin_shift_attack` | |
| a softmax head that generalises poorly | `HRRClassificationLoss` | |
| nothing in particular | `squentropy_loss`, `poly1_cross_entropy` with epsilon 1 to 2 | `comp_sum_loss` near tau 1 |
"""

from lossary.catalogue import lazy_room

__getattr__, __dir__ = lazy_room(__name__)
