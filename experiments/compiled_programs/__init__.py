"""Programs compiled for accelerators that this machine does not have: targets, and what their text says."""

from compiled_programs.hlo_figures import Figures as Figures
from compiled_programs.hlo_figures import figures as figures
from compiled_programs.targets import TARGETS as TARGETS
from compiled_programs.targets import device_of as device_of
from compiled_programs.targets import environment as environment
from compiled_programs.targets import missing as missing
from compiled_programs.targets import versions as versions
