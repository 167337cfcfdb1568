"""The parts of a plan: LoRAs by component, and the warnings of what may be a mistake."""
