"""Parts of other systems than the record, counted when a run uses them."""
