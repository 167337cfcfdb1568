"""Four tools above one regression: `validation`, `sweep`, `catalog`, `doctor`."""
