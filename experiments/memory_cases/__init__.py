from memory_cases.models import Loss as Loss
from memory_cases.models import drawn as drawn
from memory_cases.models import to_rematerialise as to_rematerialise
