"""What a program holds in memory: predicted from its jaxpr, measured on the compiled program."""

from funcprop.memory.footprint import footprint as footprint
from funcprop.memory.ledger import Footprint as Footprint
from funcprop.memory.ledger import Ledger as Ledger
from funcprop.memory.ledger import Row as Row
