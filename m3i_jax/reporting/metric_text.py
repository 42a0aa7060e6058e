"""The meaning of every metric of a log: the text of METRICS.md and of the notes below the charts.

Lines are in the order of METRICS.md. A test compares them with the names that the code writes."""

import dataclasses
import fnmatch
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class MetricText:
    """The meaning of one metric, or of several that differ in a name.

    Attributes:
      name: the metric; `*` stands for any name.
      unit: of its value; "" if it has none.
      text: what it is.
      healthy: how a healthy run looks; "" if there is nothing to watch.
      score: whether an evaluation is better the larger it is.
      note: shown below its chart.
    """

    name: str
    unit: str
    text: str
    healthy: str = ""
    score: bool = True
    note: bool = False


def _accuracy(name: str, text: str) -> MetricText:
    return MetricText(f"eval/{name}", "share", text, "above its value at step 0")


# (title, metrics)
METRICS: tuple[tuple[str, tuple[MetricText, ...]], ...] = (
    (
        "Evaluation",
        (
            _accuracy("knn/*", "top1, top5: held-out images whose k nearest training images agree"),
            _accuracy("direct/*", "top1, top5: accuracy of the run's own category head"),
            _accuracy("linear/top*", "accuracy of logistic regression on frozen features"),
            MetricText(
                "eval/linear/log10_l2",
                "",
                "strength of the penalty that logistic regression chose, its decimal logarithm; not"
                " a score",
                score=False,
                note=True,
            ),
            _accuracy("probe/*", "top1, top5: the paper's linear probe, by LARS"),
            _accuracy("attentive/*", "top1, top5: a probe with attention pooling"),
            _accuracy("few_shot/*", "accuracy with this many labelled images per category"),
            _accuracy(
                "zero_shot/*", "top1, top5 of classification by captions, for each set of templates"
            ),
            _accuracy(
                "retrieval/*", "r1, r5, r10: own image or an own caption among the first 1, 5 or 10"
            ),
            MetricText(
                "eval/embedding/same_class",
                "share",
                "images whose nearest neighbour is of their class; at the last step, and by"
                " --mode=eval",
                "above 1 / classes",
            ),
            MetricText(
                "eval/box/beyond_candidates",
                "boxes",
                "of all images, scored boxes that suppression did not see, since there were more"
                " than dense.detect.candidates: with more, AP may be higher",
                "absent",
                score=False,
                note=True,
            ),
            MetricText(
                "eval/box/*",
                "share",
                "average precision (AP) and recall (AR) of boxes by the rules of COCO or LVIS; also"
                " by size and frequency",
                "above its value at step 0",
            ),
            MetricText("eval/mask/*", "share", "the same for masks", "above its value at step 0"),
            _accuracy("segmentation/*", "mIoU, mAcc and aAcc over all held-out images"),
        ),
    ),
    (
        "Losses",
        (
            MetricText(
                "loss",
                "",
                "what is minimised: ssp + lambda * sp, or the sum of the losses of a dense task",
                "falls; it jumps on the second line, when lambda takes its first value",
            ),
            MetricText(
                "loss/equal_weights",
                "",
                "ssp + sp, the loss at lambda 1, which the console shows",
                "falls; it does not move with lambda",
                note=True,
            ),
            MetricText(
                "loss/ssp",
                "",
                "weighted mean of the self-supervised terms, with the entropy terms; of m3i,"
                " squared error on normalised features and the second-moment term",
                "falls quickly, then slowly, and rises a little when the target moves",
                note=True,
            ),
            MetricText("loss/sp", "nats", "categories and captions, weighted by their numbers"),
            MetricText("loss/category", "nats", "cross-entropy of categories", "moves last"),
            MetricText("loss/text", "nats", "contrastive loss of images and captions"),
            MetricText(
                "loss/caption", "nats", "cross-entropy of the tokens of captions", "falls steadily"
            ),
            MetricText("loss/*", "", "one term of the objective, or one loss of a dense task"),
        ),
    ),
    (
        "Dense tasks",
        (
            MetricText("detect/objects", "", "annotated objects of an image"),
            MetricText(
                "detect/foreground_*",
                "",
                "sampled foreground anchors, or regions, of an image",
                "above 0",
            ),
            MetricText("detect/proposals", "", "proposals of an image after suppression"),
            MetricText(
                "detect/denoising_groups", "", "groups of noised objects of an image (DINO)"
            ),
            MetricText(
                "segment/pixel_accuracy",
                "share",
                "labelled pixels of an image whose category is predicted",
                "rises",
            ),
            MetricText("segment/masks", "", "categories of an image with a mask in the loss"),
            MetricText(
                "segment/classes_cut", "", "categories of an image beyond the slots of masks", "0"
            ),
        ),
    ),
    (
        "Bits",
        (
            MetricText(
                "info/*",
                "bits",
                "information that a prediction carries about its target",
                "above 0; below, it is worse than knowing nothing",
            ),
            MetricText(
                "bits/*/token",
                "bits",
                "code length of a token of a caption, given its image and what the decoder sees",
                "falls below the entropy of single tokens",
            ),
            MetricText("bits/*/image", "bits", "code length of a whole caption, given its image"),
            MetricText(
                "bits/*/parallel_token",
                "bits",
                "code length of a token of those captions whose tokens are predicted at once",
                "above bits/*/token: the tokens before it are not seen",
            ),
            MetricText(
                "entropy/*",
                "bits",
                "estimated entropy of the features that an entropy term reads",
                "rises or stays; the README of objective/ has the reference of each",
            ),
        ),
    ),
    (
        "Weight of the losses",
        (
            MetricText(
                "balance/lambda",
                "",
                "weight of categories and captions; objective.gamma on the first line",
                "falls once both gradient norms are known, then drifts",
                note=True,
            ),
            MetricText("balance/ssp_norm", "", "gradient norm of the self-supervised terms"),
            MetricText("balance/sp_norm", "", "gradient norm of categories and captions"),
        ),
    ),
    (
        "Collapse",
        (
            MetricText(
                "collapse/effective_rank",
                "",
                "effective dimensions of the targets",
                "well above 1",
                note=True,
            ),
            MetricText("collapse/target_std", "", "deviation of the targets over tokens", "not 0"),
            MetricText("collapse/spread", "share", "energy of the targets that varies", "not 0"),
            MetricText(
                "collapse/uniformity*", "", "log mean exp(-2 distance^2) of pooled targets", "not 0"
            ),
            MetricText("collapse/alignment*", "", "squared distance of two views of an image"),
            MetricText(
                "collapse/marginal_bits*",
                "bits",
                "entropy of the mean assignment to prototypes, at most log2 of their number",
                "well above 0",
            ),
            MetricText(
                "collapse/assignment_bits*",
                "bits",
                "mean entropy of the assignments; the difference is their information about an"
                " image",
                "below the former",
            ),
            MetricText("collapse/alarm", "", "1: collapsed", "0", note=True),
        ),
    ),
    (
        "Optimizer",
        (
            MetricText("lr", "", "learning rate"),
            MetricText("ema", "", "momentum of the EMA target encoder"),
            MetricText("grad_norm", "", "global norm before clipping", "settles after the warm-up"),
            MetricText("samples_seen", "images", "position in the stream"),
        ),
    ),
    (
        "Throughput",
        (
            MetricText("perf/images_per_sec", "images/s", "of all devices", "level"),
            MetricText("perf/images_per_sec_per_chip", "images/s", "of one chip", "level"),
            MetricText("perf/step_seconds", "s", "a step, waiting included", "level"),
            MetricText(
                "perf/input_wait",
                "share",
                "share of training in which the loop waited for images",
                "below a few per cent; otherwise raise data.threads or data.workers",
                note=True,
            ),
            MetricText("perf/mfu", "share", "counted FLOPs of the model over the peak"),
            MetricText("perf/goodput", "share", "share of the wall time spent in steps", note=True),
            MetricText("perf/wall_seconds", "s", "wall time of all starts"),
            MetricText("perf/restarts", "", "starts after the first"),
            MetricText(
                "perf/seconds/lost",
                "s",
                "steps after the checkpoint that a restart repeated",
                note=True,
            ),
            MetricText(
                "perf/seconds/*",
                "s",
                "start, restore, compile, data, step, evaluate, save, panel, trace, stop; they add"
                " up to the wall time",
            ),
        ),
    ),
    (
        "Kernels",
        (
            MetricText("kernels/used", "", "kernel calls that equal the plain form on this device"),
            MetricText(
                "kernels/refused", "", "calls that do not, in whose place the plain form runs", "0"
            ),
            MetricText(
                "kernels/error",
                "share",
                "largest error of the values and gradients",
                "below 0.05 in bfloat16, 0.001 in float32",
            ),
        ),
    ),
    (
        "Skipped",
        (
            MetricText(
                "skipped/not_finite",
                "",
                "1: this step was skipped, since its loss or gradient is not finite",
                "0; three in a row end the run",
            ),
            MetricText("skipped/spikes", "steps", "skipped so far by optim.skip_spikes", "few"),
            MetricText(
                "skipped/steps",
                "steps",
                "skipped so far, for either reason; schedules do not count them",
                "few",
            ),
            MetricText(
                "data/skipped/evaluation/*", "images", "left out of an evaluation, by reason", "few"
            ),
            MetricText(
                "data/skipped/*",
                "images",
                "of the first host, replaced so far in training, by reason",
                "few",
            ),
            MetricText(
                "data/restarts",
                "",
                "restarts of the workers of data.workers on the first host",
                "0",
            ),
            MetricText(
                "data/*",
                "",
                "captions, labels and annotations of the first host that were cut, left out or not"
                " decoded in full, by reason, so far",
            ),
            MetricText(
                "report/dropped/*",
                "",
                "lines that a writer lost; panels, figures and reports that were not written",
                "0",
            ),
        ),
    ),
)


def metric_text(name: str) -> MetricText | None:
    """Returns the text of a metric; None if there is none, as for one of another package.

    >>> metric_text("eval/knn/top1").unit, metric_text("loss/ssp").note, metric_text("mine/x")
    ('share', True, None)
    """
    texts = [text for _, part in METRICS for text in part]
    return next((text for text in texts if fnmatch.fnmatchcase(name, text.name)), None)


def metric_note(name: str) -> str:
    """Returns the note below the chart of a metric; "" if it has none.

    >>> metric_note("collapse/alarm"), metric_note("lr")
    ('1: collapsed', '')
    """
    text = metric_text(name)
    return text.text if text and text.note else ""


def is_score(name: str) -> bool:
    """Returns whether larger values of a metric of an evaluation are better.

    >>> is_score("eval/linear/top1"), is_score("eval/linear/log10_l2")
    (True, False)
    """
    text = metric_text(name)
    return text is None or text.score


def metrics_markdown(sections: Sequence[tuple[str, Sequence[MetricText]]] = METRICS) -> str:
    """Returns all metrics as a page of Markdown, one table a section.

    >>> metrics_markdown([("A", [MetricText("a", "s", "time", "low")])]).splitlines()[-1]
    '| `a` | s | time | low |'
    """
    parts = [
        "# Metrics\n\nWhat a run writes to `metrics.jsonl`, one line a logged step. `*` stands for"
        " a name. This page\nis written by `python -m tests.references --write` from"
        " `m3i_jax/reporting/metric_text.py`."
    ]
    for title, texts in sections:
        rows = [f"| `{t.name}` | {t.unit} | {t.text} | {t.healthy} |" for t in texts]
        head = ["| metric | unit | meaning | a healthy run |", "|---|---|---|---|"]
        parts.append("\n".join([f"## {title}\n", *head, *rows]))
    return "\n\n".join(parts) + "\n"
