from .chapter_model import chapter as chapter
from .chapter_model import init_chapter as init_chapter
from .combinators import Model as Model
from .combinators import dense as dense
from .combinators import elementwise as elementwise
from .combinators import mlp as mlp
from .combinators import residual as residual
from .combinators import sequential as sequential
