"""What a method and a dataset subclass."""
