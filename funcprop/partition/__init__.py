"""A graph too large for one device: its axes, layouts over a mesh, pipelines, and plans with a proof."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
