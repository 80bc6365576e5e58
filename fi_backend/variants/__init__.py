"""Attention variants as Python functions; see ``Variant``."""

from fi_backend.variants import math, shipped
from fi_backend.variants.band import derive_band
from fi_backend.variants.params import Param, Scalar, Tensor
from fi_backend.variants.rotation import Rotation
from fi_backend.variants.variant import Variant

__all__ = ["Param", "Rotation", "Scalar", "Tensor", "Variant", "derive_band", "math", "shipped"]
