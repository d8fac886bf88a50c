"""Backpropagation, opened up: hand-written backward rules for any JAX function, both sweeps in the open."""

from funcprop import layers as layers

# The layers come first: their rules and the rewrite import one another.
# isort: split
from funcprop import curvature as curvature
from funcprop import models as models
from funcprop import rules as rules
from funcprop import testing as testing
from funcprop import training as training
from funcprop.backprop import backprop as backprop
from funcprop.comparison import Comparison as Comparison
from funcprop.comparison import compare as compare
from funcprop.curvature import fisher as fisher
from funcprop.curvature import ggn as ggn
from funcprop.curvature import hessian as hessian
from funcprop.drawing import BackwardGraph as BackwardGraph
from funcprop.drawing import Difference as Difference
from funcprop.drawing import Drawing as Drawing
from funcprop.drawing import DrawingError as DrawingError
from funcprop.drawing import SecondOrderGraph as SecondOrderGraph
from funcprop.drawing import backward_graph as backward_graph
from funcprop.drawing import diff as diff
from funcprop.drawing import draw as draw
from funcprop.drawing import second_order_graph as second_order_graph
from funcprop.equations import Derivation as Derivation
from funcprop.equations import derive as derive
from funcprop.graph import Graph as Graph
from funcprop.graph import Operator as Operator
from funcprop.graph import Variable as Variable
from funcprop.graph import name as name
from funcprop.nonfinite import NonFinite as NonFinite
from funcprop.prod import prod as prod
from funcprop.propagation import Propagation as Propagation
from funcprop.registry import Layer as Layer
from funcprop.registry import Rule as Rule
from funcprop.registry import RuleError as RuleError
from funcprop.registry import RuleSet as RuleSet
from funcprop.registry import layer as layer
from funcprop.rewrite import matches as matches
from funcprop.rewrite import with_rules as with_rules
from funcprop.tracing import trace as trace
from funcprop.transforms import grad as grad
from funcprop.transforms import hvp as hvp
from funcprop.transforms import jacobian as jacobian
from funcprop.transforms import value_and_grad as value_and_grad
from funcprop.transforms import vjp as vjp
