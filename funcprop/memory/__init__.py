"""What a program holds in memory: predicted from its jaxpr, measured on the compiled program."""

from funcprop.memory.batch_limit import batch_limit as batch_limit
from funcprop.memory.footprint import footprint as footprint
from funcprop.memory.ledger import Footprint as Footprint
from funcprop.memory.ledger import Ledger as Ledger
from funcprop.memory.ledger import Row as Row
from funcprop.memory.remat_plan import Compiled as Compiled
from funcprop.memory.remat_plan import Proof as Proof
from funcprop.memory.remat_plan import RematPlan as RematPlan
from funcprop.memory.rematerialize import BudgetError as BudgetError
from funcprop.memory.rematerialize import remat_plan as remat_plan
from funcprop.memory.rematerialize import rematerialize as rematerialize
