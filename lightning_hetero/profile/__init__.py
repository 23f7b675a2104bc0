"""What a model costs: seconds and bytes of its units on every device, as functions of the rows of a batch.

What is named here needs no torch. `recording.Recording` and `shapes.shapes_only` see a model, `measure.measure_model`
measures it, and `cache.ProfileCache` keeps the result.
"""

from lightning_hetero.profile.costs import Curve, Flow, Line, ModelProfile, UnitCost
from lightning_hetero.profile.estimate import estimate_profile

__all__ = ["Curve", "Flow", "Line", "ModelProfile", "UnitCost", "estimate_profile"]
