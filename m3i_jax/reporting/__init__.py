"""Output of a run for people: log lines, images, tables, counts. Knows arrays, numbers and names,
no model and no data."""
