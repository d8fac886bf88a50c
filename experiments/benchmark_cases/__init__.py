"""The models of `gradient_benchmark.py`: in full, in small for `--smoke`, and the bounds that are sought."""

from benchmark_cases import blocks, dense, language, layers, loops, recurrent, vision
from benchmark_cases.case import Case as Case
from benchmark_cases.case import Row as Row

ROWS: dict[str, Row] = {
    **vision.ROWS,
    **recurrent.ROWS,
    **loops.ROWS,
    **blocks.ROWS,
    **layers.ROWS,
    **language.ROWS,
    **dense.ROWS,
}
CURVES = layers.CURVES
