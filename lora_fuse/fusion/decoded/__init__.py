"""Bases whose weights are codes: decoded, fused and written as plain weights, or quantised again."""
