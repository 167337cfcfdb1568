from .distilled import LIGHTNING as LIGHTNING
from .distilled import distillation as distillation
from .distilled import needed_scheduler as needed_scheduler
from .families import COMPONENT as COMPONENT
from .families import alpha_warnings as alpha_warnings
from .families import pair_warnings as pair_warnings
from .keep import kept_layers as kept_layers
