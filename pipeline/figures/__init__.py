"""The papers' figures, drawn with matplotlib from a run's tables; one figure a file."""
