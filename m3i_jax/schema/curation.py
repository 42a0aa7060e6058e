"""What --mode=curate leaves out of a source."""

import dataclasses

from m3i_jax.schema.limits import PATH, NumberLimit, option

_COUNT = NumberLimit(0, 2**31 - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curate:
    """Filters of `--mode=curate`, which writes a keep-list (`data.keep`). Images that cannot be
    decoded are always left out."""

    min_side: int = option(0, "smallest shorter side in pixels; 0: any", _COUNT)
    max_aspect: float = option(
        0.0,
        "largest longer side over the shorter one; 0: any",
        NumberLimit(0, 1e6, natural=True),
    )
    min_words: int = option(0, "fewest words of a caption; 0: a caption may be missing", _COUNT)
    max_words: int = option(0, "most words of a caption; 0: any", _COUNT)
    duplicates: str = option(
        "crops",
        "which copies are left out: exact (equal files), near (after re-encoding or resizing) or"
        " crops (also after cropping)",
        "none",
        "exact",
        "near",
        "crops",
    )
    distance: int = option(
        12, "bits of 64 in which perceptual hashes of candidates differ at most", NumberLimit(0, 32)
    )
    difference: float = option(
        0.12,
        "largest squared difference of copies, over their variance",
        NumberLimit(0, 2, natural=True),
    )
    against: tuple[str, ...] = option(
        (),
        "evaluation sets KIND:PATH[@SPLIT], of which no copy or crop is kept",
        PATH,
    )
    features: str = option(
        "",
        "npz of --mode=features of the same source: images with like features are left out too",
        PATH,
    )
    similarity: float = option(
        0.96, "cosine from which features are alike", NumberLimit(0, 1, natural=True, above=True)
    )
