"""Losses: what is minimised, one value per sample; the user takes the mean, or `lossary.criterion.Criterion` does.

Three families. One class of many: the engine `_softmax.log_prob` gives the log-probability of the true class, at a
temperature and with a margin, with a lean gradient, so a loss that is a function of it costs no more than
cross-entropy, whatever the function. Many labels at once: `_sigmoid.binary_losses` sums focal terms of every label,
value and slope together, on blocks of rows that stay in the cache. Sequences and codes: a lattice of alignments, the
digits of a number, the levels of a score. The field's other common losses, and its metrics, are in `loss_registry` and
`metric_registry`.

| Your trouble | Try first | Then |
|---|---|---|
| noisy labels | `comp_sum_loss` with tau 1.3 to 1.7 | `aldr_kl_loss` or `ldr_kl_loss` with normalize=True |
| wrong labels, two classes, a network that overfits | `EnsLoss` | |
| rare classes, few positives | `poly1_cross_entropy` with epsilon -1 | `poly1_focal_loss` |
| rare classes, F1 is reported | `batch_dice_loss` | cross-entropy and a threshold chosen for F1 |
| few of many labels are there, or some are missed | `asymmetric_loss` | `AdaptiveAsymmetricLoss` |
| many positives unmarked, negatives not to be trusted | `pu_multilabel_loss` | `pu_mixup_consistency` beside it |
| a few real targets gone wild | `loss_registry`, its "huber" | `log_cosh_loss` |
| boxes | `diou_loss` | `ciou_loss` |
| embeddings of faces or products | `arcface_loss` | `circle_loss` |
| sound events, frames, F1 at 0.5 | `multilabel_dice_loss` | its scores: `segment_based_f1_er` |
| few labels, many inputs | `VATLoss` | `conditional_entropy_loss` beside it |
| some values of a real target are rare | `imbalanced_regression_sampler` | `RegressionWithClassificationLoss` |
| a real target with several peaks | `DecodingRegressionHead` | |
| scores that people gave, with a spread | `score_to_soft_label` | `thurstone_fidelity_loss` beside it |
| speech, transcribed while it is heard | `rnnt_loss` with `TransformerTransducer` | |
| overconfidence | `squentropy_loss` | `TempNet` |
| the softmax itself does not fit | `LegendreTron` | |
| the right class among the first few is enough | `ldr_top_k_loss` | `z_loss`, for very many classes |
| ten thousand classes or more | `FactoredOutput` with `z_loss_from_sums` | |
| some contexts have one answer, others many | `TempNet` with `tau_cross_entropy` | `robust_temperature_loss` |
| adversarial inputs | `smooth_adversarial_comp_sum_loss` with `margin_shift_attack` | |
| a softmax head that generalises poorly | `HRRClassificationLoss` | |
| is the mean over batches the metric that counts? | `simpsons_bias` | |
| nothing in particular | `squentropy_loss`, `poly1_cross_entropy` with epsilon 1 to 2 | `comp_sum_loss` near tau 1 |

What we found, on small tasks: Poly-1 classifies a point better than cross-entropy at the same cost, a learned link
(`Legendretron`) 1.4 to 10 points better than logistic regression, and VAT 7 points better where most inputs have no
label. Soft labels beat the nearest level of a rating. For many labels, weighted cross-entropy with tuned weight decay
is hard to beat: the asymmetric loss led by less than its margin, Dice and the positive-unlabelled loss did worse.
Against wrong labels `ALDRKLLoss` kept up with the best of the usual losses where the wrong class follows from the true
one, not where it is uniform.
"""

from lossary.catalogue import lazy_room

__getattr__, __dir__ = lazy_room(__name__)
