"""What every operator of curvature is, and what it answers with: public names of `funcprop.operators`."""

from funcprop.operators.convergence import ConvergenceWarning as ConvergenceWarning
from funcprop.operators.eigenpairs import Lanczos as Lanczos
from funcprop.operators.eigenpairs import Lobpcg as Lobpcg
from funcprop.operators.estimate import Estimate as Estimate
from funcprop.operators.linear_operator import Dense as Dense
from funcprop.operators.linear_operator import Identity as Identity
from funcprop.operators.linear_operator import Linearized as Linearized
from funcprop.operators.linear_operator import LinearOperator as LinearOperator
from funcprop.operators.linear_operator import Scaled as Scaled
from funcprop.operators.linear_operator import Sum as Sum
from funcprop.operators.linear_operator import identity as identity
from funcprop.operators.solvers import ConjugateGradients as ConjugateGradients
from funcprop.operators.solvers import DenseSolver as DenseSolver
from funcprop.operators.solvers import Minres as Minres
from funcprop.operators.spectral_density import Spectrum as Spectrum
from funcprop.operators.spectrum_summary import Summary as Summary
from funcprop.operators.spectrum_summary import summary as summary
