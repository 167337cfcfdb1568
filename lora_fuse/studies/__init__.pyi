from . import catalog as catalog
from . import doctor as doctor
from . import sweep as sweep
from . import validation as validation
