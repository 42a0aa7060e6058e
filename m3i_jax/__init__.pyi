"""Types of the names that `import m3i_jax` offers and imports on first use. tests/test_packaging.py
compares this list with `dir(m3i_jax)`."""

from m3i_jax.evaluation.load import load as load
from m3i_jax.models.dense.map_sampling import (
    mask_targets as mask_targets,
)
from m3i_jax.models.dense.map_sampling import (
    multilevel_roi_align as multilevel_roi_align,
)
from m3i_jax.models.dense.map_sampling import (
    paste_masks as paste_masks,
)
from m3i_jax.models.dense.map_sampling import (
    roi_align as roi_align,
)
from m3i_jax.objective import (
    assignment as assignment,
)
from m3i_jax.objective import (
    balance as balance,
)
from m3i_jax.objective import (
    boxes as boxes,
)
from m3i_jax.objective import (
    collapse as collapse,
)
from m3i_jax.objective import (
    contrastive as contrastive,
)
from m3i_jax.objective import (
    dense_losses as dense_losses,
)
from m3i_jax.objective import (
    ema as ema,
)
from m3i_jax.objective import (
    information as information,
)
from m3i_jax.objective import (
    losses as losses,
)
from m3i_jax.objective import (
    masks as masks,
)
from m3i_jax.objective import (
    mixing as mixing,
)
from m3i_jax.objective import (
    positions as positions,
)
from m3i_jax.objective import (
    posteriors as posteriors,
)
from m3i_jax.objective import (
    published as published,
)
from m3i_jax.objective import (
    registry as registry,
)
from m3i_jax.objective import (
    regression_losses as regression_losses,
)
from m3i_jax.objective import (
    segmentation_scores as segmentation_scores,
)
from m3i_jax.objective import (
    terms as terms,
)
from m3i_jax.objective.assignment import (
    hungarian as hungarian,
)
from m3i_jax.objective.assignment import (
    match_boxes as match_boxes,
)
from m3i_jax.objective.assignment import (
    sample_labels as sample_labels,
)
from m3i_jax.objective.balance import (
    balance_weight as balance_weight,
)
from m3i_jax.objective.balance import (
    feature_norm as feature_norm,
)
from m3i_jax.objective.balance import (
    track_balance as track_balance,
)
from m3i_jax.objective.boxes import (
    anchors as anchors,
)
from m3i_jax.objective.boxes import (
    box_area as box_area,
)
from m3i_jax.objective.boxes import (
    box_iou as box_iou,
)
from m3i_jax.objective.boxes import (
    clip_boxes as clip_boxes,
)
from m3i_jax.objective.boxes import (
    decode_boxes as decode_boxes,
)
from m3i_jax.objective.boxes import (
    encode_boxes as encode_boxes,
)
from m3i_jax.objective.boxes import (
    generalized_box_iou as generalized_box_iou,
)
from m3i_jax.objective.boxes import (
    nms as nms,
)
from m3i_jax.objective.collapse import (
    alignment as alignment,
)
from m3i_jax.objective.collapse import (
    centered_energy as centered_energy,
)
from m3i_jax.objective.collapse import (
    effective_rank as effective_rank,
)
from m3i_jax.objective.collapse import (
    target_std as target_std,
)
from m3i_jax.objective.collapse import (
    uniformity as uniformity,
)
from m3i_jax.objective.contrastive import (
    assignments as assignments,
)
from m3i_jax.objective.contrastive import (
    barlow_twins as barlow_twins,
)
from m3i_jax.objective.contrastive import (
    dense_boltzmann as dense_boltzmann,
)
from m3i_jax.objective.contrastive import (
    densecl as densecl,
)
from m3i_jax.objective.contrastive import (
    nt_xent as nt_xent,
)
from m3i_jax.objective.contrastive import (
    prototypes as prototypes,
)
from m3i_jax.objective.dense_losses import (
    binary_cross_entropy as binary_cross_entropy,
)
from m3i_jax.objective.dense_losses import (
    dice as dice,
)
from m3i_jax.objective.dense_losses import (
    federated_categories as federated_categories,
)
from m3i_jax.objective.dense_losses import (
    federated_cross_entropy as federated_cross_entropy,
)
from m3i_jax.objective.dense_losses import (
    pixel_cross_entropy as pixel_cross_entropy,
)
from m3i_jax.objective.dense_losses import (
    sigmoid_focal as sigmoid_focal,
)
from m3i_jax.objective.ema import (
    cosine_momentum as cosine_momentum,
)
from m3i_jax.objective.ema import (
    track_target as track_target,
)
from m3i_jax.objective.information import (
    MARGINALS as MARGINALS,
)
from m3i_jax.objective.information import (
    category_bits as category_bits,
)
from m3i_jax.objective.information import (
    gaussian_bits as gaussian_bits,
)
from m3i_jax.objective.information import (
    softmax_bits as softmax_bits,
)
from m3i_jax.objective.losses import (
    boltzmann as boltzmann,
)
from m3i_jax.objective.losses import (
    category as category,
)
from m3i_jax.objective.losses import (
    gaussian as gaussian,
)
from m3i_jax.objective.losses import (
    layer_normalize as layer_normalize,
)
from m3i_jax.objective.losses import (
    patch_normalize as patch_normalize,
)
from m3i_jax.objective.losses import (
    second_moment as second_moment,
)
from m3i_jax.objective.losses import (
    text as text,
)
from m3i_jax.objective.masks import (
    blockwise as blockwise,
)
from m3i_jax.objective.masks import (
    uniform as uniform,
)
from m3i_jax.objective.mixing import (
    gather as gather,
)
from m3i_jax.objective.mixing import (
    mix as mix,
)
from m3i_jax.objective.mixing import (
    partner as partner,
)
from m3i_jax.objective.mixing import (
    split as split,
)
from m3i_jax.objective.mixing import (
    unmix as unmix,
)
from m3i_jax.objective.positions import (
    coordinates as coordinates,
)
from m3i_jax.objective.positions import (
    relative_positions as relative_positions,
)
from m3i_jax.objective.positions import (
    same_view_positions as same_view_positions,
)
from m3i_jax.objective.positions import (
    sincos_2d as sincos_2d,
)
from m3i_jax.objective.published import (
    PUBLISHED as PUBLISHED,
)
from m3i_jax.objective.registry import (
    register_form as register_form,
)
from m3i_jax.objective.regression_losses import (
    cosine as cosine,
)
from m3i_jax.objective.regression_losses import (
    smooth_l1 as smooth_l1,
)
from m3i_jax.objective.segmentation_scores import (
    confusion_matrix as confusion_matrix,
)
from m3i_jax.objective.segmentation_scores import (
    miou as miou,
)
from m3i_jax.objective.terms import (
    FORMS as FORMS,
)
from m3i_jax.objective.terms import (
    Pass as Pass,
)
from m3i_jax.objective.terms import (
    Target as Target,
)
from m3i_jax.objective.terms import (
    Term as Term,
)
from m3i_jax.version import __version__ as __version__

__all__: list[str]
