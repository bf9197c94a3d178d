"""Detection: what is done with boxes, masks and keypoints, before and after the network.

The engines: `_overlap` (boxes, rotated boxes and any simple polygon; `pairwise` for tables of them, `box_iou` with
gradients), `_suppress.suppress` (one greedy loop for every overlap and decay: take the best detection left, decay the
scores of those it overlaps, repeat; a tree keeps it from comparing shapes far apart), `_assign` (which prediction
learns which object: task-aligned, ATSS, Hungarian, by overlap), `_stars` and `_render` (star-convex shapes, masks of
polygons), `_average_precision` (COCO's measures) and `_coco` (its JSON). numba compiles the loops where it is installed
(`pip install lossary[fast]`), numpy runs them where it is not.

| Your trouble | Try first | Then |
|---|---|---|
| objects in crowds, true boxes that overlap | `soft_nms` with method "gaussian" | `batched_soft_nms` for classes |
| no NMS at all | `DualAssignmentLoss` on a dense head | `HybridAssignmentTrainer` on a transformer |
| which point learns which object | `task_aligned_assign` | `atss_assign`, `adaptive_anchor_assign` for long boxes |
| boxes seen from above, turned | `gaussian_heatmap_targets`, `decode_center_peaks` | `keypoint_sensitive_warp` |
| rare classes | `gumbel_optimized_loss`, though here it found more of the frequent ones | |
| a class of which there are a few pictures | `AttentionRPN` with `MultiRelationHead` | |
| cells, nuclei, round things that touch | `predict_instances` on `star_distances` | a watershed, better here |
| curved or slanted outlines, text | `fourier_contour_encode` | `polygon_nms`; `MLPMaskDecoder` for dense text |
| bars and trusses | `render_components` | `dice_reconstruction_loss` |
| how many, marked by points | `dm_count_loss` | |
| landmarks | `acr_loss` with `SmoothFace` | squared error, which was better here |
| a few labelled pixels | `agmm_loss` | |
| two cameras, one of them in the dark | `cross_modal_uncertainty_weights` | `illumination_aware_nms` |
| who does what to whom | `AttractRepelLoss` | `bidirectional_relationship_recall` measures it |
| several answers may be right | `DissimilarityLearner` | `min_expected_loss_prediction` |
| many names for one thing, open vocabularies | `nms_average_precision` | `hard_negative_queries` |

What we found, on tasks of a minute or so:

- Crowds: Gaussian decay beats hard suppression by 3.5 points of AP among drawn boxes and 1.4 among pasted faces that a
  real detector finds, and loses nothing where boxes are apart.
- No suppression: training one-to-many beside one-to-one beats one-to-one alone, by 8.5 points on a dense head and 5.7
  on a transformer; but the one-to-one scores still gained 7.6 from suppression. Peaks of heat maps needed none.
- Shapes: Fourier contours beat corners and rays, also on photographs; drawn bars beat skeletons by 22 points of IoU;
  dense text wants fully connected masks. Stars did not beat a watershed on the same network's foreground.
- Counting: matching distributions is a fifth better than smoothed dots.
- Without effect here, or worse: difficulty weights on landmarks (ACR), mixtures on scribbles (AGMM), the Gumbel loss
  on rare classes, action labels for poses, corners learnt beside centres.
"""

from lossary.catalogue import lazy_room

__getattr__, __dir__ = lazy_room(
    __name__,
    {
        "average_precision": "lossary.detection._average_precision",
        "coco_summary": "lossary.detection._average_precision",
        "read_annotations": "lossary.detection._coco",
        "read_detections": "lossary.detection._coco",
        "write_annotations": "lossary.detection._coco",
        "write_detections": "lossary.detection._coco",
        "box_iou": "lossary.detection._overlap",
        "pairwise": "lossary.detection._overlap",
        "suppress": "lossary.detection._suppress",
    },
)
