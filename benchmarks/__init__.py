"""Evidence: what is measured here is what README, documentation and model card claim."""
