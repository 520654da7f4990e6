"""All distillation losses: every public class and function by name. Importing this package registers the losses."""

from yolo_kd.losses.at import AT, attention_map, attention_transfer
from yolo_kd.losses.base import FeatureLoss, Loss, check_key, find, parameters, registered
from yolo_kd.losses.bckd import BCKD, probability_gap
from yolo_kd.losses.costs import format_cost, measured_costs
from yolo_kd.losses.crosskd import CrossKD, TeacherTails, align_scale, crosskd_box, crosskd_cls
from yolo_kd.losses.cwd import CWD, cwd
from yolo_kd.losses.dfl import DFL, distribution_kl
from yolo_kd.losses.fgd import FGD, ContextBlock, Sums, fgd_sums, focal_masks, normalise
from yolo_kd.losses.fgfi import (
    FGFI,
    Anchors,
    anchor_overlaps,
    grid_anchors,
    imitation_hits,
    imitation_loss,
    masked_error,
)
from yolo_kd.losses.holistic import (
    Adversary,
    Critic,
    Holistic,
    SelfAttention,
    SpectralConv2d,
    adversarial_loss,
    critic_loss,
    gradient_penalty,
    score_maps,
)
from yolo_kd.losses.kernels.sea_alignment import cell_alignment
from yolo_kd.losses.ld import LD, localisation_kl, reference_boxes, region_overlap, valuable_region
from yolo_kd.losses.mgd import MGD, generator, keep_mask, mgd_sum
from yolo_kd.losses.mimic import Mimic, box_mask, mimic
from yolo_kd.losses.objectness import Objectness, objectness_box, objectness_class, objectness_weights
from yolo_kd.losses.objectness_l2 import ObjectnessL2, objectness_logit_l2
from yolo_kd.losses.pkd import PKD, pkd
from yolo_kd.losses.reviewkd import Fusion, ReviewKD, hcl, review
from yolo_kd.losses.sea import (
    SEA,
    Categories,
    anchor_distillation,
    category_anchors,
    count_cells,
    covered_cells,
    semantic_masks,
)
from yolo_kd.losses.structured import (
    Structured,
    affinity,
    pair_wise,
    pixel_wise,
    pixel_wise_sigmoid,
    pool_by_scale,
    pool_to_nodes,
)
from yolo_kd.losses.ultralytics import Ultralytics, score_weighted_l2
