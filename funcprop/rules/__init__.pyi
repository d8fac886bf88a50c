from .measuring.measured_rules import measured as measured
from .sets import autodiff as autodiff
from .sets import default as default
from .sets import handwritten as handwritten
