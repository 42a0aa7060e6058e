"""Named methods with entropy terms, and those that join captions and self-distillation: rows of the
formula that are younger than the paper. As in `published`, everything that decides the gradient is
kept, and what is left out is listed."""

import dataclasses

from m3i_jax.objective.caption_posterior import CaptionSoftmax
from m3i_jax.objective.entropy_terms import (
    AnyTerms,
    CodingRate,
    EntropyEstimator,
    EntropyTerm,
    Koleo,
    Sigreg,
    VarianceCovariance,
)
from m3i_jax.objective.posteriors import (
    Cosine,
    SmoothL1,
    SquaredError,
    TextSigmoid,
    TokenSimilarity,
)
from m3i_jax.objective.prototype_targets import PrototypeSoftmax
from m3i_jax.objective.published_terms import (
    DINO,
    MASK_TOKENS,
    OTHER,
    SMALL,
    PublishedMethod,
    caption_term,
    dino_terms,
    ibot_term,
)
from m3i_jax.objective.terms import (
    FORMS,
    FULL,
    MASKED,
    ClusterHead,
    DecoderHead,
    LinearHead,
    MlpShape,
    ProjectionHead,
    Target,
    Terms,
    pooled_term,
    text_term,
    token_term,
)

_CAPI = PrototypeSoftmax(
    temperature=0.12, constraint="position_sinkhorn", target_temperature=(0.06, 0.06)
)
# every token as the encoder returns it
_TOKENS = ProjectionHead(name="tokens", pool="none")
_MLP3 = ProjectionHead(projector=MlpShape(layers=3))
_SIM = ProjectionHead(
    pool="cls", projector=MlpShape(layers=3, norm="none", activation="gelu", std=0.02)
)


def _towards_centre(scale: float) -> Terms:
    """Squared distance of every view from the mean of the large ones, both with gradient."""
    centre = Target(of="pooled", view=0, others=(1,), encoder="online")
    posterior = SquaredError(scale=scale)
    return tuple(
        pooled_term(read, 0, target=centre, posterior=posterior, head=_MLP3, weight=1 / 3)
        for read in (FULL, OTHER, SMALL)
    )


def _with_small_and_hidden(hidden: float) -> Terms:
    """Self-distillation beside captions: small views predict the assignment of the whole view, and
    hidden tokens, `hidden` times as heavy, those of its tokens."""
    return (
        pooled_term(SMALL, 0, posterior=PrototypeSoftmax(), head=DINO),
        dataclasses.replace(ibot_term(DINO, PrototypeSoftmax()), weight=hidden),
    )


_CAPPA_LEFT_OUT = "Adafactor, a SentencePiece vocabulary of C4"


def _of_both_views(
    name: str, estimator: EntropyEstimator, head: ProjectionHead, weight: float
) -> tuple[EntropyTerm, ...]:
    return tuple(
        EntropyTerm(name=name, estimator=estimator, reads=read, head=head, weight=weight)
        for read in (FULL, OTHER)
    )


RECENT: dict[str, PublishedMethod] = {
    # VICReg (arXiv 2105.04906, section 4.1; facebookresearch/vicreg, main_vicreg.py)
    "vicreg": PublishedMethod(
        terms=(
            pooled_term(FULL, 1, encoder="online", posterior=SquaredError(scale=25.0), head=_MLP3),
            *_of_both_views("variance_covariance", VarianceCovariance(), _MLP3, 0.5),
        ),
        kept=(
            "one encoder with gradient through both views, projector of three layers of 8,192, 25"
            " times squared error, 25 times variance (mean of both views), covariance (sum of"
            " both), moments over the batch"
        ),
        left_out="LARS",
    ),
    # LeJEPA (arXiv 2511.08544, section 5; rbalestr-lab/lejepa, MINIMAL.md for the constants)
    "lejepa": PublishedMethod(
        terms=(
            *_towards_centre(0.98),
            *(
                EntropyTerm(
                    name="sigreg",
                    estimator=Sigreg(slices=256),
                    reads=read,
                    head=_MLP3,
                    weight=0.02 / 3,
                )
                for read in (FULL, OTHER, SMALL)
            ),
        ),
        kept=(
            "no teacher and no stopped gradient, 0.98 times the mean squared distance of all views"
            " from the mean of the large ones, 0.02 times the mean over views of SIGReg with 256"
            " directions and 17 knots up to 3, projector of three layers with batch norm"
        ),
        left_out=(
            "the paper's constants (0.05, 1,024 directions, knots up to 5), which differ from those"
            " of its example, cls after a norm and a linear map to 512 as the feature of an image"
            " (here the mean of its tokens), the mean of all views as their centre in its example"
            " (here of the large ones), batch norm of all views together (here of each)"
        ),
    ),
    # SimDINO (arXiv 2502.10385, section 4; RobinWu218/SimDINO, simdino/main_dino.py)
    "simdino": PublishedMethod(
        terms=(
            *dino_terms(FULL, _SIM, Cosine(scale=0.5)),
            *_of_both_views("coding_rate", CodingRate(eps=0.05, scaled=True), _SIM, 0.5),
        ),
        kept=(
            "DINO's views and pairs, head of three layers to 256 without prototypes, cosine to the"
            " EMA target of another view, coding rate of the online large views times (D + m) / (D"
            " m) with eps 0.05, its command's; no temperature, centre or Sinkhorn"
        ),
        left_out=(
            "the rising weight decay, the coding rate of one"
            " device (here of the batch; CodingRate.group sets another number of rows) and of the"
            " mean with the target's features (here of the online ones)"
        ),
    ),
    # DINOv3's Gram anchoring (arXiv 2508.10104, sections 4.2 and 4.3; facebookresearch/dinov3,
    # dinov3/loss/gram_loss.py), to be joined: dinov2+dinov3_gram
    "dinov3_gram": PublishedMethod(
        terms=tuple(
            token_term(
                read,
                read.view,
                name="gram",
                target=Target(of="tokens", view=read.view, encoder="snapshot", enlarge=2),
                posterior=TokenSimilarity(),
                head=_TOKENS,
            )
            for read in (MASK_TOKENS, OTHER)
        ),
        kept=(
            "squared error of the cosines of all pairs of patch tokens after the final norm, of"
            " both large views, masked cells included, to those of the EMA encoder of an earlier"
            " step, which reads the views at twice the side and whose features are resized"
            " bicubically;"
            " weight 2 beside DINO's and iBOT's, from the first snapshot on"
            " (objective.snapshot_at), or against a checkpoint (objective.target_checkpoint)"
        ),
        left_out=(
            "views of the target cut anew at twice the pixels and without colour changes (here the"
            " input's view is enlarged), the rise of the weight by a cosine over 1,000 steps, half"
            " of the weight of small views in this stage, rotary positions rescaled at random,"
            " Sinkhorn for the assignments of the row that it joins, which keeps its own constraint"
            " (objective.prototype_targets=sinkhorn sets it)"
        ),
    ),
    # CAPI (arXiv 2502.08769, sections 3 and 4; facebookresearch/capi, train_capi.py, model.py)
    "capi": PublishedMethod(
        terms=(
            token_term(
                MASKED,
                0,
                name="dense",
                posterior=_CAPI,
                head=DecoderHead(queries="hidden", clusters="clusters"),
            ),
            token_term(MASKED, 0, name="clusters", posterior=_CAPI, head=ClusterHead()),
        ),
        kept=(
            "one view, 65 % of its cells hidden around one visible block that may wrap around; a"
            " linear map of the EMA encoder's tokens, of length 1, to 16,384 clusters, trained on"
            " their own assignments without any gradient to an encoder; assignments balanced by"
            " three Sinkhorn iterations at each position over the global batch at temperature"
            " 0.06; a decoder of 12 blocks that predicts those of hidden cells, by prototypes of"
            " trained lengths, at temperature 0.12; no cls, no loss of whole images"
        ),
        left_out=(
            "queries that see the visible cells and not each other, and 5 % of the hidden cells"
            " as queries (here all), its rotary positions, which are no rotation, and places of"
            " the registers, layers without biases, a final norm without scale, RMSNorm and"
            " stochastic depth in the decoder, half of the rate and a decay of 0.01 for the"
            " clusters, a fifth of the rate for the patch embedding, a momentum of 1 that falls to"
            " 0.999 in the warm-up, decay of norms, cosines of rate and momentum cut at 0.8 of"
            " their length (here the rate ends where that one does, and the momentum at 1)"
        ),
    ),
    # AM-RADIO (arXiv 2312.06709, section 3), whose training code is not public
    "distill": PublishedMethod(
        terms=(
            pooled_term(
                FULL,
                0,
                name="image",
                encoder="frozen",
                posterior=Cosine(scale=0.5),
                head=LinearHead(),
            ),
            token_term(
                FULL,
                0,
                name="direction",
                encoder="frozen",
                posterior=Cosine(scale=0.5),
                head=LinearHead(),
                weight=0.9,
            ),
            token_term(
                FULL,
                0,
                name="length",
                encoder="frozen",
                posterior=SmoothL1(beta=1.0, normalized=False),
                head=LinearHead(),
                weight=0.1,
            ),
        ),
        kept=(
            "any number of frozen teachers (objective.teachers or objective.target_checkpoint), the"
            " feature of the image by 1 - cos with weight 1, features of cells by 0.9 (1 - cos) and"
            " 0.1 smooth L1, without any other target"
        ),
        left_out=(
            "maps of two layers with a norm between them (here linear ones), teachers that read"
            " other images of other sizes than each other, a teacher whose image feature does not"
            " count (SAM), LAMB"
        ),
    ),
    # SigLIP (arXiv 2303.15343, sections 3 and 4; google-research/big_vision,
    # trainers/proj/image_text/siglip.py)
    "siglip": PublishedMethod(
        terms=(dataclasses.replace(text_term(FULL), posterior=TextSigmoid()),),
        kept=(
            "sigmoid loss over all pairs of the global batch by a ring, scale and bias trained from"
            " 10 and -10 without limits, attention pooling of the image by a learned query, last"
            " text token"
        ),
        left_out=(
            "Adafactor, text without a mask of its padding, an encoder without cls (the pooling"
            " does not read it) and with a last norm (the pooling has its own), an MLP after the"
            " pooling and an image feature that is its output (here a linear map)"
        ),
    ),
    # Cap and CapPa (arXiv 2306.07915, section 3; google-research/big_vision,
    # models/proj/cappa/cappa.py, trainers/proj/cappa/generative.py, configs/proj/cappa/pretrain.py)
    "cap": PublishedMethod(
        terms=(caption_term(CaptionSoftmax()),),
        kept=(
            "a decoder of 6 blocks without biases that attends to all patches predicts every token"
            " from those before it, the mean over the tokens of a caption, then over captions,"
            " logits that start at 0, no cls token"
        ),
        left_out=_CAPPA_LEFT_OUT,
    ),
    "cappa": PublishedMethod(
        terms=(caption_term(CaptionSoftmax(parallel=0.75)),),
        kept=(
            "as cap, and three captions in four, drawn for each image, are predicted at once: all"
            " inputs are mask tokens, and every place sees all others"
        ),
        left_out=_CAPPA_LEFT_OUT,
    ),
    # LocCa (arXiv 2403.19596, section 3); its training code is not public
    "locca": PublishedMethod(
        terms=(
            caption_term(CaptionSoftmax(parallel=0.5)),
            caption_term(CaptionSoftmax(), of="box"),
            caption_term(CaptionSoftmax(), of="region"),
        ),
        kept=(
            "one decoder for captions, half of them at once, for the box of an object after its"
            " name, and for box and name, as text with whole numbers from 0 to 500, each a third of"
            " the loss where an image has all three; of one object of an image, in the coordinates"
            " of its view; prefixes have no loss"
        ),
        left_out=(
            "a loss of the caption of a region before its box, captions of regions by a detector"
            " with text (here the names of the categories of"
            " annotated objects), a prefix of captions, its own order of coordinates and texts of"
            " prefixes, which are not checked against the paper, images that all have both captions"
            " and boxes (here an image has the terms that its record has), Adafactor"
        ),
    ),
    # CoCa (arXiv 2205.01917, section 3.2; mlfoundations/open_clip, src/open_clip/coca_model.py and
    # CoCaLoss of loss.py)
    "coca": PublishedMethod(
        terms=(
            *FORMS["weakly_supervised"],
            caption_term(CaptionSoftmax(per_token=True), weight=2.0),
        ),
        kept=(
            "CLIP's loss with weight 1, cross-entropy of captions with weight 2, a mean over the"
            " tokens of the batch, one learned query that pools the image for the pairs"
        ),
        left_out=(
            "text layers that both losses share, the first half of its decoder (here the text tower"
            " is by itself and bidirectional, and the decoder begins with token embeddings), 256"
            " queries that pool the image for the decoder (here it reads all patches), patches of"
            " 18 pixels, Adafactor"
        ),
    ),
    # SigLIP 2 (arXiv 2502.14786, sections 2.2 and 2.3); its training code is not public
    "siglip2": PublishedMethod(
        terms=(
            dataclasses.replace(text_term(FULL), posterior=TextSigmoid()),
            caption_term(CaptionSoftmax(parallel=0.5)),
            *_with_small_and_hidden(0.25),
        ),
        kept=(
            "SigLIP's pairs and a decoder of captions that reads all patches, with weight 1 each,"
            " half of the captions at once; small views predict the EMA encoder's assignment of the"
            " whole view, and hidden cells those of its cells with weight 0.25, momentum that does"
            " not rise; together a quarter of the pairs' weight, as for its B models"
        ),
        left_out=(
            "boxes and their captions in the decoder's text (locca+siglip2 has them),"
            " self-distillation in the last fifth of the run alone and on augmented views of its"
            " own (here pairs and target read one plain view, and small ones have its colours), an"
            " encoder without cls, the pooling as in siglip, 256,000 tokens (here 32,000), images"
            " resized without a crop where they are longer than 4 : 3, NaFlex"
        ),
    ),
    # TIPS (arXiv 2410.16512, section 3; google-deepmind/tips has its encoders, pytorch/, and not
    # its training)
    "tips": PublishedMethod(
        terms=(*FORMS["weakly_supervised"], *_with_small_and_hidden(2.0)),
        kept=(
            "CLIP's loss of cls with weight 1, small views predict the EMA encoder's assignment of"
            " the whole view with weight 1, three cells in four hidden and predicted with weight 2"
        ),
        left_out=(
            "the second cls token with a synthetic caption (a record has one caption), sinusoidal"
            " positions, scaled embeddings, dropout and ReLU of the text tower, its augmentation"
            " (here the pairs read a view with colour changes and flips), one norm of cls before"
            " the linear map of the pairs (here the pooling has a second one), rates and length of"
            " its runs"
        ),
    ),
}
# Entropy terms that any objective can be joined with: byol+koleo.
ENTROPIES: dict[str, AnyTerms] = {
    # DINOv2 (arXiv 2304.07193, section 4): of cls before the head, weight 0.1
    "koleo": (EntropyTerm(name="koleo", estimator=Koleo(), weight=0.1),),
}
