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
| rare classes | `gumbel_optimized_loss` | |
| a class of which there are a few pictures | `AttentionRPN` with `MultiRelationHead` | |
| cells, nuclei, round things that touch | `predict_instances` on `star_distances` | |
| curved or slanted outlines, text | `fourier_contour_encode` | `polygon_nms`; `MLPMaskDecoder` for dense text |
| bars and trusses | `render_components` | `dice_reconstruction_loss` |
| how many, marked by points | `dm_count_loss` | |
| landmarks | `acr_loss` with `SmoothFace` | squared error, which was better here |
| a few labelled pixels | `agmm_loss` | |
| two cameras, one of them in the dark | `cross_modal_uncertainty_weights` | `illumination_aware_nms` |
| who does what to whom | `AttractRepelLoss` | `bidirectional_relationship_recall` measures it |
| several answers may be right | `DissimilarityLearner` | `min_expected_loss_prediction` |
| many names for one thing, open vocabularies | `nms_average_precision` | `hard_negative_queries` |
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
