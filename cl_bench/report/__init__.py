"""From result files to tables, pictures and one page; without torch, so that any old run can be read."""
