"""Evidence: what is measured here is what README and the model card claim."""
