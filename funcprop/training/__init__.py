"""Training: minibatch stochastic gradient descent as pure functions, and data that needs no network."""

from funcprop.training.chapter import chapter as chapter
from funcprop.training.data import Dataset as Dataset
from funcprop.training.data import Split as Split
from funcprop.training.data import digits as digits
from funcprop.training.data import minibatches as minibatches
from funcprop.training.diagonal import DiagonalState as DiagonalState
from funcprop.training.diagonal import scale_by_diagonal as scale_by_diagonal
from funcprop.training.idx import DataError as DataError
from funcprop.training.idx import fashion_mnist as fashion_mnist
from funcprop.training.idx import read_idx as read_idx
from funcprop.training.kfac import KFACState as KFACState
from funcprop.training.kfac import gauss_newton_diagonal as gauss_newton_diagonal
from funcprop.training.kfac import kfac as kfac
from funcprop.training.loop import Epoch as Epoch
from funcprop.training.loop import Setup as Setup
from funcprop.training.loop import apply_loss as apply_loss
from funcprop.training.loop import fit as fit
from funcprop.training.loop import make_step as make_step
from funcprop.training.newton import NewtonCGState as NewtonCGState
from funcprop.training.newton import newton_cg as newton_cg
