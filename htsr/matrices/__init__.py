"""Where a model's weight matrices are: any source to a list of unread matrices."""
