"""What --mode=curate leaves out of a source."""

import dataclasses

from m3i_jax.schema.limits import LINE, PATH, NumberLimit, option

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
    min_sharpness: float = option(
        0.0,
        "smallest standard deviation of the Laplacian of the gray values 0..255, at no more than"
        " 128 pixels of the shorter side; 0: any",
        NumberLimit(0, 1e4, natural=True),
    )
    min_entropy: float = option(
        0.0,
        "fewest bits of entropy of the histogram of gray values; 0: any",
        NumberLimit(0, 8, natural=True),
    )
    scores: str = option(
        "",
        "Parquet or Arrow file, or a directory of them, with the column key and numbers, such as"
        " the similarity of image and caption in the metadata of LAION",
        PATH,
    )
    least: tuple[str, ...] = option(
        (),
        "smallest scores that are kept, COLUMN=NUMBER; a record without a score is left out",
        LINE,
    )
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
    detail: float = option(
        0.25,
        "largest such difference of the parts of a copy at 64 pixels; 0: copies are not compared at"
        " that size, which reads them again",
        NumberLimit(0, 1e3, natural=True),
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
    neighbours: str = option(
        "auto",
        "how like features are found; approximate: by faiss, which misses some; auto: exactly up to"
        " 50,000 images",
        "auto",
        "exact",
        "approximate",
    )
