"""Laws, one module each for the module that they are about."""
