"""What is published beside a merged checkpoint: card, licences, provenance, bill of materials, signature."""
