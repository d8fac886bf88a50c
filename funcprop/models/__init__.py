"""Models as pure functions of parameter pytrees: combinators, and the chapter's own model."""

from funcprop.models.chapter import chapter as chapter
from funcprop.models.chapter import init_chapter as init_chapter
from funcprop.models.combinators import Model as Model
from funcprop.models.combinators import dense as dense
from funcprop.models.combinators import elementwise as elementwise
from funcprop.models.combinators import mlp as mlp
from funcprop.models.combinators import residual as residual
from funcprop.models.combinators import sequential as sequential
