"""Is a hand-written rule right? Checks for the authors of rules, without any test framework.

`check_rule` holds one rule against autodiff, finite differences and its own forward mode, under every
transformation; `check_gradient` does the same for the gradient of a whole function.
"""

from funcprop.testing.compare import CheckError as CheckError
from funcprop.testing.compare import Report as Report
from funcprop.testing.compare import Row as Row
from funcprop.testing.gradient import check_gradient as check_gradient
from funcprop.testing.rule import check_rule as check_rule
