"""From what tables hold to pixels: what the atlas and the figures draw alike."""
