"""Conversion of weights between the formats of other projects and trees of arrays. This
folder knows names and layouts, and no models."""
