"""One file for each dataset; this one imports none of them, so that one dataset cannot break another."""
