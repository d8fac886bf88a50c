"""A function as data: what it computes, apart from python."""

from funcprop.program.program import Compiled as Compiled
from funcprop.program.program import Program as Program
