"""Parts that a run may do without: of other systems, and for speed on a GPU. Counted when a run uses them."""
