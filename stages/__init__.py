"""The steps of the pipeline: one thin module per stage, each reads parameters, calls the library, writes artifacts."""
