"""Pictures of graphs: squares are variables, circles operators, arrows data flow."""

from funcprop.drawing.backward import BackwardGraph as BackwardGraph
from funcprop.drawing.backward import backward_graph as backward_graph
from funcprop.drawing.difference import Difference as Difference
from funcprop.drawing.difference import diff as diff
from funcprop.drawing.draw import Drawing as Drawing
from funcprop.drawing.draw import draw as draw
from funcprop.drawing.draw import notebook_svg as notebook_svg
from funcprop.drawing.layout import DrawingError as DrawingError
from funcprop.drawing.second_order import SecondOrderGraph as SecondOrderGraph
from funcprop.drawing.second_order import second_order_graph as second_order_graph
