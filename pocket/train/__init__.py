"""Training of the pocket model, phase by phase: pictures, VAE, examples, base, Lightning LoRA, style LoRA, export."""
