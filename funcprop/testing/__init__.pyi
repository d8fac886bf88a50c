from .compare import CheckError as CheckError
from .compare import CheckReport as CheckReport
from .compare import CheckRow as CheckRow
from .gradient import check_gradient as check_gradient
from .rule import check_rule as check_rule
