"""Layers, one family a file: forward function, hand-written rule, equations and initialiser side by side."""

from funcprop.layers.activation import gelu as gelu
from funcprop.layers.activation import relu as relu
from funcprop.layers.activation import sigmoid as sigmoid
from funcprop.layers.activation import silu as silu
from funcprop.layers.activation import softplus as softplus
from funcprop.layers.activation import tanh as tanh
from funcprop.layers.batch_norm import BatchStatistics as BatchStatistics
from funcprop.layers.batch_norm import batch_norm as batch_norm
from funcprop.layers.dropout import dropout as dropout
from funcprop.layers.embedding import embedding as embedding
from funcprop.layers.feed_forward import feed_forward as feed_forward
from funcprop.layers.gated import geglu as geglu
from funcprop.layers.gated import swiglu as swiglu
from funcprop.layers.linear import dense as dense
from funcprop.layers.linear import linear as linear
from funcprop.layers.loss import l2_penalty as l2_penalty
from funcprop.layers.loss import mean_squared_error as mean_squared_error
from funcprop.layers.loss import softmax_cross_entropy as softmax_cross_entropy
from funcprop.layers.norm_dense import norm_dense as norm_dense
from funcprop.layers.normalization import group_norm as group_norm
from funcprop.layers.normalization import layer_norm as layer_norm
from funcprop.layers.normalization import rms_norm as rms_norm
from funcprop.layers.rotary import rotary as rotary
from funcprop.layers.rotary import rotary_angles as rotary_angles
