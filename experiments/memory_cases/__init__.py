"""Models whose memory is accounted, as functions of sizes, and sizes drawn by a seed."""

from memory_cases.models import FAMILIES as FAMILIES
from memory_cases.models import Model as Model
