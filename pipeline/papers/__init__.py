"""The papers' own numbers, and a run's beside them: what the atlas and the figures show alike."""
