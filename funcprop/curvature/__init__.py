"""Curvature: second-order quantities of any JAX model, as linear operators on its parameters."""

from funcprop.curvature.accumulation import Accumulated as Accumulated
from funcprop.curvature.accumulation import LoaderError as LoaderError
from funcprop.curvature.accumulation import accumulate as accumulate
from funcprop.curvature.accumulation import check_deterministic as check_deterministic
from funcprop.curvature.accumulation import merge as merge
from funcprop.curvature.accumulation import over_batches as over_batches
from funcprop.curvature.convergence import ConvergenceWarning as ConvergenceWarning
from funcprop.curvature.diagonal import HessianDiagonal as HessianDiagonal
from funcprop.curvature.diagonal import Plan as Plan
from funcprop.curvature.diagonal import PlanRow as PlanRow
from funcprop.curvature.diagonal import hessian_diagonal as hessian_diagonal
from funcprop.curvature.estimate import Estimate as Estimate
from funcprop.curvature.fisher import fisher as fisher
from funcprop.curvature.gauss_newton import GaussNewton as GaussNewton
from funcprop.curvature.gauss_newton import ggn as ggn
from funcprop.curvature.hessian import Hessian as Hessian
from funcprop.curvature.hessian import hessian as hessian
from funcprop.curvature.likelihood import Likelihood as Likelihood
from funcprop.curvature.operator import Dense as Dense
from funcprop.curvature.operator import Identity as Identity
from funcprop.curvature.operator import Linearized as Linearized
from funcprop.curvature.operator import LinearOperator as LinearOperator
from funcprop.curvature.operator import Scaled as Scaled
from funcprop.curvature.operator import Sum as Sum
from funcprop.curvature.operator import identity as identity
from funcprop.curvature.spectrum import Spectrum as Spectrum
