"""The embedded model: a diffusers repository of a few MB, and how it is made."""
