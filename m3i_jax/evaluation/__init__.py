"""Evaluators of frozen features, detectors and segmenters, one idea a file; `registry` lists them
and takes a user's own. An evaluation is a function (state, poll) -> iterator of (name, value);
accuracies are fractions 0..1."""
