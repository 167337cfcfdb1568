from . import catalog as catalog
from . import doctor as doctor
from . import keep_search as keep_search
from . import sweep as sweep
from . import validation as validation
