"""From result files to tables, pictures and one page."""
