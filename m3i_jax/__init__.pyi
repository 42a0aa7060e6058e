# ruff: noqa: I001 - one statement for each module
"""Types of the names that `import m3i_jax` offers and imports on first use. tests/test_packaging.py
compares this list with `dir(m3i_jax)`."""

from m3i_jax.evaluation.load import load as load
from m3i_jax.models.dcnv3 import dcnv3 as dcnv3
from m3i_jax.models.networks import (
    DCNv3 as DCNv3,
    InternImage as InternImage,
    ViT as ViT,
)
from m3i_jax.models.dense.deformable_attention import (
    deformable_attention as deformable_attention,
)
from m3i_jax.models.dense.map_sampling import (
    mask_targets as mask_targets,
    multilevel_roi_align as multilevel_roi_align,
    paste_masks as paste_masks,
    roi_align as roi_align,
)
from m3i_jax.objective import (
    assignment as assignment,
    balance as balance,
    boxes as boxes,
    caption_posterior as caption_posterior,
    collapse as collapse,
    contrastive as contrastive,
    dense_losses as dense_losses,
    ema as ema,
    entropy as entropy,
    entropy_terms as entropy_terms,
    information as information,
    losses as losses,
    masks as masks,
    mixing as mixing,
    positions as positions,
    posteriors as posteriors,
    prototype_targets as prototype_targets,
    published as published,
    registry as registry,
    regression_losses as regression_losses,
    segmentation_scores as segmentation_scores,
    sigmoid_pairs as sigmoid_pairs,
    terms as terms,
)
from m3i_jax.objective.assignment import (
    hungarian as hungarian,
    match_boxes as match_boxes,
    sample_labels as sample_labels,
)
from m3i_jax.objective.balance import (
    balance_weight as balance_weight,
    feature_norm as feature_norm,
    track_balance as track_balance,
)
from m3i_jax.objective.boxes import (
    anchors as anchors,
    box_area as box_area,
    box_iou as box_iou,
    clip_boxes as clip_boxes,
    decode_boxes as decode_boxes,
    encode_boxes as encode_boxes,
    generalized_box_iou as generalized_box_iou,
    nms as nms,
)
from m3i_jax.objective.collapse import (
    alignment as alignment,
    centered_energy as centered_energy,
    effective_rank as effective_rank,
    target_std as target_std,
    uniformity as uniformity,
)
from m3i_jax.objective.contrastive import (
    assignments as assignments,
    barlow_twins as barlow_twins,
    dense_boltzmann as dense_boltzmann,
    densecl as densecl,
    nt_xent as nt_xent,
    prototypes as prototypes,
)
from m3i_jax.objective.dense_losses import (
    binary_cross_entropy as binary_cross_entropy,
    dice as dice,
    federated_categories as federated_categories,
    federated_cross_entropy as federated_cross_entropy,
    pixel_cross_entropy as pixel_cross_entropy,
    sigmoid_focal as sigmoid_focal,
)
from m3i_jax.objective.ema import (
    cosine_momentum as cosine_momentum,
    track_target as track_target,
)
from m3i_jax.objective.entropy import (
    SIGREG_FLOOR as SIGREG_FLOOR,
    coding_rate as coding_rate,
    koleo as koleo,
    moment_energy as moment_energy,
    nearest_entropy as nearest_entropy,
    sigreg as sigreg,
    sphere_log_area as sphere_log_area,
    uniformity_loss as uniformity_loss,
    variance_covariance as variance_covariance,
    variance_covariance_sums as variance_covariance_sums,
)
from m3i_jax.objective.entropy_terms import (
    EntropyTerm as EntropyTerm,
)
from m3i_jax.objective.information import (
    MARGINALS as MARGINALS,
    category_bits as category_bits,
    gaussian_bits as gaussian_bits,
    softmax_bits as softmax_bits,
)
from m3i_jax.objective.losses import (
    boltzmann as boltzmann,
    category as category,
    gaussian as gaussian,
    layer_normalize as layer_normalize,
    patch_normalize as patch_normalize,
    second_moment as second_moment,
    text as text,
)
from m3i_jax.objective.masks import (
    blockwise as blockwise,
    uniform as uniform,
)
from m3i_jax.objective.mixing import (
    gather as gather,
    mix as mix,
    partner as partner,
    split as split,
    unmix as unmix,
)
from m3i_jax.objective.positions import (
    coordinates as coordinates,
    relative_positions as relative_positions,
    same_view_positions as same_view_positions,
    sincos_2d as sincos_2d,
)
from m3i_jax.objective.prototype_targets import (
    centering as centering,
    sinkhorn as sinkhorn,
    soft_cross_entropy as soft_cross_entropy,
    track_centers as track_centers,
)
from m3i_jax.objective.published import (
    PUBLISHED as PUBLISHED,
)
from m3i_jax.objective.registry import (
    register_form as register_form,
)
from m3i_jax.objective.regression_losses import (
    cosine as cosine,
    smooth_l1 as smooth_l1,
    squared_error as squared_error,
    token_similarity as token_similarity,
)
from m3i_jax.objective.segmentation_scores import (
    confusion_matrix as confusion_matrix,
    miou as miou,
)
from m3i_jax.objective.caption_posterior import caption as caption
from m3i_jax.objective.sigmoid_pairs import (
    text_sigmoid as text_sigmoid,
    text_sigmoid_sums as text_sigmoid_sums,
)
from m3i_jax.objective.terms import (
    FORMS as FORMS,
    Pass as Pass,
    Target as Target,
    Term as Term,
)
from m3i_jax.version import __version__ as __version__

__all__: list[str]
