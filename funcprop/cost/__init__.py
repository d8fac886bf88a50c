"""What programs cost: counted in the jaxpr and in the compiled program, timed, and predicted."""

from funcprop.cost.comparison import Comparison as Comparison
from funcprop.cost.comparison import compare as compare
from funcprop.cost.second_order import SecondOrderCost as SecondOrderCost
from funcprop.cost.second_order import second_order_cost as second_order_cost
