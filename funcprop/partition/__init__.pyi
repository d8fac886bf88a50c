from .logical_axes import Axes as Axes
from .logical_axes import Axis as Axis
from .logical_axes import axes as axes
