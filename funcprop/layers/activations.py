"""Activations, softmax and pooling after relu: layers that are recognised in plain functions too."""

from funcprop.rules.patterns.activation import exact_gelu as exact_gelu
from funcprop.rules.patterns.activation import gelu as gelu
from funcprop.rules.patterns.activation import relu as relu
from funcprop.rules.patterns.activation import sigmoid as sigmoid
from funcprop.rules.patterns.activation import silu as silu
from funcprop.rules.patterns.activation import softplus as softplus
from funcprop.rules.patterns.activation import tanh as tanh
from funcprop.rules.patterns.activation import tanh_gelu as tanh_gelu
from funcprop.rules.patterns.fused_pooling import relu_max_pool as relu_max_pool
from funcprop.rules.patterns.softmax import log_softmax as log_softmax
from funcprop.rules.patterns.softmax import softmax as softmax
