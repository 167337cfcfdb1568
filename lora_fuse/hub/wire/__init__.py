"""The wire between this machine and a Hub: what may come over it (`answers`, `guard`), and how slowly (`pace`)."""
