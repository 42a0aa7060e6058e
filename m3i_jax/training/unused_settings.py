"""Settings that the objective of a training run does not read."""

import dataclasses
import operator
from collections.abc import Iterable

from m3i_jax import schema
from m3i_jax.errors import UserError
from m3i_jax.models import backbones
from m3i_jax.objective import derived_terms, prototype_targets, registry
from m3i_jax.objective.terms import DecoderHead, LinearHead
from m3i_jax.training import plan
from m3i_jax.training.unused_model_settings import (
    reject_unused_model_settings,
    unread_model_settings,
)

# not its probability, which follows from the length of a run also without operations
_OF_OPERATIONS = ("data.rand_augment.magnitude", "data.rand_augment.deviation")


def ignored_settings(config: schema.Config) -> frozenset[str]:
    """Returns the settings of the network and of augmentations that a run of any objective does not
    read, whatever they are: where they differ from those of a run that is resumed, nothing does.

    >>> "data.rand_augment.magnitude" in ignored_settings(schema.Config())
    True
    """
    unread = () if config.data.rand_augment.ops else _OF_OPERATIONS
    return unread_model_settings(config).union(unread)


def reject_unused_settings(config: schema.Config, trains: Iterable[tuple[str, ...]]) -> None:
    """Refuse a setting that neither the network nor an objective of a training run reads.

    Only for training: a run that is evaluated or reused as an encoder may keep settings that its
    objective does not read. `objective.pairing` is exempt, since configs/quickstart.py sets it for
    any form.

    Args:
      config: settings.
      trains: the objectives, each a tuple of names of forms.

    Raises:
      UserError: with the setting, why it does nothing, and its default.

    >>> reject_unused_settings(schema.Config(), [("sim",)])
    """
    reject_unused_model_settings(config)
    o, default_config = config.objective, schema.Config()
    objectives = list(trains)
    count = len(config.small_views)
    found = [plan.terms_of(dataclasses.replace(o, forms=forms), count) for forms in objectives]
    terms = [t for each, _ in found for t in each]
    entropies = [t for _, each in found for t in each]
    names = ", ".join("+".join(forms) for forms in objectives)
    in_blocks = config.data.mask == "multi_block"
    mixed, blended = any(t.reads.mixed for t in terms), any(t.reads.blended for t in terms)
    predicted = {t.target.of for t in terms}
    encoders = {t.target.encoder for t in terms}
    # teachers take the place of a frozen target that a linear map predicts
    reads_checkpoint = "snapshot" in encoders or any(
        t.target.encoder == "frozen" and not (o.teachers and isinstance(t.head, LinearHead))
        for t in terms
    )
    targets = encoders & set(derived_terms.ENCODERS)
    small = any(t.reads.view >= derived_terms.SMALL for t in terms)
    assigns = bool(prototype_targets.prototype_terms(tuple(terms)))
    no_assignment = "no assignment to prototypes (as in dino)"
    no_caption = "no decoder of captions (as in cappa)"
    no_snapshot = "no snapshot of the EMA encoder (as in dinov3_gram)"
    # a backbone that has no cls token leaves the settings of a recipe as they are
    no_cls_token = (
        not config.model.encoder.cls_token
        and backbones.get_backbone(config.model).has_cls_token
        and any(isinstance(t.head, DecoderHead) for t in terms)
    )
    no_operation = "no operation of RandAugment (data.rand_augment.ops=0)"
    no_blend = "no blended input (as in finetune)"
    for key, is_read, reason in (
        ("data.small_views", small, "no small view"),
        ("objective.prototype_targets", assigns, no_assignment),
        ("objective.target_temperature", assigns, no_assignment),
        ("optim.freeze_prototypes", assigns, no_assignment),
        ("objective.parallel_captions", "caption" in predicted, no_caption),
        ("data.regions", predicted & {"box", "region"}, "no text of an object (as in locca)"),
        ("objective.target_checkpoint", reads_checkpoint, "no frozen target"),
        ("objective.target_encoder", targets, "no target encoder"),
        ("objective.teacher_weight", o.teachers, "no teacher (objective.teachers)"),
        ("data.mask_blocks", in_blocks, "no mask of several blocks (data.mask=multi_block)"),
        ("data.mask_block_share", in_blocks, "no mask of several blocks (data.mask=multi_block)"),
        ("objective.snapshot_at", "snapshot" in encoders, no_snapshot),
        ("objective.isolate", mixed, "no mixed input"),
        ("objective.soft_label", mixed, "no mixed input"),
        ("data.augment.mixup", blended, no_blend),
        ("data.augment.cutmix", blended, no_blend),
        ("model.decoder.cls", not no_cls_token, "no cls token (model.encoder.cls_token=false)"),
        *((key, config.data.rand_augment.ops, no_operation) for key in _OF_OPERATIONS),
    ):
        value, default = (operator.attrgetter(key)(each) for each in (config, default_config))
        if value != default and not is_read:
            raise UserError(
                f"config.{key}: {value!r} has no effect: there is {reason} in {names}; leave it at"
                f" {default!r} or choose another form"
            )
    known = sorted(
        {t.name for each in (*registry.forms().values(), terms, entropies) for t in each}
    )
    for name in o.second_group if o.second_group != default_config.objective.second_group else ():
        if name not in known:
            raise UserError(
                f"config.objective.second_group: {name!r} is not a term; the terms are"
                f" {', '.join(known)}"
            )
