"""Layers, one family a file: forward function, hand-written rule, equations and initialiser side by side."""

from funcprop.layers.activation import gelu as gelu
from funcprop.layers.activation import relu as relu
from funcprop.layers.activation import sigmoid as sigmoid
from funcprop.layers.activation import silu as silu
from funcprop.layers.activation import softplus as softplus
from funcprop.layers.activation import tanh as tanh
from funcprop.layers.activation import tanh_gelu as tanh_gelu
from funcprop.layers.attention import attention as attention
from funcprop.layers.linear import dense as dense
from funcprop.layers.linear import linear as linear
from funcprop.layers.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from funcprop.layers.loss import l2_penalty as l2_penalty
from funcprop.layers.loss import mean_squared_error as mean_squared_error
from funcprop.layers.loss import softmax_cross_entropy as softmax_cross_entropy
from funcprop.layers.pointwise_loss import focal_loss as focal_loss
from funcprop.layers.pointwise_loss import huber_loss as huber_loss
from funcprop.layers.pooling import relu_max_pool as relu_max_pool
