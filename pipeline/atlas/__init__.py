"""The atlas: a static site of a run, made from its tables alone. It opens from disk and needs no network."""

from pipeline.atlas.builder import Options, build

__all__ = ["Options", "build"]
