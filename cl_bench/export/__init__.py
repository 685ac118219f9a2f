"""A kept model, as the strategy that it was and as files for other libraries."""
