"""What a person sees of a run: log lines, images, tables, counts. Knows arrays, numbers and names,
no model and no data."""
