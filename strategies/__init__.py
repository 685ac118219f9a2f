"""One file per method, named by its ``class_path``. Nothing is imported here, so none can break another."""
