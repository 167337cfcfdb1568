"""A fuzzer of every parser of what comes from outside: `table` has the parsers, ``make fuzz`` runs them for an hour."""
