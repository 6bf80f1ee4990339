"""What trains the models that this tree ships."""
