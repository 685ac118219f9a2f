"""One file for each dataset; nothing is imported here, so that one dataset cannot break another."""
