"""Pictures of graphs: squares are variables, circles operators, arrows data flow."""

from funcprop.drawing.draw import Drawing as Drawing
from funcprop.drawing.draw import draw as draw
from funcprop.drawing.layout import DrawingError as DrawingError
