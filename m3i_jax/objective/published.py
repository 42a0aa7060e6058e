"""Named methods of the paper's Table 1 whose public definition differs from the paper's common
skeleton.

Everything that decides the gradient is kept; what is left out is listed. All are trained with
AdamW. `m3i_jax/published_settings.py` has the published settings; `configs/forms.py:form=NAME`
combines both.
"""

from m3i_jax.objective.entropy_terms import EntropyTerm, Koleo
from m3i_jax.objective.posteriors import (
    BarlowTwins,
    Boltzmann,
    Cosine,
    DenseCL,
    NTXent,
    Prototypes,
    SmoothL1,
)
from m3i_jax.objective.prototype_targets import PrototypeSoftmax
from m3i_jax.objective.published_recent import RECENT
from m3i_jax.objective.published_terms import (
    DINO,
    DINOV2,
    MASK_TOKENS,
    OTHER,
    PublishedMethod,
    dino_terms,
    ibot_term,
)
from m3i_jax.objective.terms import (
    FORMS,
    FULL,
    MASKED,
    DecoderHead,
    LinearHead,
    MlpShape,
    Pass,
    ProjectionHead,
    pixel_term,
    pooled_term,
    token_term,
)

_BYOL = ProjectionHead(projector=MlpShape(layers=2), predictor=MlpShape(layers=2))
_MOCO = ProjectionHead(
    pool="cls",
    projector=MlpShape(layers=3, last_norm=True),
    predictor=MlpShape(layers=2, last_norm=True),
)
_SLIP = pooled_term(
    FULL,
    1,
    encoder="online",
    posterior=NTXent(temperature=0.1),
    head=ProjectionHead(pool="cls", projector=MlpShape(layers=3)),
)
_CLIP_LEFT_OUT = (
    "causal attention, QuickGELU and norms with an eps of 1e-5 in the text tower (here exact GELU"
    " and 1e-6)"
)

PUBLISHED: dict[str, PublishedMethod] = {
    "mae": PublishedMethod(
        terms=(pixel_term(MASKED, 0, head=DecoderHead(queries="hidden")),),
        kept=(
            "75 % random cells dropped, normed encoder output, decoder of 8 blocks of 512"
            " over visible and hidden cells with cls, per-patch normalised pixels of hidden"
            " cells"
        ),
        left_out=(
            "its column-first position table (ours is row-first: the same set of numbers,"
            " transposed)"
        ),
    ),
    "data2vec": PublishedMethod(
        terms=(
            token_term(
                Pass(masked=True, mask_tokens=True),
                0,
                blocks=6,
                posterior=SmoothL1(beta=2.0),
                head=LinearHead(),
                hidden=True,
            ),
        ),
        kept=(
            "hidden cells stand as mask tokens, mean of the normalised outputs of the last 6"
            " blocks of the EMA as target, smooth L1 with beta 2 at hidden cells, one linear"
            " map as head"
        ),
        left_out="attention dropout, a shared relative position bias in the place of positions",
    ),
    "feature_distillation": PublishedMethod(
        terms=(
            token_term(FULL, 0, encoder="frozen", posterior=SmoothL1(beta=2.0), head=LinearHead()),
        ),
        kept=(
            "a frozen teacher (objective.target_checkpoint; of another architecture, or several:"
            " objective.teachers), features normalised without scale and offset, smooth L1 with"
            " beta 2, linear head"
        ),
        left_out="shared relative position bias, the cls token among the targets",
    ),
    "byol": PublishedMethod(
        terms=tuple(
            pooled_term(a, b, posterior=Cosine(scale=2.0), head=_BYOL)
            for a, b in ((FULL, 1), (OTHER, 0))
        ),
        kept=(
            "projector and predictor of two layers with batch norm, 2 - 2 cos summed over"
            " both directions, EMA target 0.996 to 1"
        ),
        left_out="LARS; a target that starts from other values than the online network",
    ),
    "moco_v3": PublishedMethod(
        terms=tuple(
            pooled_term(a, b, posterior=Boltzmann(temperature=0.2, scale=0.8), head=_MOCO)
            for a, b in ((FULL, 1), (OTHER, 0))
        ),
        kept=(
            "cls token, projector of three layers, predictor of two, InfoNCE over the keys of"
            " the batch with temperature 0.2, times twice the temperature, both directions"
            " summed, patch embedding frozen, EMA 0.99 to 1"
        ),
        left_out=(
            "projector and predictor whose two layers have hidden and output widths of their"
            " own in ResNet variants"
        ),
    ),
    "simclr": PublishedMethod(
        terms=(
            pooled_term(
                FULL,
                1,
                encoder="online",
                posterior=NTXent(temperature=0.1),
                head=ProjectionHead(projector=MlpShape(layers=2, last_norm=True)),
            ),
        ),
        kept=(
            "one encoder for both views with gradient through both, a head of two layers (three in"
            " its later code) with batch norm after both, NT-Xent against all other views of the"
            " batch"
        ),
        left_out=(
            "LARS; negatives of other microbatches; the scale of the last batch norm; batch norm of"
            " both views together (here of each)"
        ),
    ),
    "barlow_twins": PublishedMethod(
        terms=(
            pooled_term(
                FULL,
                1,
                encoder="online",
                posterior=BarlowTwins(off_diagonal=0.0051),
                head=ProjectionHead(projector=MlpShape(layers=3)),
            ),
        ),
        kept=(
            "projector of three layers of 8,192, cross-correlation over the batch towards the"
            " identity with weight 0.0051"
        ),
        left_out="LARS; statistics across microbatches",
    ),
    "densecl": PublishedMethod(
        terms=(
            pooled_term(
                FULL,
                1,
                posterior=Boltzmann(temperature=0.2),
                head=ProjectionHead(projector=MlpShape(layers=2, norm="none")),
            ),
            token_term(
                FULL,
                1,
                name="dense",
                posterior=DenseCL(temperature=0.2),
                head=ProjectionHead(
                    name="dense",
                    pool="none",
                    projector=MlpShape(layers=2, norm="none"),
                    match="likeness",
                ),
            ),
        ),
        kept=(
            "a global and a dense projector, each token predicts the target token that is"
            " most alike in the encoder's features, half the loss each"
        ),
        left_out=(
            "the queues of 65,536 keys (the batch stands for them), the first 1,000 steps"
            " without the dense half"
        ),
    ),
    "msn": PublishedMethod(
        terms=(
            pooled_term(
                MASKED,
                1,
                posterior=Prototypes(),
                head=ProjectionHead(
                    pool="cls", projector=MlpShape(layers=3, activation="gelu", std=0.02)
                ),
            ),
        ),
        kept=(
            "a masked anchor with dropped cells, head of three layers with GELU, 1,024 prototypes,"
            " sharpened and balanced targets, mean entropy maximised"
        ),
        left_out=(
            "ten small focal views, dropped cells that all images of a device share, the rising"
            " weight decay, the linear EMA schedule over 1.25 runs"
        ),
    ),
    # DINO (arXiv 2104.14294, section 3; facebookresearch/dino, main_dino.py)
    "dino": PublishedMethod(
        terms=dino_terms(FULL, DINO, PrototypeSoftmax(target_temperature=(0.04, 0.04))),
        kept=(
            "cls of two large views and any number of small ones, head of three layers with GELU"
            " and 65,536 prototypes of length 1, EMA of the encoder and all of the head, centring"
            " over the global batch (0.9) before a temperature of 0.04, prediction temperature 0.1,"
            " the mean over all pairs of different views"
        ),
        left_out="the rising weight decay, clipping of each tensor by itself",
    ),
    # iBOT (arXiv 2111.07832, section 3; bytedance/ibot, main_ibot.py)
    "ibot": PublishedMethod(
        terms=(
            # its command of 800 epochs; the code's default for images is 0.04 all along
            *dino_terms(MASK_TOKENS, DINO, PrototypeSoftmax()),
            ibot_term(DINO, PrototypeSoftmax()),
        ),
        kept=(
            "DINO's loss of cls, with a masked large view, and the same loss of each hidden token"
            " against the target's token of the unmasked view, one head of 8,192 prototypes for"
            " both, centres of their own, target temperature 0.04 to 0.07 of both, the patch loss"
            " averaged over both large views although one is masked"
        ),
        left_out=(
            "a random choice of the masked view and a random share of hidden cells (the first view"
            " and 30 %), a patch centre over visible tokens too, trained lengths of the prototypes"
            " of its ViT-S, the rest as in dino"
        ),
    ),
    # DINOv2 (arXiv 2304.07193, section 4 and table 16; facebookresearch/dinov2,
    # dinov2/train/ssl_meta_arch.py)
    "dinov2": PublishedMethod(
        terms=(
            *dino_terms(MASK_TOKENS, DINOV2, PrototypeSoftmax()),
            ibot_term(DINOV2, PrototypeSoftmax()),
            *(
                EntropyTerm(name="koleo", estimator=Koleo(group=64), reads=read, weight=0.1)
                for read in (MASK_TOKENS, OTHER)
            ),
        ),
        kept=(
            "DINO's and iBOT's losses with weight 1, KoLeo of cls before the head with weight 0.1"
            " summed over both large views, neighbours among 64 images, one head of 65,536"
            " prototypes of trained lengths for both, centring, target temperature 0.04 to 0.07 in"
            " 0.3 of the run; objective.prototype_targets=sinkhorn for the constraint of its large"
            " models"
        ),
        left_out=(
            "a random choice of the masked views and of the share of hidden cells (the first view"
            " and 30 %), separate heads and SwiGLU of its large models, stochastic depth by a"
            " subset of the batch, a fifth of the rate for the patch embedding, clipping of each"
            " part by itself, decay of the prototypes' lengths (here of their directions alone),"
            " the rate by the root of the batch size, blur with the complements of these"
            " probabilities (a slip of its code), the rest as in dino"
        ),
    ),
    # I-JEPA (arXiv 2301.08243, section 3; facebookresearch/ijepa, src/masks/multiblock.py)
    "ijepa": PublishedMethod(
        terms=(
            token_term(MASKED, 0, posterior=SmoothL1(beta=1.0), head=DecoderHead(queries="blocks")),
        ),
        kept=(
            "four target blocks of 17.5 % of the view, each predicted by itself by 12 blocks of 384"
            " from a context that shows none of them, features of the EMA encoder after its final"
            " norm and another without scale, smooth L1 with beta 1, no colour change and no flip"
        ),
        left_out=(
            "block sizes and the cut of the context drawn once for a batch (here of each image,"
            " with fixed counts, cut at either end), places that never reach the last row and"
            " column, the linear EMA schedule, the rising weight decay, the predictor's last norm,"
            " its initial values (normal, 0.02)"
        ),
    ),
    "siamese_im": PublishedMethod(
        terms=FORMS["sim"],
        kept=(
            "dense features of the other view from a masked one, decoder and projector with"
            " batch statistics, relative positions, second-moment term 0.02"
        ),
        left_out="flips before crops (the same distribution of views)",
    ),
    "clip": PublishedMethod(
        terms=FORMS["weakly_supervised"],
        kept=(
            "symmetric softmax over the global batch, learned temperature up to 100, cls"
            " token, last text token"
        ),
        left_out=_CLIP_LEFT_OUT,
    ),
    "slip": PublishedMethod(
        terms=(*FORMS["weakly_supervised"], _SLIP),
        kept="CLIP on one view plus SimCLR on two, added with weight 1",
        left_out=(
            "a third, weakly augmented view for CLIP: it reads SimCLR's first one; batch norm of"
            " both views together in SimCLR's head (here of each); one norm of cls before CLIP's"
            f" linear map (here the pooling has a second one); {_CLIP_LEFT_OUT}"
        ),
    ),
    "deit": PublishedMethod(
        terms=FORMS["supervised"],
        kept="the class from the cls token, uniform stochastic depth, LayerScale, colours",
        left_out=(
            "mixup, cutmix, binary cross-entropy, LAMB and its rate, repeated augmentation, images"
            " of 192 pixels, just one of gray, solarization and blur for every image (3-Augment)"
        ),
    ),
    "milan": PublishedMethod(
        terms=(token_term(MASKED, 0, encoder="frozen", posterior=Cosine()),),
        kept=(
            "2 - 2 cos of features of a frozen encoder (objective.target_checkpoint) from a masked"
            " view, decoder of 8 blocks of 512"
        ),
        left_out=(
            "sampling of cells by the teacher's attention, the prompting decoder, CLIP's projection"
            " of the features (here they are normalised), the cls token among the targets"
        ),
    ),
    **RECENT,
}

# Rows of Table 1 that this project does not implement, and why.
LEFT_OUT = {
    "beit": (
        "its targets are codes of a discrete VAE trained elsewhere; a frozen checkpoint gives"
        " features, not codes (see milan)"
    ),
    "beit_v2": (
        "its targets are codes of a tokenizer that a method of its own distils from CLIP; see milan"
        " for its features"
    ),
    "mocov2": "its queue is state that no other method has; moco_v3 is its successor without one",
}
