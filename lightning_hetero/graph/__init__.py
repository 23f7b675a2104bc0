"""What we run: a module seen as units that can be placed."""

from lightning_hetero.graph.model import ModelGraph, Unit

__all__ = ["ModelGraph", "Unit"]
