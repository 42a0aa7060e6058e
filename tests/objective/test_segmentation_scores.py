"""Confusion matrix and mean IoU against loops in numpy."""

import jax
import numpy as np
import pytest

from m3i_jax.objective import segmentation_scores as scores


def maps(seed=0):
    """Predictions and labels of three images, 6 categories of which the last two never occur."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, (3, 16, 17)).astype(np.uint8)
    guess = np.where(rng.random(labels.shape) < 0.6, labels, rng.integers(0, 5, labels.shape))
    labels[rng.random(labels.shape) < 0.2] = 255
    return guess, labels


def test_pixels_are_counted_by_label_and_prediction():
    guess, labels = maps()
    expected = np.zeros((6, 6), int)
    for g, t in zip(guess.ravel(), labels.ravel(), strict=True):
        if t != 255:
            expected[t, g] += 1
    count = jax.jit(lambda g, t: scores.confusion_matrix(g, t, 6))
    np.testing.assert_array_equal(count(guess, labels), expected)
    each = jax.vmap(lambda g, t: scores.confusion_matrix(g, t, 6))(guess, labels)
    np.testing.assert_array_equal(each.sum(0), expected)


def test_another_ignored_label_and_labels_that_do_not_exist():
    matrix = scores.confusion_matrix(np.array([0, 1, 1, 0]), np.array([0, 1, 0, 200]), 2, ignore=0)
    assert matrix.tolist() == [[0, 0], [0, 1]]
    assert scores.confusion_matrix(np.array([5, -1]), np.array([1, 1]), 2).sum() == 0


def test_a_class_of_number_255_is_not_ignored_by_default():
    with pytest.raises(ValueError, match="255 is ignored by default, .* the 300 classes"):
        scores.confusion_matrix([255], [255], 300)
    assert scores.confusion_matrix([255], [255], 300, ignore=-1)[255, 255] == 1
    assert scores.confusion_matrix([254], [254], 255)[254, 254] == 1


def test_scores_are_those_of_a_loop():
    guess, labels = maps()
    valid = labels != 255
    guess, labels = guess[valid], labels[valid]
    iou, accuracy = [], []
    for k in range(6):
        both = ((guess == k) & (labels == k)).sum()
        union, size = ((guess == k) | (labels == k)).sum(), (labels == k).sum()
        iou.append(both / union if union else np.nan)
        accuracy.append(both / size if size else np.nan)
    got = scores.miou(scores.confusion_matrix(guess, labels, 6))
    np.testing.assert_allclose(got["iou"], iou)
    np.testing.assert_allclose(got["accuracy"], accuracy)
    assert got["iou"][4] == 0 and np.isnan(got["accuracy"][4])  # predicted, but absent
    assert np.isnan(got["iou"][5])  # neither
    assert got["miou"] == pytest.approx(np.nanmean(iou))
    assert got["miou"] < np.mean(iou[:4])
    assert got["mean_accuracy"] == pytest.approx(np.nanmean(accuracy))
    assert got["pixel_accuracy"] == pytest.approx((guess == labels).mean())


def test_no_pixel_has_no_score():
    got = scores.miou(np.zeros((3, 3), np.int64))
    assert all(np.isnan(got[name]) for name in ("miou", "mean_accuracy", "pixel_accuracy"))


def test_counts_beyond_int32():
    big = np.array([[3, 1], [0, 4]], np.int64) * 2**33
    assert scores.miou(big)["miou"] == pytest.approx((3 / 4 + 4 / 5) / 2)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="prediction and labels"):
        scores.confusion_matrix(np.zeros(3, int), np.zeros(4, int), 2)
    with pytest.raises(ValueError, match=r"square; this one is \[2, 3\]"):
        scores.miou(np.zeros((2, 3)))
