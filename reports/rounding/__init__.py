"""What rounding narrow weights costs, and what it saves."""
