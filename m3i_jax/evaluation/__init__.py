"""Evaluators: `evaluator(state) -> iterator of (name, value)`, accuracies as fractions 0..1. The
loop is handed them and knows none."""
