"""FLOPs of a train step computed from shapes alone, for every objective: the reference of
`tests.bench.flops`.

It follows the paper's shapes and not the program. A multiply-add counts as two operations; a
trained product costs three times its forward pass (two gradients), a product whose input needs no
gradient twice.
"""

import dataclasses

from m3i_jax import schema
from m3i_jax.objective import masks
from m3i_jax.objective.caption_posterior import CaptionHead
from m3i_jax.objective.derived_terms import linear_name
from m3i_jax.objective.entropy_terms import EntropyTerm
from m3i_jax.objective.terms import (
    ClusterHead,
    DecoderHead,
    LinearHead,
    MlpShape,
    Pass,
    PooledHead,
    ProjectionHead,
    Term,
)
from m3i_jax.training.plan import Plan


def block(tokens: int, width: int) -> int:
    """Multiply-adds of the forward pass of a transformer block with MLP ratio 4."""
    return 12 * tokens * width**2 + 2 * tokens**2 * width


def vit(c: schema.Config, shown: int) -> tuple[int, int]:
    """Forward multiply-adds of an encoder pass: (all, those whose input needs no gradient)."""
    e = c.model.encoder
    first = shown * 3 * e.patch_size**2 * e.width
    return e.depth * block(shown + int(e.cls_token) + e.registers, e.width) + first, first


def intern_image(c: schema.Config) -> tuple[int, int]:
    """The same for InternImage with its fusion, for any mask: a convolution reads every position.

    DCNv3 is counted at its minimum: four cells around every point, and the depth-wise convolution
    before its offsets tap by tap. The program computes these differently, by products with zeros
    and by sums that are no matrix products.

    >>> import dataclasses
    >>> encoder = schema.Encoder(width=1024)
    >>> model = schema.Model(backbone="intern_image", encoder=encoder)
    >>> config = schema.Config(data=schema.Data(image_size=192), model=model)
    >>> round(intern_image(config)[0] / 1e9, 1)
    133.9
    """
    m, width = c.model.intern_image, c.model.encoder.width
    side = c.data.image_size // m.stem_strides[0]
    first = side**2 * 27 * m.width // 2
    side //= m.stem_strides[1]
    total = first + side**2 * 9 * m.width**2 // 2
    for stage, (depth, groups) in enumerate(zip(m.depths, m.groups, strict=True)):
        n, w = side**2, m.width * 2**stage
        products = 2 * w**2 + w * groups * (27 + m.center_scale) + round(2 * m.mlp_ratio * w**2)
        total += depth * n * (products + 9 * 4 * w + m.kernel**2 * w)
        if stage == 2:
            total += n * w * width
        if stage == 3:
            total += n * w * 4 * width
        else:
            side //= 2
            total += side**2 * 9 * w * 2 * w
    return total, first


def encoder(c: schema.Config, shown: int) -> tuple[int, int]:
    return vit(c, shown) if c.model.backbone == "vit" else intern_image(c)


def _mlp(
    rows: int, c: schema.Config, mlp: MlpShape | None, width: int, trained: int = 3
) -> tuple[int, int]:
    """(multiply-adds, output width) of a projector or predictor."""
    if mlp is None:
        return 0, width
    widths = [width, *[c.model.head.hidden] * (mlp.layers - 1), c.model.head.width]
    return (
        trained * rows * sum(a * b for a, b in zip(widths, widths[1:], strict=False)),
        c.model.head.width,
    )


def _projection(c: schema.Config, space: ProjectionHead, tokens: int, trained: int) -> int:
    """Multiply-adds of a projector, of the similarities to prototypes if there are some."""
    rows = c.hidden if space.queries == "hidden" else tokens if space.pool == "none" else 1
    total, width = _mlp(rows, c, space.projector, c.model.encoder.width, trained)
    return total + (trained * rows * width * c.model.head.prototypes if space.prototypes else 0)


def _shown(c: schema.Config, read: Pass) -> int:
    if read.view > 1:
        return (c.view_size(read.view) // c.model.encoder.patch_size) ** 2
    return c.tokens - c.hidden if read.masked and not read.mask_tokens else c.tokens


def _own(c: schema.Config, term: Term) -> int:
    """Number of tokens that show the image of a term."""
    read = term.reads
    if read.mixed and not (isinstance(term.head, PooledHead) and term.head.everything):
        return c.tokens - c.hidden if term.image == "own" else c.hidden
    return _shown(c, read)


def _decoder(plan: Plan, term: Term) -> int:
    c = plan.config
    own = _own(c, term) + plan.reads_cls(term)
    n = (
        c.hidden
        if isinstance(term.head, DecoderHead) and term.head.queries == "hidden"
        else c.tokens
    )
    copies = 1
    if isinstance(term.head, DecoderHead) and term.head.queries == "blocks":
        copies, n = c.data.mask_blocks, masks.block_cells(c.grid, c.data.mask_block_share)
    return copies * _decoder_of(plan, term, own, n)


def _decoder_of(plan: Plan, term: Term, own: int, n: int) -> int:
    c, e, d = plan.config, plan.config.model.encoder, plan.config.model.decoder
    patch = 3 * e.patch_size**2
    total, tokens = 3 * own * e.width * d.width, own + n
    total += 3 * (d.depth - 1 + d.projector_depth * 0) * block(
        tokens, d.width
    ) + 3 * d.projector_depth * block(own, d.width)
    if d.norm == "batch":
        total += 3 * block(tokens, d.width)
    else:  # last block: queries of predicting rows only, keys and values of all rows
        total += 3 * (2 * tokens * d.width**2 + 10 * n * d.width**2 + 2 * n * tokens * d.width)
    out = patch if term.target.of == "pixels" else d.width if d.projector_depth else e.width
    if term.head.clusters:
        out = c.model.head.prototypes
    total += 3 * n * d.width * out
    # layer of relative positions, whose input needs no gradient; otherwise one row per batch
    if term.reads.view != term.target.view:
        total += 2 * c.tokens * 2 * d.width * d.width
    return total


def captions(plan: Plan, term: Term, vocabulary: int) -> int:
    """Multiply-adds of the decoder of captions for one term: self-attention, attention to the cells
    of the image, an MLP of ratio 4 and the logits of every token but the first."""
    c, e, w = plan.config, plan.config.model.encoder, plan.config.model.captioner.width
    steps, cells = c.data.caption_length - 1, _own(c, term)
    cross = 2 * steps * w**2 + 2 * cells * e.width * w + 2 * steps * cells * w
    blocks = c.model.captioner.depth * (block(steps, w) + cross)
    return 3 * (blocks + steps * w * vocabulary)


def step(plan: Plan, vocabulary: int = 49_408) -> float:
    """FLOPs per image of one train step without microbatches.

    >>> import dataclasses
    >>> from m3i_jax.training import plan
    >>> data = schema.Data(classes=1000, captions="no", size=100_000)
    >>> encoder = dataclasses.replace(schema.Encoder(), freeze_patch_embed=False)
    >>> config = schema.Config(data=data, model=schema.Model(encoder=encoder))
    >>> round(step(plan.build_plan(config)) / 1e9, 1)  # the floor of ViT-B/16
    279.5
    """
    c = plan.config
    e, d, t, b = c.model.encoder, c.model.decoder, c.model.text, c.train.batch_size
    patch, cls = 3 * e.patch_size**2, int(e.cls_token)
    total = 0.0
    for read in plan.passes:
        full, first = encoder(c, _shown(c, read))
        total += 3 * (full - first) + (1 if e.freeze_patch_embed else 2) * first
    # A target that averages several last blocks costs no more blocks.
    for target in plan.target_passes:
        total += encoder(c, c.tokens * target.enlarge**2)[0]
        if target.enlarge > 1:  # pixels to the larger side and features back, an axis at a time
            side, grid = c.data.image_size, c.grid
            large, fine = target.enlarge * side, target.enlarge * grid
            total += 3 * large * side * (side + large) + e.width * fine * grid * (fine + grid)
    if plan.where("text") and c.train.microbatches > 1 and c.objective.text_softmax == "batch":
        # embeddings are computed a second time
        total += sum(encoder(c, _shown(c, read))[0] for read in plan.passes)
    if plan.entropy_terms and c.train.microbatches > 1 and c.objective.entropy_rows == "batch":
        total += sum(encoder(c, _shown(c, read))[0] for read in plan.passes)
    for goal in plan.target_keys:
        if goal.space == "decoder":
            total += (c.tokens + cls) * e.width * d.width + d.projector_depth * block(
                c.tokens + cls, d.width
            )
        elif isinstance(goal.space, ClusterHead):
            total += c.tokens * e.width * c.model.head.prototypes
        elif isinstance(goal.space, ProjectionHead):
            total += _projection(c, goal.space, c.tokens, 1)
    learned = [
        g
        for g in plan.target_keys
        if g.target.learned
        and not isinstance(g.space, ClusterHead)
        and not getattr(g.space, "prototypes", "")
    ]
    weighed = {
        plan.target_key(x).space
        for x in plan.terms
        if getattr(x.posterior, "second_moment", False) and c.objective.second_moment
    }
    measured = [g for n, g in enumerate(learned) if g.space in weighed or n == 0]
    for goal in measured:  # C, also if it is only monitored
        space = goal.space
        width = (
            d.width
            if space == "decoder"
            else e.width
            if space is None
            else _mlp(1, c, space.projector, e.width)[1]
        )
        total += (1 if goal.target.of == "pooled" else c.tokens) * width**2
    projected = set()
    for term in plan.terms:
        n = _own(c, term)
        if isinstance(term.head, ProjectionHead) and term.head.prototypes:
            if (term.reads, term.image, term.head) not in projected:
                total += _projection(c, term.head, n, 3)
            projected.add((term.reads, term.image, term.head))
        elif isinstance(term.head, ClusterHead):  # its input needs no gradient
            total += 2 * c.tokens * e.width * c.model.head.prototypes
        elif isinstance(term.head, DecoderHead):
            total += _decoder(plan, term)
        elif isinstance(term.head, CaptionHead):
            total += captions(plan, term, vocabulary)
        elif isinstance(term.head, LinearHead):
            rows = 1 if term.target.of == "pooled" else n
            if (term.reads, term.image, linear_name(term)) not in projected:
                total += 3 * rows * e.width * (patch if term.target.of == "pixels" else e.width)
            projected.add((term.reads, term.image, linear_name(term)))
        elif isinstance(term.head, ProjectionHead):
            rows = n if term.head.pool == "none" else 1
            projector, width = _mlp(rows, c, term.head.projector, e.width)
            if (term.reads, term.image, term.head) not in projected:
                total += projector + _mlp(rows, c, term.head.predictor, width)[0]
            projected.add((term.reads, term.image, term.head))
            if term.head.match == "likeness":
                total += c.tokens * c.tokens * e.width
        total += _posterior(plan, term, b)
    online = {
        (read, "own", dataclasses.replace(term.head, predictor=None))
        for term in plan.terms
        for read in term.passes[1:]
        if isinstance(term.head, ProjectionHead)
    }
    for _, _, head in online - projected:
        total += _mlp(1, c, head.projector, e.width)[0]
    total += sum(_entropy(plan, term, b) for term in plan.entropy_terms)
    vectors = {(x.reads, x.image, x.head) for x in plan.terms if isinstance(x.head, PooledHead)}
    by_key = {
        key: next(x for x in plan.terms if (x.reads, x.image, x.head) == key) for key in vectors
    }
    for term in by_key.values():
        n = _own(c, term) if c.model.pool.kind == "attention" else 0
        total += 3 * (
            (2 * n + 1 if n else 0) * e.width**2 + 2 * n * e.width + e.width * c.model.pool.width
        )
    total += 3 * len(plan.where("category")) * c.model.pool.width * c.data.classes
    if texts := len(plan.where("text")):
        length = c.data.caption_length
        last = (
            2 * length * t.width**2 + 10 * t.width**2 + 2 * length * t.width
            if t.pool == "first"
            else block(length, t.width)
        )
        total += 3 * ((t.depth - 1) * block(length, t.width) + last + t.width * t.embed)
        total += 3 * texts * (c.model.pool.width * t.embed + b * t.embed)
    return 2.0 * total


def _entropy(plan: Plan, term: EntropyTerm, b: int) -> float:
    """Matrix products of an estimator; its features are those of a prediction."""
    c, name = plan.config, type(term.estimator).__name__
    width = c.model.encoder.width if term.head.projector is None else c.model.head.width
    rows = min(getattr(term.estimator, "group", 0) or b, b)
    if name == "Koleo":
        return rows * width  # the choice of a neighbour has no gradient
    if name == "Sigreg":
        return 2 * width * getattr(term.estimator, "slices", 0)
    if name in ("VarianceCovariance", "CodingRate"):
        return 3 * min(rows, width) * width
    return 3 * width**2 if name == "MomentEnergy" else 3 * rows * width


def _posterior(plan: Plan, term: Term, b: int) -> float:
    """Matrix products of the posterior."""
    c, name = plan.config, type(term.posterior).__name__
    e, d = c.model.encoder, c.model.decoder
    if (
        name == "Gaussian"
        and getattr(term.posterior, "second_moment", False)
        and c.objective.second_moment
    ):
        width = d.width if d.projector_depth and isinstance(term.head, DecoderHead) else e.width
        return c.tokens * width**2  # p C; its gradient needs no product
    width = c.model.head.width if isinstance(term.head, ProjectionHead) else e.width
    rows = c.tokens if term.target.of == "tokens" else 1
    if name in ("Boltzmann", "DenseCL"):
        return 2 * rows * b * width  # keys need no gradient
    if name == "NTXent":
        return 3 * 4 * b * width  # 2 B views against 2 B views
    if name == "TokenSimilarity":  # of prediction and target, and one gradient
        return 3 * c.tokens**2 * e.width
    if name == "BarlowTwins":
        return 3 * width**2
    return 0.0
